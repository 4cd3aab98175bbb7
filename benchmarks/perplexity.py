"""Perplexity of one fixed text for every form of computing on a CPU: what dynamic int8 and 4-bit weights cost in quality.

    python benchmarks/perplexity.py --record cpu-perplexity
    python benchmarks/perplexity.py --computes torch int8 --text book.txt --max-tokens 4096

The text is cut into windows of 512 tokens; each window is a prompt of its own, whose log-probabilities the engine
returns. Perplexity = exp(-mean log-probability). The row "torch" is float32 throughout: the others are compared with it.
Differences are meaningful, absolute values are not: the model may know a text, or a text may be odd.

tests/data/newton_opticks.txt is the beginning of Isaac Newton's Opticks, fourth edition, London 1730, in the public domain:
21,473 tokens of SmolLM2. It is the copy of Distributed Proofreaders that comes with libbacktrace and so with the PyPI package
apache-tvm-ffi (Isaac.Newton-Opticks.txt), with lines joined to paragraphs, and without marks of italics and illustrations.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

COMPUTES = ("torch", "bf16", "int8", "int4")
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "tests/data/newton_opticks.txt")
    parser.add_argument("--max-tokens", type=int, default=20_480)
    parser.add_argument("--computes", nargs="+", default=list(COMPUTES), choices=COMPUTES)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    from nanovllm import LLM
    from nanovllm.bench.record import write_record

    text, results = arguments.text.read_text(encoding="utf-8"), {}
    num_tokens = 0
    for compute in arguments.computes:
        with LLM(arguments.model, dtype="float32", cpu_compute=compute, max_model_len=WINDOW + 1, num_kv_blocks=160) as llm:
            token_ids = llm.tokenizer.encode(text)[: arguments.max_tokens]
            started = time.perf_counter()
            logprobs = score(llm, token_ids)
            num_tokens = len(logprobs)
            results[compute] = {"perplexity": math.exp(-sum(logprobs) / num_tokens), "seconds": time.perf_counter() - started}
        row, base = results[compute]["perplexity"], results[arguments.computes[0]]["perplexity"]
        print(f"{compute:<8}{row:>10.4f}{100 * (row / base - 1):>+9.2f} %  {num_tokens} tokens", flush=True)
    print("load average", [round(load, 1) for load in os.getloadavg()])
    if arguments.record:
        workload = {"text": arguments.text.name, "tokens": num_tokens, "window": WINDOW}
        print(write_record(arguments.record, unit="perplexity", workload=workload, options={}, results=results))


def score(llm, token_ids: list[int]) -> list[float]:
    """Of every token but the first of each window."""
    from nanovllm import SamplingParams

    windows = [token_ids[i : i + WINDOW] for i in range(0, len(token_ids), WINDOW)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([window for window in windows if len(window) > 1], params, use_tqdm=False)
    return [position.chosen.logprob for output in outputs for position in output.prompt_logprobs if position is not None]


if __name__ == "__main__":
    main()
