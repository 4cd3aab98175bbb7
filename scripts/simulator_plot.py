"""The picture of docs/simulator.md: latency against load on one simulated H200, as SVG. Standard library only.

python scripts/simulator_plot.py docs/images/simulator-load.svg
"""

from __future__ import annotations

import sys
from math import log10
from pathlib import Path

from nanovllm.simulation.command import SimulateOptions, simulate_options

RATES = (5, 10, 15, 20, 25, 30, 35, 40, 45)  # requests per second
OBJECTIVE_MS = 200
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 85, 60, 30, 60
LOW, HIGH = 0, 4  # powers of ten of the axis of time, milliseconds
CURVES = (("TTFT p50", "#1b6ca8", ""), ("TTFT p99", "#1b6ca8", "6 4"), ("TPOT p50", "#c8553d", ""))


def measure() -> dict[str, list[float]]:
    """Milliseconds of each curve, by rate."""
    points: dict[str, list[float]] = {name: [] for name, *_ in CURVES}
    for rate in RATES:
        workload = f"poisson:rate={rate},num_requests={20 * rate},num_input=1024,num_output=128"
        result = simulate_options(SimulateOptions(model="qwen3-8b", workload=workload))["result"]
        for name in points:
            metric, q = name.lower().split()
            points[name].append(result[f"{metric}_ms"][q])
    return points


def x_of(rate: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * rate / RATES[-1]


def y_of(milliseconds: float) -> float:
    share = (log10(milliseconds) - LOW) / (HIGH - LOW)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, max(0.0, share))


def text(x: float, y: float, words: str, anchor: str = "middle", color: str = "#333", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" {more}>{words}</text>'


def draw(points: dict[str, list[float]]) -> str:
    parts = [
        text(LEFT, 24, "Qwen3-8B on one simulated H200: prompts of 1,024 tokens, answers of 128", "start", more='font-size="15"')
    ]
    for power in range(LOW, HIGH + 1):
        y = y_of(10**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, f"{10**power:,} ms", "end"))
    for rate in (0, *RATES[1::2]):
        parts.append(text(x_of(rate), HEIGHT - BOTTOM + 20, str(rate)))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16, "requests per second (Poisson)"))
    y = y_of(OBJECTIVE_MS)
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2a9d55" stroke-dasharray="2 3"/>')
    parts.append(text(LEFT + 6, y - 6, f"objective: {OBJECTIVE_MS} ms to the first token", "start", "#2a9d55"))
    for number, (name, color, dash) in enumerate(CURVES):
        path = " ".join(f"{x_of(rate):.1f},{y_of(value):.1f}" for rate, value in zip(RATES, points[name]))
        style = f'fill="none" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {style}/>')
        x = LEFT + 20 + 120 * number
        parts.append(f'<line x1="{x}" x2="{x + 30}" y1="40" y2="40" {style}/>')
        parts.append(text(x + 36, 44, name, "start", color))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    points = measure()
    print(points)
    Path(sys.argv[1]).write_text(draw(points), encoding="utf-8")
