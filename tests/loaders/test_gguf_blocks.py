from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from nanovllm.loaders.checkpoint import Checkpoint
from nanovllm.loaders.gguf_file import TENSOR_TYPES, GGUFFile

Types = gguf.GGMLQuantizationType
QUANTIZED = [Types.Q4_0, Types.Q4_1, Types.Q5_0, Types.Q5_1, Types.Q8_0, Types.Q4_K, Types.Q5_K, Types.Q6_K]
HALF_FLOAT_OFFSETS = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(kind: gguf.GGMLQuantizationType, num_rows: int, blocks_per_row: int) -> np.ndarray:
    """Blocks of random bits: every bit of the layout matters. Only the scales are kept finite."""
    random = np.random.default_rng(int(kind))
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (num_rows * blocks_per_row, size), dtype=np.uint8)
    for offset in HALF_FLOAT_OFFSETS[kind.name]:
        scales = random.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_rows, -1)  # [num_rows, bytes_per_row]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_bit_of_a_block_is_unpacked_as_the_gguf_package_does(
    kind: gguf.GGMLQuantizationType, write_gguf: Callable[..., Path]
) -> None:
    blocks = random_blocks(kind, num_rows=3, blocks_per_row=5)
    file = GGUFFile(write_gguf({"x": (blocks, kind)}))
    values = file.load("x")
    expected = gguf.quants.dequantize(blocks, kind)
    assert file.type_name("x") == kind.name
    assert values.dtype == torch.float32 and file.shape("x") == tuple(values.shape) == expected.shape
    assert np.array_equal(values.numpy(), expected)
    assert np.array_equal(file.raw("x"), blocks)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_a_tensor_of_several_chunks_and_a_rest_has_no_seams(
    kind: gguf.GGMLQuantizationType, write_gguf: Callable[..., Path]
) -> None:
    blocks = random_blocks(kind, num_rows=7, blocks_per_row=(300_000 // 7) // gguf.GGML_QUANT_SIZES[kind][0])
    values = GGUFFile(write_gguf({"x": (blocks, kind)})).load("x")
    assert np.array_equal(values.numpy(), gguf.quants.dequantize(blocks, kind))


@pytest.mark.parametrize("kind", [Types.Q4_0, Types.Q4_1, Types.Q5_0, Types.Q5_1, Types.Q8_0], ids=lambda kind: kind.name)
def test_quantised_values_come_back_close_to_the_originals(
    kind: gguf.GGMLQuantizationType, write_gguf: Callable[..., Path]
) -> None:
    original = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(original, kind)
    values = GGUFFile(write_gguf({"x": (blocks, kind)})).load("x").numpy()
    assert np.array_equal(values, gguf.quants.dequantize(blocks, kind))
    assert np.abs(values - original).max() < (0.02 if kind == Types.Q8_0 else 0.4)


def test_float_tensors_keep_their_values_and_their_type(write_gguf: Callable[..., Path]) -> None:
    original = np.random.default_rng(2).standard_normal((2, 3, 5)).astype(np.float32)
    brain = gguf.quants.quantize(original, Types.BF16)
    file = GGUFFile(write_gguf({"single": original, "half": original.astype(np.float16), "brain": (brain, Types.BF16)}))
    source = torch.from_numpy(original)
    assert torch.equal(file.load("single"), source)
    assert torch.equal(file.load("half"), source.half())
    assert torch.equal(file.load("brain"), source.bfloat16())


def test_a_loaded_tensor_may_be_written_to_without_touching_the_file(write_gguf: Callable[..., Path]) -> None:
    file = GGUFFile(write_gguf({"x": np.ones((2, 2), np.float32)}))
    file.load("x").zero_()
    assert file.load("x").tolist() == [[1, 1], [1, 1]]
    assert not file.raw("x").flags.writeable


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for number, known in TENSOR_TYPES.items():
        kind = Types(number)
        assert known.name == kind.name
        assert (known.values_per_block, known.bytes_per_block) == gguf.GGML_QUANT_SIZES[kind]


def test_tensors_of_the_demo_model_equal_the_gguf_packages(demo: Checkpoint) -> None:
    assert demo.gguf is not None
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(demo.path).tensors}
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.17.ffn_down.weight", "blk.29.attn_norm.weight"):
        expected = gguf.quants.dequantize(np.asarray(tensors[name].data), tensors[name].tensor_type)
        assert np.array_equal(demo.gguf.load(name).numpy(), expected)
