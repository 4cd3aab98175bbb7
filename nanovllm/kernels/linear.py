"""y = x W^T + b: the library's product, or one over weights that were repacked once for this processor.

On a CPU, oneDNN stores the weight in the tile order of its kernels ahead of time; without that, every call reorders it
again (measured on a Zen 5 and a Xeon: 1.5 to 2 times slower at 1 to 32 rows). Elsewhere `F.linear` is the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.log import logger

Product = Callable[[Tensor], Tensor]  # [num_tokens, in_features] -> [num_tokens, out_features]
PACK_FOR_ROWS = 8  # a hint to oneDNN: the typical number of rows


def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """The torch twin. weight: [out_features, in_features]."""
    return lambda x: F.linear(x, weight, bias)


def packed_product(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN with a prepacked weight; the plain product where this build or dtype has none."""
    if not can_pack(weight):
        return plain_product(weight, bias)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_FOR_ROWS)
    except RuntimeError as error:  # a build of torch whose oneDNN lacks this format
        logger.info("weights are not repacked for this processor: %s", error)
        return plain_product(weight, bias)
    return lambda x: _multiply(x, packed, bias)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A single row goes with a copy of itself: oneDNN adds one row's products in another order than those of two or more,
    and a sequence would get other roundings alone than in a batch (measured: bfloat16, 1,536 columns)."""
    rows = x.expand(2, -1).contiguous() if len(x) == 1 else x
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")[: len(x)]


def can_pack(weight: Tensor) -> bool:
    is_supported = weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
    return weight.device.type == "cpu" and is_supported
