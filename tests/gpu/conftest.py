"""Everything here needs a CUDA device: `pytest -m gpu` runs all of it there, and it is skipped elsewhere."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    return torch.device("cuda")
