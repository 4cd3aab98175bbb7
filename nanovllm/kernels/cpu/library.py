"""The C interface of step.cpp, as ctypes sees it. Part 3 of step.cpp has the same structures with their shapes.

Pointers do not keep their tensors alive: whoever makes a structure keeps the tensors.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import Any

from torch import Tensor

from nanovllm.kernels.cpu.packing import PackedMatrix


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kind", "num_out", "num_in", "padded_in")),
        *((name, c_void_p) for name in ("values", "scales", "minimums")),
    ]

    @classmethod
    def of(cls, packed: PackedMatrix) -> Matrix:
        tensors = packed.values, packed.scales, packed.minimums
        return cls(packed.kind, packed.num_out, packed.num_in, packed.padded_in, *map(address, tensors))


MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # of a layer
VECTORS = ("input_norm", "post_norm", "qkv_bias", "output_bias", "query_norm", "key_norm")


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        *((name, c_void_p) for name in VECTORS),
        ("kv_cache", c_void_p),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads")),
        *((name, c_int32) for name in ("num_kv_heads", "head_dim", "block_size", "kv_is_bfloat16")),
        ("num_blocks", c_int64),
        ("norm_eps", c_float),
        ("unused", c_int32),
        ("embedding", Matrix),
        ("head", Matrix),
        ("final_norm", c_void_p),
        ("layers", ctypes.POINTER(Layer)),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_chunks", "num_needed", "max_blocks")),
        *((name, c_void_p) for name in ("token_ids", "slots", "cos", "signed_sin", "starts", "lengths", "rows")),
        *((name, c_void_p) for name in ("block_tables", "needed", "hidden")),
    ]


class Draw(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "vocab_size")),
        *((name, c_void_p) for name in ("logits", "hashes", "keys", "inverse_temperature", "top_p", "top_k", "min_p")),
        *((name, c_void_p) for name in ("masks", "mask_lines", "token_ids")),
    ]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "nanovllm_instruction_set": (c_char_p, []),
    "nanovllm_create": (c_void_p, [ctypes.POINTER(Model), c_int32]),
    "nanovllm_pin": (c_int32, [c_void_p, ctypes.POINTER(c_int32)]),
    "nanovllm_destroy": (None, [c_void_p]),
    "nanovllm_forward": (None, [c_void_p, ctypes.POINTER(Step)]),
    "nanovllm_logits": (None, [c_void_p, c_void_p, c_int32, c_void_p]),
    "nanovllm_draw": (None, [c_void_p, ctypes.POINTER(Draw)]),
    "nanovllm_multiply": (None, [c_void_p, ctypes.POINTER(Matrix), c_void_p, c_int32, c_void_p]),
    "nanovllm_unpack_row": (None, [ctypes.POINTER(Matrix), c_int32, c_void_p]),
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types; without them it would cut pointers to 32 bits."""
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()
