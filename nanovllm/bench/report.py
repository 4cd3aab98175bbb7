"""Records as a report: `report.md` with plots beside it, and `report.html` that holds everything and needs no network.

Says first what was fixed, then the figures with the spread of their repeats, then plots; what failed is a line of the
table. The names of the figures are the fields of the record's `result_table`. Deterministic: the same records give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nanovllm.bench.compare import compare_records, differing_boundaries
from nanovllm.bench.load import Row
from nanovllm.bench.plots import distribution_plot, repeats_plot
from nanovllm.bench.results import LATENCIES
from nanovllm.errors import ConfigError

Item = tuple[str, Mapping[str, Any], Sequence[Row]]  # name, record, its rows
Table = tuple[str, list[str], list[list[str]]]  # title, head, lines
FIGURES = (
    ("output_tok_s", "output tokens/s"),
    ("requests_per_s", "requests/s"),
    ("ttft_ms.p50", "TTFT p50, ms"),
    ("ttft_ms.p90", "TTFT p90, ms"),
    ("ttft_ms.p99", "TTFT p99, ms"),
    ("tpot_ms.p50", "TPOT p50, ms"),
    ("tpot_ms.p99", "TPOT p99, ms"),
    ("itl_ms.p50", "ITL p50, ms"),
    ("itl_ms.p99", "ITL p99, ms"),
    ("e2e_ms.p50", "end to end p50, ms"),
    ("e2e_ms.p99", "end to end p99, ms"),
    ("goodput_per_s", "requests/s within the SLO"),
    ("slo_attainment", "share within the SLO"),
    ("cost_per_million_output_tok", "cost per million output tokens"),
    ("joules_per_output_tok", "joules per output token"),
    ("failed", "failed requests"),
    ("lag_ms.p99", "client's lag p99, ms"),
)
TITLES = {
    "ttft_ms": "Time to first token",
    "tpot_ms": "Time per output token",
    "itl_ms": "Between tokens",
    "e2e_ms": "End to end",
}
STYLE = """body{font:15px/1.5 sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:3px 9px;text-align:right}
td:first-child,th:first-child{text-align:left}th{background:#f3f3f3}.plots{display:flex;flex-wrap:wrap;gap:12px}
.fixed td{text-align:left;overflow-wrap:anywhere}
.fixed td:first-child{white-space:nowrap;overflow-wrap:normal}"""


def write_report(items: Sequence[Item], folder: Path) -> list[Path]:
    """Returns the paths of the Markdown and the HTML file."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, plots = (
        [_boundary_table(items), _figure_table(items), *_ttft_tables(items), *_verdicts(items), *_tenant_tables(items)],
        _plots(items),
    )
    for name, svg in plots:
        (folder / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(_markdown(tables, [name for name, _ in plots]), encoding="utf-8")
    page.write_text(_html(tables, [svg for _, svg in plots]), encoding="utf-8")
    return [markdown, page]


def _boundary_table(items: Sequence[Item]) -> Table:
    lines = []
    for label, text_of in (
        ("model", lambda one: f"{one['model']}, {one['precision']}, context {one['max_model_len']:,}"),
        ("workload", lambda one: f"{one['workload']['name']}, seed {one['workload']['seed']}, {one['workload']['checksum']}"),
        ("parameters", lambda one: ", ".join(f"{key}={value}" for key, value in one["workload"]["parameters"].items())),
        ("requests", lambda one: f"{one['num_requests']} x {len(one['seconds'])} repeats"),
        ("tokens", lambda one: f"{_range(one['workload']['input_tokens'])} in, {_range(one['workload']['output_tokens'])} out"),
        ("warm-up", lambda one: f"{one['warmup']['repeats']} x {one['warmup']['requests']} requests, not counted"),
        ("SLO", lambda one: ", ".join(f"{key}={value:g}" for key, value in one["settings"].get("slo", {}).items()) or "none"),
        ("machine", lambda one: "; ".join([*one["environment"]["gpus"], one["environment"]["processor"]])),
        ("commit", lambda one: one["environment"]["commit"][:12] + (" and changes" if one["environment"]["dirty"] else "")),
        ("time", lambda one: one["environment"]["time"]),
        ("command", lambda one: one["command"]),
        ("note", lambda one: one.get("note") or ""),
        ("status", lambda one: one["status"]),
    ):
        cells = [text_of(record) for _, record, _ in items]
        if any(cells):
            lines.append([label, *cells])
    return "What was fixed", ["", *(name for name, _, _ in items)], lines


def _range(tokens: Mapping[str, float]) -> str:
    return f"{tokens['min']:g}" if tokens["min"] == tokens["max"] else f"{tokens['min']:g} to {tokens['max']:g}"


def _figure_table(items: Sequence[Item]) -> Table:
    tables = [record["result_table"] for _, record, _ in items]
    lines = [
        [title, *(_figure(table.get(name)) for table in tables)]
        for name, title in FIGURES
        if any(name in table for table in tables)
    ]
    return "Figures: median of the repeats (their spread)", ["", *(name for name, _, _ in items)], lines


def _figure(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return "-"
    return (
        f"{line['median']:,.4g} ({line['spread']:.1%})"
        if abs(line["median"]) < 1000
        else f"{line['median']:,.0f} ({line['spread']:.1%})"
    )


def _ttft_tables(items: Sequence[Item]) -> list[Table]:
    """Where the mean TTFT of each record's last repeat went, for those whose server told."""
    told = [(name, record["server"][-1]) for name, record, _ in items if record.get("server")]
    told = [(name, one) for name, one in told if "ttft_ms" in one]
    if not told:
        return []
    names = list(dict.fromkeys(part for _, one in told for part in one.get("ttft_parts_ms", {})))
    lines = [[part.replace("_", " "), *(_or_dash(one.get("ttft_parts_ms", {}).get(part)) for _, one in told)] for part in names]
    lines += [["the server's TTFT", *(_or_dash(one["ttft_ms"]) for _, one in told)]]
    lines += [["HTTP path and client", *(_or_dash(one["http_ms"]) for _, one in told)]]
    return [("Where the mean TTFT went, ms", ["", *(name for name, _ in told)], lines)]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _tenant_tables(items: Sequence[Item]) -> list[Table]:
    tables = []
    for name, record, _ in items:
        if tenants := record.get("tenants"):
            lines = [[title, *(f"{one[key]:,.4g}" if key in one else "-" for one in tenants.values())] for key, title in FIGURES]
            tables.append((f"Tenants of {name}, last repeat", ["", *tenants], [line for line in lines if set(line[1:]) != {"-"}]))
    return tables


def _verdicts(items: Sequence[Item]) -> list[Table]:
    """Of each record against the first, or why there is none."""
    tables = []
    for name, record, _ in items[1:]:
        first = items[0][1]
        title = f"{name} against {items[0][0]}"
        if differing := differing_boundaries(first, record):
            tables.append((f"{title}: not comparable", ["what differs"], [[one] for one in differing]))
            continue
        try:
            verdicts = compare_records(first, record)
        except ConfigError as error:
            tables.append((f"{title}: no verdict", ["why"], [[str(error)]]))
            continue
        lines = [[v.figure, f"{v.ratio:.3f}", f"{v.low:.3f} to {v.high:.3f}", f"{v.confidence:.0%}", v.word] for v in verdicts]
        tables.append((f"{title} (rank test on the repeats)", ["", "ratio", "interval", "confidence", "verdict"], lines))
    return tables


def _plots(items: Sequence[Item]) -> list[tuple[str, str]]:
    throughput = [(name, record["result_table"]["output_tok_s"]["repeats"]) for name, record, _ in items]
    plots = [("throughput", repeats_plot("Output tokens per second, each repeat", "tokens/s", throughput))]
    for key, values_of in LATENCIES.items():
        series = [(name, [value for row in rows if not row.error for value in values_of(row)]) for name, _, rows in items]
        if any(values for _, values in series):
            plots.append((key.removesuffix("_ms"), distribution_plot(TITLES[key], "ms; share of values up to here", series)))
    return plots


def _markdown(tables: Sequence[Table], plots: Sequence[str]) -> str:
    parts = ["# Benchmark report"]
    for title, head, lines in tables:
        rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        parts.append(
            f"## {title}\n\n" + "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        )
    parts.append("## Plots\n\n" + "\n".join(f"![{name}]({name}.svg)" for name in plots))
    return "\n\n".join(parts) + "\n"


def _html(tables: Sequence[Table], plots: Sequence[str]) -> str:
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmark report</title>', f"<style>{STYLE}</style>"]
    parts.append("<h1>Benchmark report</h1>")
    for number, (title, head, lines) in enumerate(tables):
        if number == 2:  # after what was fixed and the figures
            parts.append(_plots_section(plots))
        rows = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
        rows += ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
        kind = ' class="fixed"' if number == 0 else ""
        parts.append(f"<h2>{escape(title)}</h2><table{kind}>" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table>")
    if len(tables) == 2:
        parts.append(_plots_section(plots))
    return "\n".join([*parts, "</html>"]) + "\n"


def _plots_section(plots: Sequence[str]) -> str:
    return '<h2>Plots</h2><div class="plots">' + "\n".join(plots) + "</div>"
