"""The noise of the draw: a pure function of (seed, position, token id), whatever else is in the batch.

Nothing is stored between steps and nothing depends on the order of the calls, so a preempted or re-batched sequence
draws the same tokens again. Specification, to be followed by every other implementation (`bits` exactly, the
logarithm to the last place or two):

    mix(x)       x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16             uint32
    finish(z)    z ^= z >> 30;  z *= 0xbf58476d1ce4e5b9;  z ^= z >> 27;  z *= 0x94d049bb133111eb;  z ^= z >> 31   uint64
    key          finish(finish(seed) + (position + 1) * 0x9e3779b97f4a7c15) >> 32                           uint32
    bits(token)  mix(mix(token) + key)                                                                      uint32
    u(token)     ((bits >> 9) + 0.5) * 2**-23              in [2**-24, 1 - 2**-24], exact in float32
    weight       exp((logit - max) * (1 / temperature))    in [0, 1]; 1 / temperature rounded to float32 first
    winner       the token with the largest weight / -log(u); the lowest id among equals

This is the Gumbel-max trick, argmax(logit / T - log(-log(u))), with the exponential taken on both sides. Nothing is
lost when a weight underflows to 0: -log(u) lies in [2**-24, 16.7], so the most likely token scores at least 0.06, and
a weight would have to exceed 3e-9 to beat that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MASK_64 = 2**64 - 1
STEPS_TOGETHER = 16  # whose keys are computed at once
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, rounded to odd: the steps of a Weyl sequence


def stream_of(seed: int) -> int:
    """finish(seed): the part of the key that stays the same for all positions of a sequence."""
    z = seed & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def draw_keys(streams: np.ndarray, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """The keys, [n] int32 (the bits of a uint32), of the draws at `positions` in `streams`, [n] uint64.

    Of several steps at once where `positions` is [number of steps, n].
    """
    z = streams + (np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(32)).astype(np.uint32).view(np.int32)


class KeysOfSteps:
    """`draw_keys` of steps in which every stream goes on by one position. After the first some are computed together."""

    def __init__(self, streams: np.ndarray, positions: np.ndarray) -> None:
        """`positions`: of the first step, [n] int64."""
        self._streams, self._positions = streams, positions
        self._keys, self._step = np.empty((0, len(streams)), dtype=np.int32), 0

    def next(self) -> np.ndarray:
        """[n] int32."""
        if self._step == len(self._keys):
            number = STEPS_TOGETHER if self._step else 1
            self._positions = self._positions + self._step
            self._keys, self._step = draw_keys(self._streams, self._positions + np.arange(number)[:, None]), 0
        self._step += 1
        return self._keys[self._step - 1]


def token_hashes(vocab_size: int) -> Tensor:
    """mix(token) of the whole vocabulary: [vocab] int32."""
    return torch.from_numpy(_mix_numpy(np.arange(vocab_size, dtype=np.uint32)).view(np.int32))


def exponential_noise(hashes: Tensor, keys: Tensor) -> Tensor:
    """-log(u) of the tokens with `hashes`, [n] or [b, n], under `keys`, [b]: [b, n] float32."""
    bits = hashes + keys[:, None]  # [b, n] int32
    # Torch has no unsigned shifts and a slow logarithm on a CPU: NumPy halves the time there (49152 tokens: 45 us).
    return _noise_numpy(bits) if bits.is_cpu else _noise_torch(bits)


def _noise_numpy(bits: Tensor) -> Tensor:
    """Overwrites `bits`."""
    words = _mix_numpy(bits.numpy().view(np.uint32))
    words >>= np.uint32(9)
    u = words.view(np.int32).astype(np.float32)  # [b, n]; signed: that conversion is one instruction
    u += np.float32(0.5)
    u *= np.float32(2**-23)
    np.log(u, out=u)
    return torch.from_numpy(np.negative(u, out=u))


def _noise_torch(bits: Tensor) -> Tensor:
    """Overwrites `bits`. The twin of `_noise_numpy` for every device."""
    _mix_torch(bits)
    bits >>= 9
    bits &= 2**23 - 1
    return bits.float().add_(0.5).mul_(2**-23).log_().neg_()


def _mix_numpy(x: np.ndarray) -> np.ndarray:
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def _mix_torch(x: Tensor) -> Tensor:
    """On int32, where a right shift copies the sign: the masks make it a shift of unsigned words."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x
