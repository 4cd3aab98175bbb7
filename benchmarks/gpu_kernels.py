"""Each kernel's time and its share of the card's ceiling, as a record.

    python benchmarks/gpu_kernels.py --record gpu-kernels

The ceilings are measured in the same run: reading bandwidth (a reduction over 4 GB) and the bf16 matrix rate (8192 cubed),
which is higher for a few products after a rest than for many, when power limits the clock. Times are replays of CUDA
graphs over several sets of buffers, so that the cache helps no more than in a step. Bytes and operations are the least that
the work needs. Shapes: Qwen3-0.6B (16 query heads on 8 KV heads of 128), products of prompts also Qwen3-8B.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.attention.base import AttentionInputs, AttentionSpec, HeadNorm, Rotary
from nanovllm.attention.triton_paged import TritonAttention
from nanovllm.bench.record import write_record
from nanovllm.kernels import activation, one_token, rms_norm
from nanovllm.kernels.draw_token import draw_tokens
from nanovllm.kernels.draw_top_p import draw_within_top_p

HIDDEN, INTER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, PAGE = 1024, 3072, 151_936, 16, 8, 128, 64
MIN_BYTES = 400 << 20  # of all sets of buffers together: several times the L2 cache


@dataclass(frozen=True, slots=True)
class Row:
    kernel: str
    shape: str
    us: float
    megabytes: float
    gigaflops: float
    share: float  # of the nearer ceiling


class Table:
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.bandwidth, self.burst, self.rate = read_bandwidth(), burst_matrix_rate(), matrix_rate()
        rates = f"{self.rate / 1e12:.0f} TFLOP/s in bf16, {self.burst / 1e12:.0f} for a moment"
        print(f"{torch.cuda.get_device_name()}: reads {self.bandwidth / 1e12:.2f} TB/s, {rates}")

    def add(self, kernel: str, shape: str, calls: list[Callable[[], object]], num_bytes: float, flops: float = 0.0) -> None:
        us = graph_us(calls)
        floor = max(num_bytes / self.bandwidth, flops / self.rate) * 1e6
        row = Row(kernel, shape, round(us, 2), round(num_bytes / 1e6, 2), round(flops / 1e9, 2), round(floor / us, 3))
        self.rows.append(row)
        print(
            f"{kernel:<26}{shape:<30}{us:>10.1f} us{num_bytes / 1e6:>10.1f} MB{flops / 1e9:>10.1f} GF{row.share:>7.0%}",
            flush=True,
        )


def graph_us(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Median microseconds of one call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for number in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 2:
            times.append(begin.elapsed_time(end))
    return float(np.median(times)) * 1e3 / len(calls)


def read_bandwidth() -> float:
    values = torch.randn(1 << 30, device="cuda")  # 4 GiB
    return values.numel() * 4 / (graph_us([values.sum]) * 1e-6)


def matrix_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (graph_us([lambda: a @ b] * 4) * 1e-6)


def burst_matrix_rate(num_products: int = 10, repeats: int = 5) -> float:
    """Of ten products, about 15 ms, after a second of rest: the median."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    rates = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        time.sleep(1.0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(num_products):
            a @ b
        end.record()
        end.synchronize()
        rates.append(num_products * 2 * 8192**3 / (begin.elapsed_time(end) * 1e-3))
    return float(np.median(rates))


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sets(make: Callable[[], Callable[[], object]], num_bytes: float) -> list[Callable[[], object]]:
    return [make() for _ in range(max(2, min(64, int(MIN_BYTES // num_bytes) + 1)))]


def attention(table: Table) -> None:
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, PAGE)
    backend = TritonAttention(spec, torch.bfloat16, torch.device("cuda"))
    rng = np.random.default_rng(0)
    decodes = {
        "256 x 820": [820] * 256,
        "256 x 1,536": [1536] * 256,
        "256 ragged, 100 to 1,536": rng.integers(100, 1537, 256).tolist(),
        "128 x 1,024": [1024] * 128,
        "64 x 1,500": [1500] * 64,
        "32 x 1,000": [1000] * 32,
        "8 x 2,000": [2000] * 8,
        "1 x 1,024": [1024],
        "1 x 8,192": [8192],
    }
    for name, contexts in decodes.items():
        num_bytes = sum(contexts) * 2 * KV_HEADS * HEAD_DIM * 2
        table.add(
            "decode attention",
            name,
            sets(lambda c=contexts: attend(backend, [n - 1 for n in c], [1] * len(c)), num_bytes),
            num_bytes,
        )
    for count, length in ((4, 2048), (1, 8192), (1, 512)):
        flops = count * 4 * HEADS * HEAD_DIM * length * (length + 1) / 2
        num_bytes = count * length * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * 2
        table.add(
            "prompt attention",
            f"{count} x {length:,}",
            sets(lambda c=count, n=length: attend(backend, [0] * c, [n] * c), num_bytes),
            num_bytes,
            flops,
        )


def attend(backend: TritonAttention, starts: list[int], lengths: list[int]) -> Callable[[], object]:
    widths = [-(-(start + length) // PAGE) for start, length in zip(starts, lengths)]
    tables = torch.zeros(len(starts), max(widths), dtype=torch.int32)
    free = torch.randperm(sum(widths)).int().split(widths)
    for row, blocks in enumerate(free):
        tables[row, : len(blocks)] = blocks
    cache = torch.randn(backend.kv_cache_shape(sum(widths)), device="cuda", dtype=torch.bfloat16)
    query = bf16(sum(lengths), HEADS, HEAD_DIM)
    plan = backend.plan(AttentionInputs(starts, lengths, list(range(len(starts))), tables.cuda()))
    backend.reserve(len(plan.decode_items))
    return lambda: backend.attend(query, cache, plan)


def elementwise(table: Table) -> None:
    for n in (1, 256, 8192):
        num_bytes = 4 * n * HIDDEN * 2
        table.add("add + RMSNorm", f"{n} tokens", sets(lambda n=n: norm_call(n), num_bytes), num_bytes)
        num_bytes = 3 * n * INTER * 2
        table.add("SiLU x up", f"{n} tokens", sets(lambda n=n: silu_call(n), num_bytes), num_bytes)
        num_bytes = 2 * n * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2
        table.add("QK-norm, rotary, KV write", f"{n} tokens", sets(lambda n=n: rotary_call(n), num_bytes), num_bytes)


def norm_call(n: int) -> Callable[[], object]:
    x, residual, weight = bf16(n, HIDDEN), bf16(n, HIDDEN), bf16(HIDDEN)
    return lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-6)


def silu_call(n: int) -> Callable[[], object]:
    gate_up = bf16(n, 2 * INTER)
    return lambda: activation.silu_and_mul(gate_up)


def rotary_call(n: int) -> Callable[[], object]:
    backend = TritonAttention(AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, PAGE), torch.bfloat16, torch.device("cuda"))
    heads, cache = bf16(n, HEADS + 2 * KV_HEADS, HEAD_DIM), bf16(*backend.kv_cache_shape(-(-n // PAGE)))
    rotary = Rotary(bf16(n, 1, HEAD_DIM), bf16(n, 1, HEAD_DIM))
    norm, slots = HeadNorm(bf16(HEADS + KV_HEADS, HEAD_DIM), 1e-6), torch.randperm(n, device="cuda")
    return lambda: backend.rotate_and_store(heads, norm, rotary, cache, slots)


def products(table: Table) -> None:
    shapes = {"qkv": (4096, 1024), "o": (1024, 2048), "gate/up": (6144, 1024), "down": (1024, 3072), "head": (VOCAB, 1024)}
    for name, (n, k) in shapes.items():
        if name != "head":
            table.add(
                f"one token: {name}", f"1 x {k} x {n}", sets(lambda m=name, n=n, k=k: one_call(m, n, k), n * k * 2), n * k * 2
            )
        for rows in (1, 8, 64, 256):
            calls = sets(lambda r=rows, n=n, k=k: library_call(r, n, k), n * k * 2)
            table.add(f"library: {name}", f"{rows} x {k} x {n}", calls, n * k * 2, 2 * rows * n * k)


def prompt_products(table: Table) -> None:
    """Of Qwen3-8B, for prompts: bytes and operations take about as long, or operations longer."""
    shapes = {"qkv": (6144, 4096), "o": (4096, 4096), "gate/up": (24_576, 4096), "down": (4096, 12_288)}
    for name, (n, k) in shapes.items():
        for rows in (128, 256, 512, 1024, 4096):
            calls = sets(lambda r=rows, n=n, k=k: library_call(r, n, k), n * k * 2)
            table.add(f"library, 8B: {name}", f"{rows} x {k} x {n}", calls, n * k * 2, 2 * rows * n * k)


def one_call(name: str, n: int, k: int) -> Callable[[], object]:
    x, weight, norm, residual, gate_up = bf16(1, k), bf16(n, k) * 0.02, bf16(k), bf16(1, n), bf16(1, 2 * k)
    if name in ("qkv", "gate/up"):
        return lambda: one_token.norm_product(x, norm, 1e-6, weight)
    if name == "down":
        return lambda: one_token.silu_product_add(gate_up, weight, residual)
    return lambda: one_token.product_add(x, weight, residual)


def library_call(rows: int, n: int, k: int) -> Callable[[], object]:
    x, weight = bf16(rows, k), bf16(n, k) * 0.02
    return lambda: F.linear(x, weight)


def sampling(table: Table) -> None:
    for rows in (1, 64, 256):
        num_bytes = rows * VOCAB * 2
        table.add("sample, temperature", f"{rows} rows", sets(lambda r=rows: draw_call(r, 1.6), num_bytes), num_bytes)
        table.add("sample, greedy", f"{rows} rows", sets(lambda r=rows: draw_call(r, 0.0), num_bytes), num_bytes)
        table.add("sample, top-p 0.95", f"{rows} rows", sets(lambda r=rows: top_p_call(r), num_bytes), num_bytes)


def draw_call(rows: int, inverse: float) -> Callable[[], object]:
    logits, keys = bf16(rows, VOCAB), torch.randint(0, 2**31 - 1, (rows,), dtype=torch.int32, device="cuda")
    places, table = (
        torch.arange(rows, dtype=torch.int32, device="cuda"),
        torch.zeros(rows, rows, dtype=torch.int32, device="cuda"),
    )
    out, scale = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.full((rows,), inverse, device="cuda")
    return lambda: draw_tokens(logits, scale, keys, places, places, table, out)


def top_p_call(rows: int) -> Callable[[], object]:
    logits, keys = bf16(rows, VOCAB) * 3, torch.randint(0, 2**31 - 1, (rows,), dtype=torch.int32, device="cuda")
    scale, top_p = torch.full((rows, 1), 1.6, device="cuda"), torch.full((rows, 1), 0.95, device="cuda")
    return lambda: draw_within_top_p(logits, scale, top_p, None, keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in (attention, elementwise, products, prompt_products, sampling)}
    parser.add_argument("--parts", nargs="+", choices=parts, default=[*parts])
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    with torch.inference_mode():
        table = Table()
        for name in arguments.parts:
            parts[name](table)
    if arguments.record:
        ceilings = {
            "read_bytes_per_s": table.bandwidth,
            "bf16_flop_per_s": table.rate,
            "bf16_burst_flop_per_s": table.burst,
        }
        rows = [asdict(row) for row in table.rows]
        print(write_record(arguments.record, gpu=torch.cuda.get_device_name(), ceilings=ceilings, kernels=rows))


if __name__ == "__main__":
    main()
