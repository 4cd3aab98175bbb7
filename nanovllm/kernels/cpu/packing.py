"""Weights in the order in which the compiled step reads them: blocks of 16 output channels.

One block is what one instruction can use for 16 channels at once. Integer formats go four inputs (a quad) at a time,
because that is what the integer instructions of AVX2, VNNI and AMX multiply and add; bfloat16 goes two inputs (a pair) at
a time. Example: 32 channels, 8 inputs:

    int8 values   [2 blocks, 2 quads, 16 channels, 4 inputs]
    element of channel 17, input 5: block 1, quad 1, channel 1, input 1

Q4_0, Q4_1 and Q8_0 blocks of GGUF are only reordered: same integers, same float16 scales, nothing lost. Everything else is
quantised here. Padding is zero. `step.cpp`, part 3, has the formats; docs/cpu-step.md draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16  # output channels of a block
GROUP = 32  # inputs that share a scale
SLICE = 1024  # output channels that are packed at a time, whole blocks


class Kind(IntEnum):
    BFLOAT16 = 0
    INT8_GROUP = 1  # one float16 scale per 32 inputs
    INT4_GROUP = 2  # one float16 scale and minimum per 32 inputs; value = scale * nibble + minimum


KIND_OF_BLOCKS = {"Q8_0": Kind.INT8_GROUP, "Q4_0": Kind.INT4_GROUP, "Q4_1": Kind.INT4_GROUP}
BYTES_PER_GROUP = {Kind.BFLOAT16: 64, Kind.INT8_GROUP: 32 + 2, Kind.INT4_GROUP: 16 + 2 + 2}  # with scale and minimum


def packed_size(kind: Kind, num_out: int, num_in: int) -> int:
    """Bytes of a matrix, padding included."""
    return -(-num_out // CHANNELS) * CHANNELS * -(-num_in // GROUP) * BYTES_PER_GROUP[kind]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    kind: Kind
    num_out: int
    num_in: int  # both as in the checkpoint, without padding
    values: Tensor
    scales: Tensor | None = None
    minimums: Tensor | None = None

    @property
    def padded_in(self) -> int:
        return -(-self.num_in // GROUP) * GROUP

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.values, self.scales, self.minimums) if tensor is not None)


# --- from floats: weight is [num_out, num_in]


def pack_in_slices(pack: Callable[[Tensor], PackedMatrix], weight: Tensor) -> PackedMatrix:
    """Packing makes float copies on its way: of some rows at a time, because an embedding may be the half of a model."""
    parts = [pack(weight[start : start + SLICE]) for start in range(0, len(weight), SLICE)]
    values, scales, minimums = (
        None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
        for name in ("values", "scales", "minimums")
    )
    return replace(parts[0], num_out=len(weight), values=values, scales=scales, minimums=minimums)


def pack_bfloat16(weight: Tensor) -> PackedMatrix:
    return PackedMatrix(Kind.BFLOAT16, weight.shape[0], weight.shape[1], words_to_blocks(pad(weight, GROUP).bfloat16()))


def pack_int8_group(weight: Tensor) -> PackedMatrix:
    groups = pad(weight.float(), GROUP).unflatten(1, (-1, GROUP))  # [padded_out, num_groups, 32]
    scales = (groups.abs().amax(2) / 127).half()
    values = quantize(groups, scales.float().unsqueeze(2), -127, 127).to(torch.int8)
    return PackedMatrix(Kind.INT8_GROUP, weight.shape[0], weight.shape[1], words_to_blocks(values.flatten(1)), to_blocks(scales))


def pack_int4_group(weight: Tensor) -> PackedMatrix:
    groups = pad(weight.float(), GROUP).unflatten(1, (-1, GROUP))
    minimums = groups.amin(2).half()
    scales = ((groups.amax(2) - minimums.float()) / 15).half()
    values = quantize(groups - minimums.float().unsqueeze(2), scales.float().unsqueeze(2), 0, 15).to(torch.uint8)
    low, high = values.split(GROUP // 2, dim=2)
    return nibble_matrix(weight.shape[0], weight.shape[1], low | high << 4, scales, minimums)


def quantize(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The nearest integers; 0 where the scale is 0."""
    return (values / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(low, high)


# --- from GGUF blocks: raw is [num_out, bytes_per_row] uint8; loaders/gguf_blocks.py says what is in them


def pack_q8_0(raw: np.ndarray) -> PackedMatrix:
    blocks = block_bytes(raw, 34)
    values = pad(blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1), GROUP)
    return PackedMatrix(Kind.INT8_GROUP, *shape_of(blocks), words_to_blocks(values), to_blocks(pad(halves(blocks, 0), 1)))


def pack_q4_0(raw: np.ndarray) -> PackedMatrix:
    """value = scale * (nibble - 8): a minimum of -8 scales, which a float16 holds exactly."""
    blocks = block_bytes(raw, 18)
    scales = halves(blocks, 0)
    return nibble_matrix(*shape_of(blocks), blocks[:, :, 2:], scales, scales * -8)


def pack_q4_1(raw: np.ndarray) -> PackedMatrix:
    blocks = block_bytes(raw, 20)
    return nibble_matrix(*shape_of(blocks), blocks[:, :, 4:], halves(blocks, 0), halves(blocks, 2))


PACK_BLOCKS: dict[str, Callable[[np.ndarray], PackedMatrix]] = {"Q8_0": pack_q8_0, "Q4_0": pack_q4_0, "Q4_1": pack_q4_1}


def block_bytes(raw: np.ndarray, bytes_per_block: int) -> Tensor:
    """[num_out, num_groups, bytes_per_block]."""
    return torch.from_numpy(raw.copy()).unflatten(1, (-1, bytes_per_block))


def shape_of(blocks: Tensor) -> tuple[int, int]:
    return blocks.shape[0], blocks.shape[1] * GROUP


def halves(blocks: Tensor, start: int) -> Tensor:
    """The float16 at this byte of every block, [num_out, num_groups]."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.float16).squeeze(2)


def nibble_matrix(num_out: int, num_in: int, nibbles: Tensor, scales: Tensor, minimums: Tensor) -> PackedMatrix:
    """nibbles: [.., num_groups, 16] bytes, where byte j has value j of its group low and value j + 16 high."""
    packed = words_to_blocks(pad(nibbles.flatten(1), 1).contiguous())
    return PackedMatrix(Kind.INT4_GROUP, num_out, num_in, packed, to_blocks(pad(scales, 1)), to_blocks(pad(minimums, 1)))


# --- order


def pad(matrix: Tensor, multiple: int) -> Tensor:
    """Zeros below, up to a whole block of channels, and to the right, up to `multiple`."""
    return F.pad(matrix, (0, -matrix.shape[1] % multiple, 0, -matrix.shape[0] % CHANNELS))


def to_blocks(matrix: Tensor) -> Tensor:
    """[padded_out, columns] -> [padded_out / 16, columns, 16]."""
    return matrix.unflatten(0, (-1, CHANNELS)).transpose(1, 2).contiguous()


def words_to_blocks(matrix: Tensor) -> Tensor:
    """[padded_out, columns] of 1 or 2 bytes -> [padded_out / 16, words, 16, bytes]: 4 bytes, a quad or a pair, move as one."""
    return to_blocks(matrix.view(torch.int32)).view(torch.uint8)
