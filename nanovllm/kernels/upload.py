"""Small host arrays to the device, without waiting for it: indices and operands that change every step.

A copy from ordinary memory may stop the host until the device has caught up; one from pinned memory does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray | Sequence[int] | Sequence[float], device: torch.device) -> Tensor:
    """A tensor of the array's dtype; of a list: int64 or float32."""
    array = np.array(values, order="C")  # a copy: columns of a structured array have strides that torch refuses
    tensor = torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
