"""Loads on an OpenAI-compatible server, as `vllm bench serve --backend openai --dataset-name random` makes them.

    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --model NAME --record serve-load \
        --load inf:128:1024:512 --load 50:1500:512:128

A load is requests per second (`inf`: all at once), requests, input tokens, output tokens. Requests arrive by a Poisson
process with a fixed seed; each is a streamed completion with `ignore_eos` and usage at the end. TTFT is the time to the
first chunk with text, TPOT (end - first chunk) / (output tokens - 1), as vLLM's client counts them. The client is one
process and uses aiohttp, as vLLM's does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import time
from dataclasses import dataclass

import aiohttp
import numpy as np

from nanovllm.bench.record import write_record


@dataclass(frozen=True, slots=True)
class Load:
    rate: float  # requests per second
    num_requests: int
    num_input: int  # tokens
    num_output: int

    @classmethod
    def parse(cls, text: str) -> Load:
        rate, *counts = text.split(":")
        return cls(float(rate), *map(int, counts))


@dataclass(slots=True)
class Answer:
    ttft: float = 0.0  # seconds
    latency: float = 0.0
    num_output: int = 0
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / max(1, self.num_output - 1)


async def ask(session: aiohttp.ClientSession, url: str, body: dict) -> Answer:
    answer, start = Answer(), time.perf_counter()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {(await response.text())[:200]}"
                return answer
            last = start
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if chunk.get("choices"):
                    answer.ttft = answer.ttft or now - start
                    last = now
                if chunk.get("usage"):
                    answer.num_output = chunk["usage"]["completion_tokens"]
            answer.latency = last - start
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        answer.error = repr(error)
    return answer


async def run(url: str, model: str, load: Load, vocabulary: int, form: str) -> tuple[list[Answer], float, str]:
    rng = random.Random(0)
    prompts = [[rng.randrange(1, vocabulary) for _ in range(load.num_input)] for _ in range(load.num_requests)]
    checksum = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    bodies = [
        {
            "model": model,
            "prompt": prompt if form == "ids" else " ".join(f"t{token}" for token in prompt),
            "max_tokens": load.num_output,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt in prompts
    ]
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start, tasks = time.perf_counter(), []
        due = start
        for body in bodies:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, f"{url}/v1/completions", body)))
            due += 0.0 if load.rate == float("inf") else rng.expovariate(load.rate)
        answers = await asyncio.gather(*tasks)
        return answers, time.perf_counter() - start, checksum


def summarize(load: Load, answers: list[Answer], seconds: float, checksum: str) -> dict:
    good = [answer for answer in answers if not answer.error]
    errors = sorted({answer.error for answer in answers if answer.error})
    result = {
        "load": {
            "requests_per_s": str(load.rate),
            "requests": load.num_requests,
            "input": load.num_input,
            "output": load.num_output,
        },
        "checksum": checksum,
        "seconds": round(seconds, 3),
        "completed": len(good),
        "errors": errors[:3],
        "output_tok_s": round(sum(answer.num_output for answer in good) / seconds, 1),
    }
    for name in ("ttft", "tpot", "latency"):
        values = [getattr(answer, name) * 1e3 for answer in good] or [0.0]
        result[f"{name}_ms"] = {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 90, 99)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--load", type=Load.parse, action="append", required=True, metavar="RATE:REQUESTS:INPUT:OUTPUT")
    parser.add_argument("--vocabulary", type=int, default=10_000, help="token ids of prompts are below this")
    parser.add_argument("--form", choices=["ids", "words"], default="ids", help="prompts as token ids, or as words t1 t2 ...")
    parser.add_argument("--note", default="", help="goes into the record: what runs on the server's side")
    parser.add_argument("--record", metavar="NAME")
    arguments = parser.parse_args()
    results = []
    for load in arguments.load:
        answers, seconds, checksum = asyncio.run(run(arguments.url, arguments.model, load, arguments.vocabulary, arguments.form))
        results.append(summarize(load, answers, seconds, checksum))
        print(json.dumps(results[-1]), flush=True)
    if arguments.record:
        print(write_record(arguments.record, model=arguments.model, note=arguments.note, form=arguments.form, loads=results))


if __name__ == "__main__":
    main()
