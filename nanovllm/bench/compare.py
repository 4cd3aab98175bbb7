"""Two records: may they be compared, and is one faster?

First the boundaries: whatever was fixed must be equal in both, or the comparison is refused with the names of what
differs. Then the noise. The test is the exact Mann-Whitney rank test on the repeats of one figure, and the interval is the
one that belongs to it (Hodges-Lehmann): of all ratios B / A of single repeats, sorted, the middle ones. It assumes no
distribution, and one slow repeat moves it little. With few repeats it cannot promise much: the confidence that it really
has is told, and 3 repeats on each side reach 90 %, 4 reach 95 %. Faster or slower is said only when the whole interval
lies beyond `margin`, the difference that an A/A run shows too; equal only when it lies within 5 %; otherwise unclear, and
more repeats are needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from nanovllm.bench.results import HIGHER_IS_BETTER
from nanovllm.errors import ConfigError

BOUNDARIES = (
    "schema",
    "kind",
    "model",
    "precision",
    "max_model_len",
    "workload",
    "warmup",
    "num_requests",
    "settings",
    "environment.processor",
    "environment.cores",
    "environment.gpus",
)
FIGURES = (
    "output_tok_s",
    "goodput_per_s",
    "ttft_ms.p50",
    "ttft_ms.p99",
    "tpot_ms.p50",
    "tpot_ms.p99",
    "e2e_ms.p50",
    "joules_per_output_tok",
)
DEFAULT_MARGIN = 0.01  # a difference below this is not worth a verdict
EQUAL_WITHIN = 0.05  # "equal" promises that the difference is smaller than this
MIN_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    figure: str
    a: float  # medians of the repeats
    b: float
    ratio: float  # B / A
    low: float  # interval of the ratio
    high: float
    confidence: float  # that the interval has
    margin: float
    word: str  # of B against A: "faster", "slower", "equal", "unclear"

    def __str__(self) -> str:
        interval = f"{self.low:.3f} to {self.high:.3f} at {self.confidence:.0%}"
        return f"{self.figure:<16}{self.a:>12.2f}{self.b:>12.2f}  B/A {self.ratio:.3f} ({interval})  {self.word}"


def differing_boundaries(a: Mapping[str, Any], b: Mapping[str, Any], varied: Sequence[str] = ()) -> list[str]:
    """ "name: A's value, B's value" of everything fixed that is not equal. `varied`: what the experiment changed on purpose."""
    problems = []
    for name in BOUNDARIES:
        for path, left, right in _differences(name, _get(a, name), _get(b, name)):
            if not any(path == one or path.startswith(f"{one}.") for one in varied):
                problems.append(f"{path}: {_short(left)}, {_short(right)}")
    return problems


def _differences(path: str, left: Any, right: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        names = list(dict.fromkeys([*left, *right]))
        return [found for name in names for found in _differences(f"{path}.{name}", left.get(name), right.get(name))]
    return [] if left == right else [(path, left, right)]


def _get(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if path == "warmup" and isinstance(value, Mapping):
        value = {name: one for name, one in value.items() if name != "seconds"}  # measured, not chosen
    return value


def compare_records(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    varied: Sequence[str] = (),
    margin: float | None = None,
    margins: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """One verdict per figure that both have. Raises `ConfigError` when the comparison would mean nothing.

    `margins`: of single figures, from `noise_margin`.
    """
    if problems := differing_boundaries(a, b, varied):
        raise ConfigError("these records cannot be compared; they differ in\n  " + "\n  ".join(problems))
    for label, record in (("A", a), ("B", b)):
        if record.get("status") != "ok":
            raise ConfigError(f"record {label} is not of a good run: {record.get('status')}")
    return compare_tables(a["result_table"], b["result_table"], margin, margins)


def compare_tables(
    a: Mapping[str, Any], b: Mapping[str, Any], margin: float | None = None, margins: Mapping[str, float] | None = None
) -> list[Verdict]:
    names = [name for name in FIGURES if name in a and name in b]
    return [compare_figure(name, a[name]["repeats"], b[name]["repeats"], (margins or {}).get(name, margin)) for name in names]


def compare_figure(
    figure: str, a: Sequence[float], b: Sequence[float], margin: float | None = None, alpha: float = 0.05
) -> Verdict:
    """`margin` None: 1 %. Raises `ConfigError` for too few repeats."""
    if min(len(a), len(b)) < MIN_REPEATS:
        raise ConfigError(f"{figure}: {len(a)} and {len(b)} repeats; the noise is not known below {MIN_REPEATS} on each side")
    margin = DEFAULT_MARGIN if margin is None else margin
    if min(*a, *b) <= 0:  # goodput of zero, say: no ratio
        word = "equal" if list(a) == list(b) else "unclear"
        left, right = statistics.median(a), statistics.median(b)
        ratio = 1.0 if left == right else right / left if left else float("inf")
        return Verdict(figure, left, right, ratio, 0.0, float("inf"), 0.0, margin, word)
    low, high, confidence = ratio_interval(a, b, alpha)
    ratios = sorted(right / left for left in a for right in b)
    word = _word(low, high, margin, figure.split(".")[0] in HIGHER_IS_BETTER)
    return Verdict(
        figure, statistics.median(a), statistics.median(b), statistics.median(ratios), low, high, confidence, margin, word
    )


def _word(low: float, high: float, margin: float, is_higher_better: bool) -> str:
    """Beyond the margin on one side: a verdict. Within the tolerance on both: equal. Else the data cannot tell."""
    if low > 1 + margin:
        return "faster" if is_higher_better else "slower"
    if high < 1 / (1 + margin):
        return "slower" if is_higher_better else "faster"
    tolerance = max(EQUAL_WITHIN, margin)
    return "equal" if low >= 1 / (1 + tolerance) and high <= 1 + tolerance else "unclear"


def ratio_interval(a: Sequence[float], b: Sequence[float], alpha: float = 0.05) -> tuple[float, float, float]:
    """(low, high, confidence) of the ratio B / A.

    Of the m * n ratios, as many are dropped at each end as the rank test allows at level `alpha`; at least none, and then
    the confidence is what the smallest and the largest have.

        m = n = 4: 70 orders; U = 0 has probability 1 / 70, so both ends together 2.9 %: no ratio is dropped at 95 %
    """
    ratios = sorted(right / left for left in a for right in b)
    counts, total = rank_sums(len(a), len(b)), comb(len(a) + len(b), len(a))
    num_dropped, tail = 0, counts[0]
    while 2 * (tail + counts[num_dropped + 1]) <= alpha * total and num_dropped + 1 < len(ratios) // 2:
        num_dropped += 1
        tail += counts[num_dropped]
    return ratios[num_dropped], ratios[-1 - num_dropped], 1 - 2 * tail / total


def rank_sums(m: int, n: int) -> list[int]:
    """How many of the orders of m + n values have the Mann-Whitney U = 0, 1, ... m * n."""
    table = [[[0] * (m * n + 1) for _ in range(n + 1)] for _ in range(m + 1)]
    for i in range(m + 1):
        for j in range(n + 1):
            for u in range(i * j + 1):
                if i == 0 or j == 0:
                    table[i][j][u] = 1 if u == 0 else 0
                else:  # the largest value is of the first kind and beats all j of the second, or is of the second
                    table[i][j][u] = (table[i - 1][j][u - j] if u >= j else 0) + table[i][j - 1][u]
    return table[m][n]


def noise_margin(a: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, float]:
    """From two records of the same thing: how far each figure's medians lie apart; at least the default margin."""
    margins = {}
    for verdict in compare_records(a, again):
        margins[verdict.figure] = max(DEFAULT_MARGIN, abs(verdict.ratio - 1))
    return margins


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
