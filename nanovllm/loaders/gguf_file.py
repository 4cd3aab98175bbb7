"""GGUFFile: read a GGUF file (versions 2 and 3, little endian) and trust nothing in it.

    magic "GGUF" | version | num_tensors | num_metadata
    metadata      key, type, value ...
    tensor infos  name, dimensions (innermost first), type, offset into the data section ...
    data section  at the next multiple of general.alignment

Every count, length and offset is checked against the bytes that are really there before anything of that size is
made, and the header as a whole is bounded. Tensor data stays in the memory map until it is asked for. Names and
metadata are GGUF's own here; `gguf_model.py` translates them, `gguf_blocks.py` unpacks quantised tensors.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.errors import InvalidCheckpoint, ModelNotFound

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 256,000 tokens with merges takes about 16 MiB
MAX_ARRAY_DEPTH = 3
MAX_DIMENSIONS = 4
MIN_METADATA_BYTES = 8 + 4 + 1  # key length, type, one byte of value
MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8  # name length, number of dimensions, one of them, type, offset

# Metadata value types: the scalars by number, then the two that carry a length.
SCALAR_DTYPES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
# The fewest bytes that one element of these can take; bounds the count of an array.
MIN_ELEMENT_BYTES = {STRING: 8, ARRAY: 12}


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a tensor type stores its values: in blocks of a fixed number of values and bytes."""

    name: str
    values_per_block: int
    bytes_per_block: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
UNSUPPORTED_TYPE_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies, and how."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch has it
    type: TensorType
    offset: int  # from the start of the file
    num_bytes: int


class GGUFFile:
    """An open GGUF file: metadata parsed, every tensor located, no data read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = map_file(self.path)
        self.version, self.metadata, self.tensors = read_header(self._data, self.path)

    @property
    def tensor_names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise InvalidCheckpoint(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensor(name).shape

    def type_name(self, name: str) -> str:
        return self.tensor(name).type.name

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes, read-only and not copied; a row is a whole number of blocks."""
        tensor = self.tensor(name)
        stored = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        return stored.reshape(math.prod(tensor.shape[:-1]), -1)  # [num_rows, bytes_per_row]

    def load(self, name: str) -> Tensor:
        """The tensor's values: float32, or the stored type for F16 and BF16."""
        from nanovllm.loaders.gguf_blocks import dequantize

        tensor = self.tensor(name)
        return dequantize(self.raw(name), tensor.type).view(tensor.shape)


def map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise InvalidCheckpoint(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}") from error


def read_header(data: mmap.mmap, path: Path) -> tuple[int, dict[str, Any], dict[str, GGUFTensor]]:
    """Version, metadata and tensors; all that precedes the data section."""
    header = HeaderReader(data, path)
    version = read_version(header)
    num_tensors, num_metadata = header.unsigned(8), header.unsigned(8)
    header.check_count(num_metadata, MIN_METADATA_BYTES, "metadata entries")
    header.check_count(num_tensors, MIN_TENSOR_INFO_BYTES, "tensors")
    metadata = read_metadata(header, num_metadata)
    infos = [read_tensor_info(header) for _ in range(num_tensors)]
    return version, metadata, locate_tensors(header, infos, read_alignment(header, metadata))


def read_version(header: HeaderReader) -> int:
    header.skip(4)  # the magic, checked when the file was opened
    version = header.unsigned(4)
    if version in (2, 3):
        return version
    if version and version % 65536 == 0:
        raise header.error("is big-endian GGUF; only little-endian files are supported")
    raise header.error(f"is GGUF version {version}; only versions 2 and 3 are supported. Convert the model again with llama.cpp")


def read_metadata(header: HeaderReader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = header.string()
        if key in metadata:
            raise header.error(f"has the metadata key {key!r} twice")
        metadata[key] = header.value(header.unsigned(4))
    return metadata


def read_alignment(header: HeaderReader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.error(f"has general.alignment={alignment!r}, which is not a power of two")
    return alignment


def read_tensor_info(header: HeaderReader) -> GGUFTensor:
    """One tensor as declared; its offset still counts from the start of the data section."""
    name = header.string()
    num_dimensions = header.unsigned(4)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise header.error(f"declares {name!r} with {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(header.unsigned(8) for _ in range(num_dimensions))[::-1]
    type_number, offset = header.unsigned(4), header.unsigned(8)
    tensor_type = TENSOR_TYPES.get(type_number)
    if tensor_type is None:
        type_name = UNSUPPORTED_TYPE_NAMES.get(type_number, f"number {type_number}")
        supported = ", ".join(known.name for known in TENSOR_TYPES.values())
        raise header.error(f"stores {name!r} as type {type_name}, which is not supported (only {supported} are)")
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        raise header.error(f"declares {name!r} with the impossible shape {list(shape)}")
    if shape[-1] % tensor_type.values_per_block:
        raise header.error(f"has rows of {shape[-1]} in {name!r}, not a multiple of {tensor_type.name}'s block size")
    num_bytes = math.prod(shape) // tensor_type.values_per_block * tensor_type.bytes_per_block
    return GGUFTensor(name, shape, tensor_type, offset, num_bytes)


def locate_tensors(header: HeaderReader, infos: list[GGUFTensor], alignment: int) -> dict[str, GGUFTensor]:
    """Offsets made absolute. Tensors must be aligned, inside the file, and apart from each other."""
    data_start = -(-header.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for info in infos:
        start = data_start + info.offset
        if info.name in tensors:
            raise header.error(f"has the tensor {info.name!r} twice")
        if info.offset % alignment:
            raise header.error(f"places {info.name!r} at {info.offset}, not a multiple of the alignment {alignment}")
        if start + info.num_bytes > header.file_size:
            raise header.error(
                f"ends at byte {header.file_size}, but {info.name!r} {list(info.shape)} of type {info.type.name} "
                f"needs bytes {start} to {start + info.num_bytes}; the file is truncated or lies"
            )
        tensors[info.name] = GGUFTensor(info.name, info.shape, info.type, start, info.num_bytes)
    by_offset = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for first, second in itertools.pairwise(by_offset):
        if first.offset + first.num_bytes > second.offset:
            raise header.error(f"lets the tensors {first.name!r} and {second.name!r} overlap")
    return tensors


class HeaderReader:
    """A position in the header that never leaves the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.file_size = len(data)
        self.end = min(self.file_size, MAX_HEADER_BYTES)

    def error(self, what: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self.path} {what}")

    def skip(self, num_bytes: int) -> int:
        """Move past `num_bytes` and return where they begin."""
        start = self.position
        if num_bytes > self.end - start:
            where = "the file ends" if self.end == self.file_size else f"headers end at the latest (limit {MAX_HEADER_BYTES})"
            raise self.error(f"is truncated or malformed: {num_bytes} bytes are needed at {start}, but {where} at {self.end}")
        self.position = start + num_bytes
        return start

    def unsigned(self, num_bytes: int) -> int:
        start = self.skip(num_bytes)
        return int.from_bytes(self.data[start : start + num_bytes], "little")

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count > (self.end - self.position) // min_bytes:
            raise self.error(
                f"is truncated or malformed: {count} {what} cannot fit into its {self.end - self.position} header bytes"
            )

    def string(self) -> str:
        length = self.unsigned(8)
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"has a string at {start} that is not UTF-8: {error.reason}") from error

    def value(self, type_number: int, depth: int = 0) -> Any:
        if type_number == STRING:
            return self.string()
        if type_number == ARRAY:
            return self.array(depth + 1)
        return self.scalars(type_number, 1)[0]

    def array(self, depth: int) -> list[Any]:
        element_type, count = self.unsigned(4), self.unsigned(8)
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"nests metadata arrays more than {MAX_ARRAY_DEPTH} deep")
        if element_type not in MIN_ELEMENT_BYTES:
            return self.scalars(element_type, count)
        self.check_count(count, MIN_ELEMENT_BYTES[element_type], "array elements")
        if element_type == STRING:
            return self.strings(count)
        return [self.array(depth + 1) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """Many strings: a vocabulary has a hundred thousand, so this does not go through `string` for each."""
        data, position, end = self.data, self.position, self.end
        read_length = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(data, position)[0]
                if position > end:
                    break
                result.append(data[start:position].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise self.error(f"has a malformed string at {position} in an array: {error}") from error
        self.skip(position - self.position)
        return result

    def scalars(self, type_number: int, count: int) -> list[Any]:
        if type_number not in SCALAR_DTYPES:
            raise self.error(f"has a metadata value of the unknown type {type_number} at {self.position}")
        dtype = np.dtype(SCALAR_DTYPES[type_number])
        start = self.skip(count * dtype.itemsize)
        if type_number == BOOL and np.frombuffer(self.data, np.uint8, count, start).max(initial=0) > 1:
            raise self.error(f"has a boolean at {start} that is neither 0 nor 1")
        return np.frombuffer(self.data, dtype, count, start).tolist()
