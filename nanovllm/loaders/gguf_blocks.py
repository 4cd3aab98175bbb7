"""Unpack the quantised blocks of GGUF tensors into float32.

    Q8_0   32 values: scale, 32 signed bytes                              value = scale * q
    Q4_0   32 values: scale, 16 bytes of nibbles                          value = scale * (q - 8)
    Q4_1   the same with a minimum                                        value = scale * q + minimum
    Q5_0, Q5_1   the same with a fifth bit for each value (q - 16 in Q5_0)
    Q4_K, Q5_K   256 values: 8 groups of 32 whose scales and minimums are 6-bit multiples of the block's two
    Q6_K   256 values: 16 groups of 16 whose scales are 8-bit multiples of the block's one

A byte of nibbles holds two values that are 16 (K types: 32) apart: the low nibbles come first, then the high ones.
The work goes in chunks that stay in the processor's cache: each value is touched several times on the way, and
through main memory that would take several times as long.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanovllm.loaders.gguf_file import TensorType

VALUES_PER_CHUNK = 1 << 17  # 512 KiB of float32
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(raw: np.ndarray, tensor_type: TensorType) -> Tensor:
    """`raw` is [num_rows, bytes_per_row] uint8; the result is [num_rows, values_per_row]."""
    num_rows = len(raw)
    if tensor_type.name in FLOAT_DTYPES:
        return torch.from_numpy(raw.copy()).view(FLOAT_DTYPES[tensor_type.name])
    unpack = UNPACKERS[tensor_type.name]
    blocks = raw.reshape(-1, tensor_type.bytes_per_block)
    values = torch.empty(len(blocks), tensor_type.values_per_block)
    chunk_size = VALUES_PER_CHUNK // tensor_type.values_per_block
    for start in range(0, len(blocks), chunk_size):
        # The copy is small and makes the read-only map something that torch may wrap.
        chunk = torch.from_numpy(blocks[start : start + chunk_size].copy())
        unpack(chunk, values[start : start + chunk_size])
    return values.view(num_rows, -1)


# Below: `blocks` is [num_blocks, bytes_per_block] uint8, `out` is [num_blocks, values_per_block] float32.


def unpack_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(half_floats(blocks, 0, 2))


def unpack_q4_0(blocks: Tensor, out: Tensor) -> None:
    write_nibbles(blocks[:, 2:], out, run=16)
    out.sub_(8).mul_(half_floats(blocks, 0, 2))


def unpack_q4_1(blocks: Tensor, out: Tensor) -> None:
    write_nibbles(blocks[:, 4:], out, run=16)
    out.mul_(half_floats(blocks, 0, 2)).add_(half_floats(blocks, 2, 4))


def unpack_q5_0(blocks: Tensor, out: Tensor) -> None:
    write_nibbles(blocks[:, 6:], out, run=16)
    out.add_(fifth_bits(blocks[:, 2:6])).sub_(16).mul_(half_floats(blocks, 0, 2))


def unpack_q5_1(blocks: Tensor, out: Tensor) -> None:
    write_nibbles(blocks[:, 8:], out, run=16)
    out.add_(fifth_bits(blocks[:, 4:8])).mul_(half_floats(blocks, 0, 2)).add_(half_floats(blocks, 2, 4))


def unpack_q4_k(blocks: Tensor, out: Tensor) -> None:
    write_nibbles(blocks[:, 16:], out, run=32)
    scale_groups_k(blocks, out)


def unpack_q5_k(blocks: Tensor, out: Tensor) -> None:
    write_nibbles(blocks[:, 48:], out, run=32)
    # Byte i of the 32 holds the fifth bits of value i of all eight groups, group 0 lowest.
    group = torch.arange(8, dtype=torch.uint8).unsqueeze(1)  # [8, 1]
    high = (blocks[:, 16:48].unsqueeze(1) >> group & 1) << 4  # [num_blocks, 8, 32]
    out.view(-1, 8, 32).add_(high)
    scale_groups_k(blocks, out)


def unpack_q6_k(blocks: Tensor, out: Tensor) -> None:
    # Each half of a block has 128 values: 64 bytes of nibbles, and 32 bytes with two more bits for four values each.
    low = blocks[:, :128].unflatten(1, (2, 2, 32))  # [num_blocks, half, nibble run, 32]
    quarter = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)  # [4, 1], bit positions
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> quarter & 3) << 4  # [num_blocks, half, quarter, 32]
    values = out.view(-1, 2, 4, 32)  # [num_blocks, half, quarter, 32]
    values[:, :, :2] = low & 15
    values[:, :, 2:] = low >> 4
    values.add_(high).sub_(32)
    scales = half_floats(blocks, 208, 210) * blocks[:, 192:208].view(torch.int8)  # [num_blocks, 16]
    out.view(-1, 16, 16).mul_(scales.unsqueeze(2))


def half_floats(blocks: Tensor, start: int, end: int) -> Tensor:
    """The float16 at these bytes of every block, as float32 [num_blocks, 1]."""
    return blocks[:, start:end].contiguous().view(torch.float16).float()


def write_nibbles(packed: Tensor, out: Tensor, run: int) -> None:
    """`packed` is [num_blocks, values_per_block / 2]; each `run` bytes give `run` low nibbles, then `run` high ones."""
    packed = packed.unflatten(1, (-1, run))  # [num_blocks, num_runs, run]
    values = out.view(len(out), -1, 2, run)
    values[:, :, 0] = packed & 15
    values[:, :, 1] = packed >> 4


def fifth_bits(packed: Tensor) -> Tensor:
    """`packed` is [num_blocks, 4]: bit i of the 32 belongs to value i. Returns 0 or 16, [num_blocks, 32] uint8."""
    bits = packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1  # [num_blocks, 4, 8]
    return bits.flatten(1) << 4


def scale_groups_k(blocks: Tensor, out: Tensor) -> None:
    """value = scale * group_scale * q - minimum * group_minimum, for the eight groups of Q4_K and Q5_K.

    Twelve bytes hold eight 6-bit scales and eight 6-bit minimums:

        bytes 0-3    scales 0-3 in the low six bits, upper two bits of scales 4-7 above them
        bytes 4-7    minimums 0-3 in the low six bits, upper two bits of minimums 4-7 above them
        bytes 8-11   lower four bits of scales 4-7, lower four bits of minimums 4-7 above them
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)  # [num_blocks, 8]
    minimums = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)  # [num_blocks, 8]
    groups = out.view(-1, 8, 32)
    groups.mul_((half_floats(blocks, 0, 2) * scales).unsqueeze(2))
    groups.sub_((half_floats(blocks, 2, 4) * minimums).unsqueeze(2))


UNPACKERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": unpack_q4_0,
    "Q4_1": unpack_q4_1,
    "Q5_0": unpack_q5_0,
    "Q5_1": unpack_q5_1,
    "Q8_0": unpack_q8_0,
    "Q4_K": unpack_q4_k,
    "Q5_K": unpack_q5_k,
    "Q6_K": unpack_q6_k,
}
