"""Make docs/inspector-lecture.json, the flight record that docs/inspector.md steps through.

    python scripts/record_lecture.py [FILE]

The embedded model on a cache of 40 blocks, with arrivals at fixed steps. Every answer has a fixed length, so the scheduler
decides the same on every machine; only times differ. Run it again when a change of the scheduler is meant to change it.
"""

from __future__ import annotations

import dataclasses
import sys

import msgspec

from nanovllm import LLM, SamplingParams
from nanovllm.observability.observer import observe
from nanovllm.observability.options import ObservabilityOptions

BEGINNING = "You are a patient teacher of computer systems. You answer in short sentences, you give one example, " * 4
LONG = "Memory is slow, and processors are fast. " * 32
ARRIVALS = {  # step -> (prompt, tokens of the answer, number of answers)
    0: [("What is a page table?", 60, 1)],
    20: [(LONG, 24, 1)],
    45: [(BEGINNING + "What is a cache?", 40, 1)],
    55: [(BEGINNING + "What is a lock?", 40, 1), (BEGINNING + "What is a thread?", 40, 1)],
    80: [(BEGINNING + "Name a tree.", 30, 3)],
    115: [(f"{BEGINNING}Explain number {i} of the list, and say why it matters to a reader.", 110, 1) for i in range(7)],
}


def main(path: str) -> None:
    options = {"num_kv_blocks": 40, "max_model_len": 480, "max_num_batched_tokens": 96, "max_num_seqs": 6, "block_size": 16}
    llm = LLM(**options)
    with observe(llm.engine, ObservabilityOptions(flight_recorder_steps=10_000)) as observer:
        step = 0
        while llm.engine.has_work or step <= max(ARRIVALS):
            for prompt, max_tokens, n in ARRIVALS.get(step, ()):
                params = SamplingParams(temperature=0.8, seed=step, max_tokens=max_tokens, ignore_eos=True, n=n)
                llm.engine.add_request(prompt, params)
            llm.engine.step()
            step += 1
        recorder = observer.need_recorder()
        recorder.facts = {"model": "SmolLM2-135M-Instruct", "device": "CPU", "dtype": llm.config.dtype}
        recorder.facts["spec"] = dataclasses.asdict(llm.spec)
        record = {"reason": "lecture", **recorder.describe()}
    llm.close()
    with open(path, "wb") as file:
        file.write(msgspec.json.encode(record))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["docs/inspector-lecture.json"]))
