"""What structured output costs: a step with grammars beside one without, and the parts of a token.

    python benchmarks/grammar_cost.py [--model FOLDER] [--sequences 1 8] [--tokens 64] [--repeats 3] [--record NAME]

Runs the same seeded prompts at temperature 0.7 with every form and without one, by turns. `step_ms`: wall-clock time of a
whole generation over its steps, median of the repeats (start them on a quiet machine). `mask_us`, `accept_us`: processor
time a token, from one more run that measures every call. `host_ms`: time of a fixed piece of Python after each run without a
grammar; where others use the same cores it varies by two. Any model with a tokenizer that knows the letters of JSON will do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

from nanovllm import LLM, SamplingParams, StructuredOutput
from nanovllm.bench.record import write_record
from nanovllm.engine.progress import few_full_collections
from nanovllm.structured.llguidance_backend import LLGuidanceMatcher
from nanovllm.structured.mask_budget import MaskBudget

FORMS = {
    "none": None,
    "json_object": StructuredOutput("json_object"),
    "json_schema": StructuredOutput(
        "json_schema",
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer", "minimum": 0, "maximum": 130},
                "tags": {"type": "array", "items": {"type": "string"}, "minItems": 8},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        },
    ),
    "regex": StructuredOutput("regex", r"([0-9]{4}-[0-9]{2}-[0-9]{2} [a-z]+\n)*"),
    "counted_regex": StructuredOutput("regex", r"([A-Z][a-z]{1,11} ){40,}"),  # each word and letter is a state of its own
    "grammar": StructuredOutput("grammar", 'start: NUM ("+" NUM){30,}\nNUM: /[0-9]{1,3}/'),
}


def step_ms(llm: LLM, structured: StructuredOutput | None, num_sequences: int, num_tokens: int) -> float:
    grammar = llm.engine._door._grammar
    grammar._budget = MaskBudget(num_threads=grammar._budget.num_threads)  # type: ignore  # nobody pays for the form before
    params = [
        SamplingParams(temperature=0.7, seed=seed, max_tokens=num_tokens, ignore_eos=True, structured=structured)
        for seed in range(num_sequences)
    ]
    for index, one in enumerate(params):
        llm.engine.add_request(f"Person number {index} as JSON:", one)
    started = time.perf_counter()
    while llm.engine.has_work:
        llm.engine.step()
    return (time.perf_counter() - started) * 1000 / num_tokens


def parts_us(llm: LLM, structured: StructuredOutput, num_sequences: int, num_tokens: int) -> dict[str, float]:
    """Medians of the processor time of a call, all of them by the engine's thread."""
    budget = llm.engine._door._grammar._budget  # type: ignore[union-attr]
    num_threads, budget.num_threads = budget.num_threads, 1  # which the run takes over
    times: dict[str, list[float]] = defaultdict(list)
    originals = {name: getattr(LLGuidanceMatcher, name) for name in ("fill_mask", "accept")}

    def timed(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return originals[name](*arguments)
            finally:
                times[name].append(time.thread_time() - started)

        return call

    try:
        for name in originals:
            setattr(LLGuidanceMatcher, name, timed(name))
        step_ms(llm, structured, num_sequences, num_tokens)
    finally:
        llm.engine._door._grammar._budget = MaskBudget(num_threads=num_threads)  # type: ignore[union-attr]
        for name, original in originals.items():
            setattr(LLGuidanceMatcher, name, original)
    return {
        "mask_us": round(statistics.median(times["fill_mask"]) * 1e6, 1),
        "accept_us": round(statistics.median(times["accept"]) * 1e6, 1),
    }


def host_ms() -> float:
    started, total = time.perf_counter(), 0
    for number in range(100_000):
        total += number
    return (time.perf_counter() - started) * 1000


@few_full_collections()  # as in `LLM.generate` and in a server
def measure(llm: LLM, num_sequences: int, arguments: argparse.Namespace) -> dict[str, Any]:
    steps: dict[str, list[float]] = defaultdict(list)
    host: list[float] = []
    for repeat in range(arguments.repeats + 1):  # the first compiles and fills caches
        for name, structured in FORMS.items():
            milliseconds = step_ms(llm, structured, num_sequences, arguments.tokens)
            if repeat:
                steps[name].append(milliseconds)
            if repeat and structured is None:
                host.append(round(host_ms(), 2))
    without = statistics.median(steps["none"])
    rows: dict[str, Any] = {"host_ms": host}
    for name, structured in FORMS.items():
        rows[name] = {"step_ms": [round(one, 3) for one in steps[name]]}
        if structured is not None:
            rows[name]["share"] = round(statistics.median(steps[name]) / without - 1, 4)
            rows[name] |= parts_us(llm, structured, num_sequences, arguments.tokens)
        print(f"{num_sequences:4} sequences  {name:13} {rows[name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    with LLM(arguments.model, max_model_len=1024) as llm:
        results = {str(count): measure(llm, count, arguments) for count in arguments.sequences}
        if arguments.record:
            path = write_record(
                arguments.record,
                model=llm.config.model or "SmolLM2-135M-Instruct",
                vocab_size=llm.engine.bounds.vocab_size,
                device=llm.config.device,
                dtype=llm.config.dtype,
                tokens=arguments.tokens,
                results=results,
            )
            print(path)


if __name__ == "__main__":
    main()
