"""nano-vllm's benchmark: 256 requests of random tokens, prompts and outputs of 100 to 1,024 tokens, seed 0.

    python bench.py                         # the embedded model, scaled to a CPU: 16 requests, lengths / 8
    python bench.py --model DIR --full      # as the original
    python bench.py --requests 64 --divide-lengths 4 --record my-machine

Prints what was *produced*, never what was asked for. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

from nanovllm import LLM, SamplingParams
from nanovllm.bench.record import write_record
from nanovllm.workloads import make_workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, file or hub id; default: the embedded model")
    parser.add_argument("--full", action="store_true", help="256 requests at full length")
    parser.add_argument("--requests", type=int, help="default: 16")
    parser.add_argument("--divide-lengths", type=int, help="default: 8")
    parser.add_argument("--record", metavar="NAME", help="also write benchmarks/records/<date>-NAME.json")
    arguments = parser.parse_args()
    num_requests, divide = arguments.requests or 16, arguments.divide_lengths or 8
    if arguments.full:
        if arguments.requests or arguments.divide_lengths:
            parser.error("--full decides --requests and --divide-lengths")
        num_requests, divide = 256, 1
    if num_requests < 1 or divide < 1:
        parser.error("--requests and --divide-lengths must be at least 1")

    start = time.perf_counter()
    llm = LLM(arguments.model)
    startup_s = time.perf_counter() - start
    print(llm.memory_plan.describe())
    lengths = {"shortest": max(100 // divide, 1), "longest": max(1024 // divide, 2)}
    workload = make_workload("nano-vllm", num_requests=num_requests, **lengths)
    prompts = [list(one.prompt) for one in workload.requests]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=one.num_output) for one in workload.requests]
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)  # warm up
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start

    result = {
        "requests": num_requests,
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(sum(len(output.token_ids) for output in outputs) / seconds, 1),
        "startup_s": round(startup_s, 2),
        "model": llm.spec.architecture,
        "dtype": llm.config.dtype,
    }
    if arguments.record:
        result["record"] = str(
            write_record(
                arguments.record, workload={"seed": 0, "requests": num_requests, "divide_lengths": divide}, result=result
            )
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
