"""Products of the compiled step on this processor: billions of operations a second by rows, weights, instruction set, threads.

    python benchmarks/cpu_products.py --record cpu-products
    python benchmarks/cpu_products.py --sets amx avx512-bf16 --threads 1 16 --rows 1 16 512 --matrices 8

y = x W^T of [rows, in] by [out, in] through `nanovllm_multiply`, so with all that a product needs: activations are rounded
to what the weights ask for, results are written as float32. A multiplication and an addition are two operations. Instruction
sets take turns, so that a slow moment of the machine does not hit one of them alone. One matrix stays in a cache; with
--matrices N every call takes the next of N, so that weights come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import os
import statistics
import time

import torch

from nanovllm.bench.record import summary, write_record
from nanovllm.kernels.cpu.build import available_instruction_sets, load_step
from nanovllm.kernels.cpu.library import Layer, Matrix, Model, address, declare
from nanovllm.kernels.cpu.packing import PackedMatrix, pack_bfloat16, pack_int4_group, pack_int8_group

PACKERS = {"bf16": pack_bfloat16, "int8": pack_int8_group, "int4": pack_int4_group}


def copies(matrix: PackedMatrix, count: int) -> list[PackedMatrix]:
    """The same values in memory of their own."""
    return [copy.deepcopy(matrix) for _ in range(count)]


class Multiplier:
    """One instruction set with its threads."""

    def __init__(self, instruction_set: str, num_threads: int) -> None:
        library = load_step(instruction_set)
        if library is None:
            raise SystemExit(f"{instruction_set} could not be built")
        self.library = declare(library)
        self.handle = library.nanovllm_create(ctypes.byref(Model(layers=(Layer * 0)())), num_threads)

    def close(self) -> None:
        self.library.nanovllm_destroy(self.handle)

    def operations_per_ns(self, matrices: list[Matrix], x: torch.Tensor, y: torch.Tensor, seconds: float) -> float:
        """Over as many calls as fit into `seconds`, one at least; the first call is not counted."""
        multiply, handle, num_rows = self.library.nanovllm_multiply, self.handle, len(x)
        calls = itertools.cycle([(handle, ctypes.byref(matrix), address(x), num_rows, address(y)) for matrix in matrices])
        multiply(*next(calls))
        num_calls, start = 0, time.perf_counter()
        while num_calls == 0 or time.perf_counter() - start < seconds:
            multiply(*next(calls))
            num_calls += 1
        elapsed = time.perf_counter() - start
        return 2 * num_calls * num_rows * x.shape[1] * y.shape[1] / elapsed / 1e9


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = available_instruction_sets()
    parser.add_argument("--sets", nargs="+", choices=sets, default=[name for name in sets if name != "portable"] or sets)
    parser.add_argument("--weights", nargs="+", choices=list(PACKERS), default=list(PACKERS))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 128, 512])
    parser.add_argument("--size", type=int, nargs=2, default=[4096, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--matrices", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one measurement")
    parser.add_argument("--record", metavar="NAME")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, weights: str, num_threads: int) -> dict[str, dict[str, object]]:
    """{set: {rows: summary}}."""
    num_out, num_in = arguments.size
    generator = torch.Generator().manual_seed(0)
    packed = copies(PACKERS[weights](torch.randn(num_out, num_in, generator=generator)), arguments.matrices)
    matrices = [Matrix.of(one) for one in packed]
    multipliers = {name: Multiplier(name, num_threads) for name in arguments.sets}
    results: dict[str, dict[str, object]] = {name: {} for name in arguments.sets}
    for num_rows in arguments.rows:
        x, y = torch.randn(num_rows, num_in, generator=generator), torch.empty(num_rows, num_out)
        speeds: dict[str, list[float]] = {name: [] for name in arguments.sets}
        for _ in range(arguments.turns):
            for name, one in multipliers.items():
                speeds[name].append(one.operations_per_ns(matrices, x, y, arguments.seconds))
        for name, values in speeds.items():
            results[name][f"rows_{num_rows}"] = summary(values)
    for one in multipliers.values():
        one.close()
    for name, by_rows in results.items():
        medians = [statistics.median(one["repeats"]) for one in by_rows.values()]  # type: ignore[index]
        print(f"{weights:5} {num_threads:3} threads {name:12}", *(f"{value:9.1f}" for value in medians), flush=True)
    return results


def main() -> None:
    arguments = parse()
    print("GOP/s by rows".ljust(30), *(f"{rows:9}" for rows in arguments.rows))
    results = {
        weights: {f"threads_{count}": measure(arguments, weights, count) for count in arguments.threads}
        for weights in arguments.weights
    }
    if arguments.record:
        out_in = dict(zip(("out", "in"), arguments.size, strict=True))
        workload = {**out_in, "matrices": arguments.matrices, "seconds": arguments.seconds, "seed": 0}
        print(write_record(arguments.record, unit="1e9 operations a second", workload=workload, results=results))


if __name__ == "__main__":
    main()
