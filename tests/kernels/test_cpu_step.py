"""The compiled step's products and packing: every instruction set against the torch twin, and against the portable one."""

from __future__ import annotations

import ctypes
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.instruction_sets import AVAILABLE, EMULATED, HERE, WITH_TILES, WITHOUT_TILES
from torch import Tensor

from nanovllm.errors import ConfigError
from nanovllm.kernels.cpu import build, compiler
from nanovllm.kernels.cpu.library import Layer, Matrix, Model, address, declare
from nanovllm.kernels.cpu.packing import (
    PACK_BLOCKS,
    SLICE,
    Kind,
    PackedMatrix,
    pack_bfloat16,
    pack_in_slices,
    pack_int4_group,
    pack_int8_group,
)
from nanovllm.loaders.gguf_blocks import dequantize
from nanovllm.loaders.gguf_file import TENSOR_TYPES, TensorType
from nanovllm.log import logger

PACKERS = [pack_bfloat16, pack_int8_group, pack_int4_group]
pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@cache
def library(instruction_set: str) -> ctypes.CDLL:
    loaded = build.load_step(instruction_set)
    assert loaded is not None
    return declare(loaded)


def unpack(matrix: PackedMatrix, instruction_set: str = "portable") -> Tensor:
    out = torch.empty(matrix.num_out, matrix.num_in)
    for row in range(matrix.num_out):
        library(instruction_set).nanovllm_unpack_row(ctypes.byref(Matrix.of(matrix)), row, address(out[row]))
    return out


def multiply(matrix: PackedMatrix, x: Tensor, instruction_set: str, num_threads: int = 1) -> Tensor:
    out = torch.full((len(x), matrix.num_out), torch.nan)
    one = library(instruction_set)
    handle = one.nanovllm_create(ctypes.byref(Model(layers=(Layer * 0)())), num_threads)
    one.nanovllm_multiply(handle, ctypes.byref(Matrix.of(matrix)), address(x), len(x), address(out))
    one.nanovllm_destroy(handle)
    return out


def rounded(x: Tensor, kind: Kind) -> Tensor:
    """The twin of how activations are rounded: to int8 by group of 32, or to bfloat16 for bfloat16 weights."""
    if kind == Kind.BFLOAT16:
        return x.bfloat16().float()
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    peak = groups.abs().amax(2, keepdim=True)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0)  # `127 / peak` would be rounded twice
    return ((groups * inverse).round() * (peak / 127)).flatten(1)[:, : x.shape[1]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("instruction_set", HERE)
class TestProducts:
    @pytest.mark.parametrize("num_out, num_in", [(1, 4), (17, 33), (100, 48), (48, 1536)])
    @pytest.mark.parametrize("num_rows", [1, 2, 3, 65])
    def test_are_those_of_the_torch_twin(self, pack, instruction_set, num_out, num_in, num_rows):
        matrix, x = pack(random(num_out, num_in)), random(num_rows, num_in, seed=1)
        wanted = rounded(x, matrix.kind).double() @ unpack(matrix).double().T
        close = 2e-5 * num_in**0.5 * 4
        torch.testing.assert_close(multiply(matrix, x, instruction_set).double(), wanted, atol=close, rtol=1e-5)

    def test_of_a_row_do_not_depend_on_its_neighbours_or_the_threads(self, pack, instruction_set):
        matrix, x = pack(random(80, 96)), random(70, 96, seed=1)
        every = multiply(matrix, x, instruction_set)
        assert torch.equal(every, multiply(matrix, x, instruction_set, num_threads=3))
        for first, end in ((0, 1), (5, 8), (66, 70), (0, 64)):
            assert torch.equal(every[first:end], multiply(matrix, x[first:end].contiguous(), instruction_set))

    def test_of_zeros_and_of_huge_and_tiny_values(self, pack, instruction_set):
        weight = random(32, 64)
        weight[3] = 0
        matrix = pack(weight)
        x = torch.cat((torch.zeros(1, 64), random(1, 64) * 1e30, random(1, 64) * 1e-30))
        wanted = rounded(x, matrix.kind).double() @ unpack(matrix).double().T
        out = multiply(matrix, x, instruction_set).double()
        torch.testing.assert_close(
            out / x.abs().amax(1, keepdim=True).clamp(min=1e-30),
            wanted / x.abs().amax(1, keepdim=True).clamp(min=1e-30),
            atol=1e-2,
            rtol=1e-4,
        )
        assert not out[0].any()

    @pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
    def test_of_what_is_not_finite_are_not_finite(self, pack, instruction_set, bad):
        matrix, x = pack(random(32, 70)), random(5, 70, seed=1)
        expected = multiply(matrix, x, instruction_set)
        for row, column in ((1, 0), (2, 33), (3, 69)):
            x[row, column] = bad
        out = multiply(matrix, x, instruction_set)
        assert not out[1:4].isfinite().any()
        assert torch.equal(out[[0, 4]], expected[[0, 4]])


class TestTiles:
    """16 rows of activations by 16 channels in one instruction, where that is worth it."""

    @pytest.mark.parametrize("pack", [pack_int8_group, pack_int4_group])
    @pytest.mark.parametrize("num_in", [40, 256, 600])  # 2 groups, 8 (as many as are multiplied at once), 19
    @pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 31, 33, 63, 64, 65, 80, 150])
    def test_give_the_same_bits_as_registers_for_integers(self, pack, num_rows, num_in):
        matrix, x = pack(random(50, num_in)), random(num_rows, num_in, seed=1)
        assert torch.equal(multiply(matrix, x, WITH_TILES), multiply(matrix, x, WITHOUT_TILES))

    @pytest.mark.parametrize("pack", PACKERS)
    def test_of_a_row_are_the_same_bits_for_any_number_of_rows(self, pack):
        matrix, x = pack(random(50, 600)), random(150, 600, seed=1)
        every = multiply(matrix, x, WITH_TILES)
        for num_rows in (1, 2, 3, 4, 5, 15, 16, 17, 20, 31, 32, 48, 49, 64, 65, 100, 149):
            assert torch.equal(every[:num_rows], multiply(matrix, x[:num_rows].contiguous(), WITH_TILES))
            last = x[-num_rows:].contiguous()
            assert torch.equal(every[-num_rows:], multiply(matrix, last, WITH_TILES, num_threads=2))

    @pytest.mark.skipif(WITH_TILES != EMULATED, reason="a processor's tiles cannot be asked")
    @pytest.mark.parametrize("pack", PACKERS)
    def test_are_given_back(self, pack):
        multiply(pack(random(16, 70)), random(16, 70), EMULATED)
        assert ctypes.CDLL(library(EMULATED)._name).emulated_tiles_of_this_thread() == 0

    @pytest.mark.skipif(WITH_TILES != EMULATED, reason="the processor has tiles, and does not count")
    @pytest.mark.parametrize("pack", PACKERS)
    def test_multiply_all_rows_of_bfloat16_and_of_integers_whole_sixteens(self, pack):
        count = ctypes.CDLL(library(EMULATED)._name).emulated_tile_products
        matrix, num_groups = pack(random(16, 70)), 3
        is_bfloat16 = matrix.kind == Kind.BFLOAT16
        for num_rows, num_tiles in ((1, 0), (15, 0), (16, 1), (31, 1), (64, 4), (79, 4), (80, 5)):
            before = count()
            multiply(matrix, random(num_rows, 70), EMULATED)
            wanted = -(-num_rows // 16) if is_bfloat16 else num_tiles
            assert count() - before == wanted * num_groups


@pytest.mark.parametrize("instruction_set", HERE)
@pytest.mark.parametrize("pack", PACKERS)
def test_extreme_weights_and_activations_do_not_overflow(pack, instruction_set):
    """All products of a group at their largest, with both signs: int16 sums must hold them."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    matrix = pack(torch.stack([torch.ones(64), -torch.ones(64), signs, -signs] * 4))
    x = torch.stack([torch.ones(64), -torch.ones(64), signs])
    wanted = x @ unpack(matrix).T
    torch.testing.assert_close(multiply(matrix, x, instruction_set), wanted, atol=0.02, rtol=1e-3)


@pytest.mark.parametrize("instruction_set", HERE)
def test_the_most_negative_int8_is_multiplied_rightly(instruction_set):
    """GGUF files may hold -128, whose absolute value is no int8."""
    raw = np.zeros((16, 34), dtype=np.uint8)
    raw[:, :2] = np.float16(1.0).reshape(1).view(np.uint8)
    raw[:, 2:] = 0x80
    out = multiply(PACK_BLOCKS["Q8_0"](raw), torch.full((1, 32), 127.0), instruction_set)
    assert out.tolist() == [[-128.0 * 127 * 32] * 16]


class TestPacking:
    @pytest.mark.parametrize("pack", PACKERS)
    def test_goes_slice_by_slice_and_comes_to_the_same(self, pack):
        weight = random(2 * SLICE + 21, 70)
        sizes: list[int] = []

        def pack_slice(part: Tensor) -> PackedMatrix:
            sizes.append(len(part))
            return pack(part)

        sliced, whole = pack_in_slices(pack_slice, weight), pack(weight)
        assert sizes == [SLICE, SLICE, 21]
        assert (sliced.kind, sliced.num_out, sliced.num_in) == (whole.kind, whole.num_out, whole.num_in)
        for name in ("values", "scales", "minimums"):
            ours, theirs = getattr(sliced, name), getattr(whole, name)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))

    @pytest.mark.parametrize(
        "pack, error",
        [(pack_bfloat16, 2**-8), (pack_int8_group, 0.51 / 127), (pack_int4_group, 0.55 / 7.5)],
    )
    def test_error_is_at_most_half_a_step(self, pack, error):
        weight = random(40, 70)
        assert (unpack(pack(weight)) - weight).abs().max() <= error * weight.abs().max()

    @pytest.mark.parametrize("type_name", list(PACK_BLOCKS))
    @pytest.mark.parametrize("instruction_set", HERE)
    def test_blocks_of_gguf_lose_nothing(self, type_name, instruction_set):
        tensor_type = next(one for one in TENSOR_TYPES.values() if one.name == type_name)
        assert isinstance(tensor_type, TensorType)
        raw = np.random.default_rng(0).integers(0, 256, (24, 3 * tensor_type.bytes_per_block), dtype=np.uint8)
        blocks = raw.reshape(24, 3, -1)
        num_halves = 2 if type_name == "Q4_1" else 1
        blocks[:, :, : 2 * num_halves] = (
            np.random.default_rng(1).normal(0, 1, (24, 3, num_halves)).astype(np.float16).view(np.uint8)
        )
        assert torch.equal(unpack(PACK_BLOCKS[type_name](raw), instruction_set), dequantize(raw, tensor_type))


class TestBuilding:
    def test_is_done_once_and_again_for_other_flags(self, tmp_path, monkeypatch):
        monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
        calls = []
        monkeypatch.setattr(build, "compiler_version", lambda compiler: "1")
        monkeypatch.setattr(
            build.subprocess, "run", lambda command, **options: (calls.append(command), Path(command[-1]).write_text(""))
        )
        first = build.build("g++", "portable")
        assert build.build("g++", "portable") == first and len(calls) == 1
        assert build.build("g++", "avx2") != first and len(calls) == 2
        monkeypatch.setattr(build, "compiler_version", lambda compiler: "2")
        assert build.build("g++", "portable") != first and len(calls) == 3
        assert len(list(tmp_path.iterdir())) == 3  # nothing unfinished stays

    def test_without_a_compiler_says_so_and_gives_nothing(self, monkeypatch, caplog):
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setattr(logger, "propagate", True)
        with caplog.at_level("INFO"):
            assert build.load_step() is None
        assert "no C++ compiler" in caplog.text

    def test_that_fails_gives_nothing_and_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
        monkeypatch.setenv("CXX", shutil.which("false") or "/bin/false")
        assert build.load_step() is None
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "refused, chosen", [("-mamx-tile", "avx512-bf16"), ("-mavx512bf16", "avx512"), ("-mavx512f", "avx2")]
    )
    def test_by_an_old_compiler_is_for_the_best_instructions_that_it_knows(self, tmp_path, monkeypatch, caplog, refused, chosen):
        old = self.old_compiler(tmp_path, monkeypatch, refused)
        with caplog.at_level("INFO"):
            assert build.load_step() is not None
            assert build.load_step() is not None  # without a second line
        assert [path.name.rpartition("-")[0] for path in tmp_path.glob("*.so")] == [f"step-{chosen}"]
        assert [record.message for record in caplog.records] == [
            f"degraded, compiled_step: {old} did not build amx (unknown option): {chosen} runs"
        ]

    def test_by_an_old_compiler_gives_nothing_rather_than_other_instructions_than_asked_for(self, tmp_path, monkeypatch):
        self.old_compiler(tmp_path, monkeypatch, refused="-mamx-tile")
        assert build.load_step("amx") is None
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "amx")
        assert build.load_step() is None
        monkeypatch.delenv("NANOVLLM_CPU_ISA")
        self.old_compiler(tmp_path, monkeypatch, refused="-m")  # the portable set is slower than torch
        assert build.load_step() is None
        assert not list(tmp_path.glob("*.so"))

    @staticmethod
    def old_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> Path:
        """On a processor with everything. It "compiles" by copying a library that is there."""
        path, ready = tmp_path / "old", library("portable")._name
        path.write_text(f"""#!/bin/sh
            case "$*" in *" {refused}"*) echo "unknown option" >&2; exit 1;; esac
            for last; do :; done
            cp {ready} $last""")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
        monkeypatch.setattr(build, "cpu_flags", lambda: compiler.AMX_FEATURES | {"avx2", "fma", "f16c"})
        monkeypatch.setattr(build, "may_use_tiles", lambda: True)
        monkeypatch.setattr(logger, "propagate", True)
        return path

    def test_the_instruction_set_can_be_forced(self, monkeypatch):
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "portable")
        assert build.best_instruction_set() == "portable"
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "mmx")
        with pytest.raises(ConfigError, match="portable"):
            build.best_instruction_set()

    def test_what_the_processor_lacks_is_refused_and_not_chosen(self, monkeypatch):
        monkeypatch.setattr(build, "cpu_flags", lambda: compiler.AMX_FEATURES - {"amx_int8"})
        assert build.best_instruction_set() == "avx512-bf16"
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "amx")
        with pytest.raises(ConfigError, match=r"NANOVLLM_CPU_ISA='amx'.* lacks amx_int8$"):
            build.best_instruction_set()
        with pytest.raises(ConfigError, match=r"^amx instructions .* lacks amx_int8$"):
            build.load_step("amx")

    @pytest.mark.parametrize("is_permitted", [True, False])
    def test_tiles_are_chosen_where_the_kernel_permits_them(self, monkeypatch, is_permitted):
        monkeypatch.setattr(build, "cpu_flags", lambda: compiler.AMX_FEATURES)
        monkeypatch.setattr(build, "may_use_tiles", lambda: is_permitted)
        assert build.best_instruction_set() == ("amx" if is_permitted else "avx512-bf16")
        monkeypatch.setenv("NANOVLLM_CPU_ISA", "amx")
        if not is_permitted:
            with pytest.raises(ConfigError, match=r"NANOVLLM_CPU_ISA='amx'.* does not permit tiles"):
                build.best_instruction_set()

    @pytest.mark.parametrize("instruction_set", AVAILABLE)
    def test_a_library_says_what_it_is(self, instruction_set):
        assert library(instruction_set).nanovllm_instruction_set().decode() == instruction_set
