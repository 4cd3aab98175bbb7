"""Retry: whether a client sends a request again, and after how long. For `nanovllm bench serve` and `nanovllm chat --url`.

A wait is drawn from 0 up to a limit that doubles each time ("full jitter"), so that clients that were refused together
do not come back together. A server's Retry-After comes before it, and is never cut short. A budget bounds the share of
retries among all requests: without one, retries are what keeps an overloaded server overloaded. Only what has brought
no part of an answer is sent again. Knows no HTTP library.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from nanovllm.errors import ConfigError

STATUSES = frozenset({429, 502, 503})  # "not now"; others would say the same again
RESERVE = 3  # retries beyond the budget, so that the first requests have some


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    max_retries: int = 0  # of one request
    base_s: float = 0.5  # limit of the first wait, seconds
    max_s: float = 30.0  # limit of every wait; a Retry-After beyond it ends the attempts
    budget: float = 0.2  # retries per request, over all requests

    def __post_init__(self) -> None:
        if isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or not 0 <= self.max_retries <= 100:
            raise ConfigError(f"max_retries={self.max_retries!r} must be a whole number from 0 to 100")
        for name in ("base_s", "max_s", "budget"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
                raise ConfigError(f"{name}={value!r} must be a number of at least 0")


class Retrier:
    """Of all requests of one client."""

    def __init__(self, policy: RetryPolicy, rng: random.Random | None = None) -> None:
        self.policy = policy
        self.num_requests = self.num_retries = 0
        self._rng = rng or random.Random()

    def begin(self) -> None:
        """Another request, which adds to the budget."""
        self.num_requests += 1

    def wait_s(self, num_retries: int, retry_after_s: float | None = None) -> float | None:
        """Seconds to wait before the next retry of a request that has had `num_retries`; None: give up."""
        policy, asked = self.policy, retry_after_s or 0.0
        is_spent = self.num_retries >= RESERVE + policy.budget * self.num_requests
        if num_retries >= policy.max_retries or is_spent or asked > policy.max_s:
            return None
        self.num_retries += 1
        return asked + self._rng.uniform(0.0, min(policy.max_s, policy.base_s * 2**num_retries))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Of a Retry-After header (the name in any case), which is a number of seconds or a date; None without one."""
    from email.utils import parsedate_to_datetime  # takes as long to import as the rest of this module, and is seldom needed

    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
