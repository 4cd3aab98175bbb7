"""Two plots as SVG text: distributions of latencies, and repeats as dots. No library, and readable in any browser.

Every plot is a function of its data alone, so a report made twice is equal byte for byte. Colours are chosen to differ for
the colour-blind too (Okabe and Ito).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 34, 46  # margins around the axes
MAX_POINTS = 200  # of one curve


def distribution_plot(title: str, unit: str, series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """For each series the share of values up to x; the axis of x is logarithmic where values span more than a factor 20."""
    values = [value for _, own in series for value in own if value > 0] or [1.0]
    axis = Axis(min(values), max(values), is_log=max(values) > 20 * min(values), start=LEFT, end=WIDTH - RIGHT)
    share = Axis(0.0, 1.0, is_log=False, start=HEIGHT - BOTTOM, end=TOP, is_tight=True)
    parts = [_frame(title, unit, axis, share, [(one, f"{one:.0%}") for one in (0, 0.25, 0.5, 0.75, 1)])]
    for number, (name, own) in enumerate(series):
        ordered = sorted(own)
        places = sorted({round(i * (len(ordered) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)} if ordered else ())
        points = " ".join(f"{axis.at(ordered[i]):.1f},{share.at((i + 1) / len(ordered)):.1f}" for i in places)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(number)}" stroke-width="2"/>')
        parts.append(_legend(len(series) - 1 - number, name, _colour(number)))
    return _svg(parts, HEIGHT)


def repeats_plot(title: str, unit: str, series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One line per series: a dot per repeat, a stroke at the median. The axis begins at zero: small differences look small."""
    height = TOP + BOTTOM + 34 * len(series)
    axis = Axis(0.0, max((value for _, own in series for value in own), default=1.0), is_log=False, start=180, end=WIDTH - RIGHT)
    parts = [_frame(title, unit, axis, Axis(0, 1, is_log=False, start=height - BOTTOM, end=TOP, is_tight=True), [])]
    for number, (name, own) in enumerate(series):
        y, ordered = TOP + 17 + 34 * number, sorted(own)
        median = axis.at((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)
        parts.append(f'<text x="172" y="{y + 4}" text-anchor="end">{escape(_shorten(name, 26))}</text>')
        parts.append(
            f'<line x1="{median:.1f}" x2="{median:.1f}" y1="{y - 10}" y2="{y + 10}" stroke="{_colour(number)}" stroke-width="3"/>'
        )
        parts += [f'<circle cx="{axis.at(v):.1f}" cy="{y}" r="4" fill="{_colour(number)}" fill-opacity="0.5"/>' for v in own]
    return _svg(parts, height)


class Axis:
    """Values to pixels, with ticks at round numbers."""

    def __init__(self, low: float, high: float, *, is_log: bool, start: float, end: float, is_tight: bool = False) -> None:
        self.is_log, self.start, self.end = is_log, start, end
        if is_log:
            self.low, self.high = log10(low), log10(high)
            self.ticks = [digit * 10.0**power for power in range(floor(self.low), ceil(self.high)) for digit in (1, 2, 5)]
        else:
            step = _round_step((high - low) / 5 or abs(high) / 5 or 1.0)
            self.low = low if is_tight else floor(low / step) * step
            self.high = high if is_tight else max(ceil(high / step), floor(low / step) + 1) * step
            self.ticks = [self.low + number * step for number in range(round((self.high - self.low) / step) + 1)]
        self.ticks = [tick for tick in self.ticks if -0.001 <= self._share(tick) <= 1.001]

    def _share(self, value: float) -> float:
        place = log10(value) if self.is_log else value
        return (place - self.low) / (self.high - self.low)

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, max(0.0, self._share(max(value, 1e-9))))


def _round_step(step: float) -> float:
    power = 10.0 ** floor(log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * 0.999)


def _frame(title: str, unit: str, x: Axis, y: Axis, y_ticks: Sequence[tuple[float, str]]) -> str:
    bottom = y.start
    parts = [f'<text x="{x.start}" y="18" class="title">{escape(title)}</text>']
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.end}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,g}</text>')
    for tick, text in y_ticks:
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}" class="grid"/>')
        parts.append(f'<text x="{x.start - 6}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text x="{(x.start + x.end) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(unit)}</text>')
    return "\n".join(parts)


def _legend(line: int, name: str, colour: str) -> str:
    """Lower right, where a distribution is rarely; lines count from below."""
    y = HEIGHT - BOTTOM - 12 - 16 * line
    text = f'<text x="{WIDTH - RIGHT - 20}" y="{y + 4}" text-anchor="end" class="halo">{escape(_shorten(name, 40))}</text>'
    ends = f'x1="{WIDTH - RIGHT - 16}" x2="{WIDTH - RIGHT - 2}" y1="{y}" y2="{y}"'
    return text + f'<line {ends} stroke="{colour}" stroke-width="3"/>'


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _svg(parts: Sequence[str], height: int) -> str:
    style = (
        "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.grid{stroke:#ddd}"
        ".halo{paint-order:stroke;stroke:#fff;stroke-width:3px}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
    return "\n".join(
        [head, f"<style>{style}</style>", f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *parts, "</svg>"]
    )
