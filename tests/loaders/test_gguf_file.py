from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nanovllm.errors import InvalidCheckpoint, ModelError, ModelNotFound
from nanovllm.loaders.checkpoint import Checkpoint, open_checkpoint
from nanovllm.loaders.gguf_file import ARRAY, STRING, GGUFFile

Kinds = gguf.GGUFValueType
Builder = Callable[..., Path]


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, type_number: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_number) + value


def tensor_info(name: str = "x", dimensions: tuple[int, ...] = (8,), type_number: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + numbers + struct.pack("<IQ", type_number, offset)


def handmade(
    path: Path, *, entries: list[bytes] | None = None, infos: list[bytes] | None = None, data: bytes = bytes(64), **fields: Any
) -> Path:
    """A GGUF file in which everything may be wrong; the data section begins at the next multiple of 32."""
    entries, infos = entries or [], infos or []
    num_tensors, num_metadata = fields.get("num_tensors", len(infos)), fields.get("num_metadata", len(entries))
    header = fields.get("magic", b"GGUF") + struct.pack(fields.get("version", "<I"), fields.get("number", 3))
    header += struct.pack("<QQ", num_tensors, num_metadata) + b"".join(entries) + b"".join(infos)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def test_metadata_of_every_type_is_read(write_gguf: Builder) -> None:
    metadata = {
        "u8": (200, Kinds.UINT8), "i8": (-100, Kinds.INT8), "u16": (60000, Kinds.UINT16), "i16": (-30000, Kinds.INT16),
        "u32": (2**32 - 1, Kinds.UINT32), "i32": (-(2**31), Kinds.INT32), "u64": (2**64 - 1, Kinds.UINT64),
        "i64": (-(2**63), Kinds.INT64), "f32": (0.5, Kinds.FLOAT32), "f64": (0.1, Kinds.FLOAT64), "yes": (True, Kinds.BOOL),
        "no": (False, Kinds.BOOL), "text": ("räksmörgås", Kinds.STRING), "words": (["a", "", "ü"], Kinds.ARRAY),
        "numbers": ([1, -2, 3], Kinds.ARRAY), "truths": ([True, False], Kinds.ARRAY),
    }  # fmt: skip
    file = GGUFFile(write_gguf({"x": np.zeros(4, np.float32)}, metadata))
    assert file.version == 3
    assert {key: file.metadata[key] for key in metadata} == {key: value for key, (value, _) in metadata.items()}
    assert type(file.metadata["yes"]) is bool and type(file.metadata["u8"]) is int


def test_shapes_are_in_torch_order_and_names_in_file_order(write_gguf: Builder) -> None:
    file = GGUFFile(write_gguf({"b": np.zeros((2, 3, 4), np.float32), "a": np.zeros(5, np.float32)}))
    assert file.tensor_names == ["b", "a"]
    assert file.shape("b") == (2, 3, 4) == tuple(file.load("b").shape)
    assert file.raw("b").shape == (6, 16)
    with pytest.raises(InvalidCheckpoint, match="no tensor 'c'"):
        file.shape("c")


def test_version_2_is_read(tmp_path: Path) -> None:
    file = GGUFFile(handmade(tmp_path / "x.gguf", number=2, infos=[tensor_info()], data=struct.pack("<8f", *range(8))))
    assert file.version == 2 and file.load("x").tolist() == list(range(8))


def test_an_alignment_of_the_files_own_is_honoured(tmp_path: Path) -> None:
    alignment = entry("general.alignment", 4, struct.pack("<I", 256))
    path = tmp_path / "x.gguf"
    handmade(path, entries=[alignment], infos=[tensor_info()], data=b"")
    path.write_bytes(path.read_bytes().ljust(256, b"\0") + struct.pack("<8f", *range(8)))
    assert GGUFFile(path).load("x").tolist() == list(range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"GGML"}, "starts with b'GGML'"),
        ({"number": 1}, "GGUF version 1"),
        ({"number": 4}, "GGUF version 4"),
        ({"number": 0}, "GGUF version 0"),
        ({"version": ">I"}, "big-endian"),
        ({"num_tensors": 2**63}, "tensors cannot fit"),
        ({"num_metadata": 2**64 - 1}, "metadata entries cannot fit"),
        ({"entries": [entry("a", 99, b"")]}, "unknown type 99"),
        ({"entries": [entry("a", 7, b"\2")]}, "neither 0 nor 1"),
        ({"entries": [entry("a", 0, b"\1"), entry("a", 0, b"\1")]}, "'a' twice"),
        ({"entries": [entry("a", STRING, struct.pack("<Q", 2**63))]}, "truncated or malformed"),
        ({"entries": [entry("a", STRING, text(b"\xff\xfe"))]}, "not UTF-8"),
        ({"entries": [entry("a", ARRAY, struct.pack("<IQ", 4, 2**62))]}, "truncated or malformed"),
        ({"entries": [entry("a", ARRAY, struct.pack("<IQ", STRING, 2**60))]}, "array elements cannot fit"),
        ({"entries": [entry("a", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))]}, "malformed string"),
        ({"entries": [entry("a", ARRAY, struct.pack("<IQQ", STRING, 1, 2**40))]}, "truncated or malformed"),
        ({"entries": [entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 4 + struct.pack("<IQ", 0, 0))]}, "nests"),
        ({"entries": [entry("general.alignment", 4, struct.pack("<I", 24))]}, "not a power of two"),
        ({"entries": [entry("general.alignment", 4, struct.pack("<I", 0))]}, "not a power of two"),
        ({"entries": [entry("general.alignment", STRING, text("32"))]}, "not a power of two"),
        ({"infos": [tensor_info(dimensions=())]}, "0 dimensions"),
        ({"infos": [tensor_info(dimensions=(1,) * 5)]}, "5 dimensions"),
        ({"infos": [tensor_info(dimensions=(0, 4))]}, "impossible shape"),
        ({"infos": [tensor_info(dimensions=(2**32, 2**32))]}, "impossible shape"),
        ({"infos": [tensor_info(type_number=10)]}, "type Q2_K, which is not supported"),
        ({"infos": [tensor_info(type_number=4711)]}, "type number 4711"),
        ({"infos": [tensor_info(dimensions=(40,), type_number=8)]}, "not a multiple of Q8_0's block size"),
        ({"infos": [tensor_info(), tensor_info()]}, "'x' twice"),
        ({"infos": [tensor_info(offset=4)]}, "not a multiple of the alignment"),
        ({"infos": [tensor_info(offset=2**63)]}, "truncated or lies"),
        ({"infos": [tensor_info(dimensions=(17,))]}, "truncated or lies"),
        ({"infos": [tensor_info("x", (16,)), tensor_info("y", (8,), offset=32)]}, "overlap"),
    ],
)
def test_a_lie_in_the_header_is_refused_with_the_files_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = handmade(tmp_path / "lie.gguf", **change)
    with pytest.raises(InvalidCheckpoint, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\3\4 this is a zip file"])
def test_what_is_not_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"x\.gguf"):
        GGUFFile(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        GGUFFile(tmp_path)


def test_the_demo_model_truncated_anywhere_is_refused(demo: Checkpoint, tmp_path: Path) -> None:
    with demo.path.open("rb") as file:
        head = file.read(4 << 20)
    path = tmp_path / "cut.gguf"
    offsets = [*range(0, 200, 7), *np.random.default_rng(0).integers(200, len(head), 30).tolist(), len(head)]
    for offset in offsets:
        path.write_bytes(head[:offset])
        with pytest.raises(InvalidCheckpoint):
            GGUFFile(path)


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.weights.names():
        checkpoint.weights.load(name)


@pytest.fixture(scope="module")
def victim(write_model: Builder) -> tuple[bytes, int, Path]:
    """A valid file's bytes, the length of its header, and where mutants of it are written."""
    path = write_model(metadata={"nested": ([[1, 2], [3]], Kinds.ARRAY)})
    read_all(path)
    data_start = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
    return path.read_bytes(), data_start, path.with_name("mutant.gguf")


def assert_reads_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read_all(path)
    except ModelError as error:
        assert len(str(error)) < 2000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 << 20


MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@MANY
@given(mutations=st.lists(st.tuples(st.integers(0, 2**30), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_of_the_header_may_be_changed_without_harm(
    mutations: list[tuple[int, int]], victim: tuple[bytes, int, Path]
) -> None:
    original, data_start, path = victim
    content = bytearray(original)
    for position, value in mutations:
        content[position % data_start] = value
    assert_reads_or_refuses(path, bytes(content))


@MANY
@given(position=st.integers(0, 2**30), value=st.sampled_from(EXTREMES) | st.integers(0, 2**64 - 1), width=st.sampled_from([4, 8]))
def test_any_count_length_or_offset_may_be_extreme_without_harm(
    position: int, value: int, width: int, victim: tuple[bytes, int, Path]
) -> None:
    original, data_start, path = victim
    position %= data_start - width
    number = (value % 2 ** (8 * width)).to_bytes(width, "little")
    assert_reads_or_refuses(path, original[:position] + number + original[position + width :])


@MANY
@given(length=st.integers(0, 2**30))
def test_a_file_may_end_anywhere_without_harm(length: int, victim: tuple[bytes, int, Path]) -> None:
    original, _, path = victim
    assert_reads_or_refuses(path, original[: length % len(original)])
