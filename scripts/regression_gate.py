"""Does this tree still give the right tokens, and is it still as fast as another tree?

    python scripts/regression_gate.py correctness            # against tests/data/greedy_tokens.json
    python scripts/regression_gate.py correctness --update   # after a change that is meant to change tokens
    git worktree add /tmp/baseline main
    python scripts/regression_gate.py performance --baseline /tmp/baseline

Correctness: greedy tokens of the embedded model in float32, in one batch, and one prompt alone. Performance: `bench.py`
of both trees, a process per repeat, in the order A B B A, judged by `nanovllm.bench.compare`. Where the baseline's own
repeats lie further apart than `--max-noise` the machine is too noisy for a verdict, and the gate says so and passes.
Exit status: 0 passed or skipped, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nanovllm.bench.compare import Verdict, compare_figure
from nanovllm.bench.serve import turns

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "greedy_tokens.json"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 4, 5,",
    "Once upon a time, in a village by the sea,",
)
NUM_TOKENS = 8


def greedy_tokens() -> dict[str, list[int]]:
    """Of every prompt. Raises `AssertionError` when a batch gives other tokens than a prompt alone."""
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(dtype="float32", num_threads=1, max_model_len=256, kv_cache_memory_bytes=2**26) as llm:
        batch = [output.token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        alone = llm.generate([PROMPTS[0]], params, use_tqdm=False)[0].token_ids
    if alone != batch[0]:
        raise AssertionError(f"a batch gives other tokens than the prompt {PROMPTS[0]!r} alone: {batch[0]} instead of {alone}")
    return dict(zip(PROMPTS, batch))


def differences(expected: dict[str, list[int]], got: dict[str, list[int]]) -> list[str]:
    """A line for each prompt whose tokens changed: where, and from what to what."""
    lines = []
    for prompt in {**expected, **got}:
        old, new = expected.get(prompt, []), got.get(prompt, [])
        if old != new:
            place = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
            lines.append(f"{prompt!r}: token {place} is {new[place : place + 1]}, was {old[place : place + 1]}")
    return lines


def check_correctness(is_update: bool) -> int:
    got = greedy_tokens()
    if is_update:
        GOLDEN.write_text(json.dumps(got) + "\n", encoding="utf-8")
        return 0
    problems = differences(json.loads(GOLDEN.read_text(encoding="utf-8")), got)
    print("correctness:", "\n  ".join(problems) if problems else f"{len(got)} prompts, {NUM_TOKENS} tokens each, equal")
    return 1 if problems else 0


def measure_throughput(tree: Path, options: Sequence[str]) -> float:
    """Output tokens per second of one `bench.py` in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TQDM_DISABLE": "1"}
    command = [sys.executable, str(tree / "bench.py"), *options]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{tree}: bench.py failed\n{ran.stderr[-2000:]}")
    return float(json.loads(ran.stdout.splitlines()[-1])["output_tokens_per_s"])


def judge(baseline: Sequence[float], current: Sequence[float], margin: float, max_noise: float) -> tuple[str, Verdict]:
    """("passed", "skipped" or "failed", the verdict)."""
    verdict = compare_figure("output_tok_s", baseline, current, margin)
    noise = (max(baseline) - min(baseline)) / verdict.a
    if verdict.word == "slower":  # beyond the margin in spite of the noise
        return "failed", verdict
    return ("skipped" if noise > max_noise else "passed"), verdict


def check_performance(arguments: argparse.Namespace) -> int:
    options = ["--requests", str(arguments.requests), "--divide-lengths", str(arguments.divide_lengths)]
    trees, values = (arguments.baseline.resolve(), ROOT), ([], [])
    for tree in trees:
        measure_throughput(tree, options)  # discarded: fills the caches of the file system and of Triton
    for side in turns(arguments.repeats, 2):
        values[side].append(measure_throughput(trees[side], options))
        print(f"{'AB'[side]} {values[side][-1]:.1f} output tok/s", flush=True)
    result, verdict = judge(*values, arguments.margin, arguments.max_noise)
    print(verdict)
    print(f"performance: {result}")
    return 1 if result == "failed" else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gates = parser.add_subparsers(dest="gate", required=True)
    gates.add_parser("correctness").add_argument("--update", action="store_true")
    performance = gates.add_parser("performance")
    performance.add_argument("--baseline", type=Path, required=True, help="another checkout of the repository")
    performance.add_argument("--repeats", type=int, default=5)
    performance.add_argument("--requests", type=int, default=8)
    performance.add_argument("--divide-lengths", type=int, default=16)
    performance.add_argument("--margin", type=float, default=0.03, help="a loss below this is not one (default: 0.03)")
    performance.add_argument("--max-noise", type=float, default=0.15, help="of the baseline's repeats (default: 0.15)")
    arguments = parser.parse_args()
    return check_correctness(arguments.update) if arguments.gate == "correctness" else check_performance(arguments)


if __name__ == "__main__":
    sys.exit(main())
