"""What a grammar costs per token, beside a step of the real model.

    python benchmarks/grammar_cost.py [--tokens 64] [--sequences 1] [--dtype auto]

Runs the same seeded prompts with a grammar and without, and prints medians over the steps of one generation: the step,
the mask (`Matcher.fill_mask`), `Matcher.accept`, and the edit of the logits. One thread, processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

from nanovllm import LLM, SamplingParams, StructuredOutput
from nanovllm.sampling import penalties
from nanovllm.structured.llguidance_backend import LLGuidanceMatcher

FORMS = {
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
    "regex": StructuredOutput("regex", r"([A-Z][a-z]{1,11} ){40,}"),
    "grammar": StructuredOutput("grammar", 'start: NUM ("+" NUM){30,}\nNUM: /[0-9]{1,3}/'),
}


def timed(owner: Any, name: str, times: dict[str, list[float]], label: str) -> None:
    """Replace a function of `owner` by one that notes its seconds."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        started = time.thread_time()
        try:
            return original(*args, **options)
        finally:
            times[label].append(time.thread_time() - started)

    setattr(owner, name, wrapped)


def run(llm: LLM, structured: StructuredOutput | None, args: argparse.Namespace, times: dict[str, list[float]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, structured=structured)
    for index in range(args.sequences):
        llm.engine.add_request(f"Person number {index} as JSON:", params)
    while llm.engine.has_work:
        started = time.thread_time()
        llm.engine.step()
        times["step"].append(time.thread_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    times: dict[str, list[float]] = defaultdict(list)
    timed(LLGuidanceMatcher, "fill_mask", times, "mask")
    timed(LLGuidanceMatcher, "accept", times, "accept")
    timed(penalties, "apply_edits", times, "edit")  # the sampler keeps its own name for it: see below
    import nanovllm.sampling.sampler as sampler

    sampler.apply_edits = penalties.apply_edits
    with LLM(dtype=args.dtype, num_threads=1, num_kv_blocks=1000, max_num_seqs=max(8, args.sequences)) as llm:
        print(f"{args.sequences} sequence(s), {llm.config.dtype}; medians in microseconds, worst in brackets")
        for name, structured in {"none": None, **FORMS}.items():
            run(llm, structured, args, defaultdict(list))  # compiles, fills caches
            times.clear()
            run(llm, structured, args, times)
            median = {label: statistics.median(values) * 1e6 for label, values in times.items()}
            worst = {label: max(values) * 1e6 for label, values in times.items()}
            parts = "  ".join(
                f"{label} {median[label]:8.1f} ({worst[label]:.0f})"
                for label in ("step", "mask", "accept", "edit")
                if label in median
            )
            own = sum(sum(times[label]) for label in ("mask", "accept", "edit"))
            print(f"{name:12} {parts}  share of the steps {own / sum(times['step']):.1%}")


if __name__ == "__main__":
    main()
