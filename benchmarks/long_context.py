"""One stream at several lengths of context on a CPU, with one thread and with all, by turns: do threads share a long row?

    python benchmarks/long_context.py --record cpu-long-context

The embedded model, random prompts (seed 0), greedy; milliseconds of a decoding step, the median of each turn. Engines take
turns of 16 steps, so that a slow moment of the machine does not hit one of them alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from random import Random

from nanovllm import LLM, SamplingParams
from nanovllm.bench.record import summary, write_record
from nanovllm.engine.llm_engine import LLMEngine

STEPS_PER_TURN = 16


def decoding_engine(llm: LLM, num_context: int, num_steps: int) -> LLMEngine:
    """With one sequence whose prompt is computed and which draws at least `num_steps` tokens more."""
    rng = Random(0)
    prompt = [rng.randrange(1000, 49_000) for _ in range(num_context)]
    params = SamplingParams(temperature=0, max_tokens=num_steps + 2, ignore_eos=True)
    llm.engine.add_request(prompt, params)
    num_drawn = 0
    while num_drawn < 1:
        num_drawn += sum(len(output.token_ids) for output in llm.engine.step())
    return llm.engine


def turn(engine: LLMEngine) -> float:
    times = []
    for _ in range(STEPS_PER_TURN):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 4096, 7168])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cpu-compute", default="auto")
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    counts = sorted({1, len(os.sched_getaffinity(0))})
    for num_context in arguments.contexts:
        options = {"cpu_compute": arguments.cpu_compute, "max_num_seqs": 1, "enable_prefix_caching": False}
        llms = {count: LLM(num_threads=count, **options) for count in counts}
        engines = {count: decoding_engine(llm, num_context, arguments.turns * STEPS_PER_TURN) for count, llm in llms.items()}
        times: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(arguments.turns):
            for count, engine in engines.items():
                times[count].append(turn(engine))
        results[str(num_context)] = {f"threads_{count}": summary(values) for count, values in times.items()}
        print(num_context, {count: round(statistics.median(values), 2) for count, values in times.items()}, flush=True)
        for llm in llms.values():
            llm.close()
    if arguments.record:
        workload = {"model": "embedded", "seed": 0, "streams": 1, "cpu_compute": arguments.cpu_compute}
        print(write_record(arguments.record, unit="milliseconds a decoding step", workload=workload, results=results))


if __name__ == "__main__":
    main()
