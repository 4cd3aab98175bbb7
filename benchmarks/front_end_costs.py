"""What keeps the event loops of a server and of `nanovllm bench serve`'s client busy: processor time by request, token, event.

    python benchmarks/front_end_costs.py [--record front-end-costs]

Loads of one server whose engine computes nothing, with the client that the benchmarks use; most are many streams at once.
Answers of one token after prompts of 4, 512 and 1,024 words; answers of many tokens, *paced* so that every token is an
event of its own; the same *saturated*, where tokens that have come meanwhile share an event. *Alone*: one request after
the other, for what no processor is busy with: sockets, and threads and processes that wake up. And without a server: what
the engine's thread does with a new request. The server's event loop is
the main thread of its process; its other threads tokenise, and move bytes. Processor time hardly depends on what else the
machine does. `nanovllm/simulation/calibrate.py` makes the simulator's front end of the record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import Any

from front_end import STEPS_PER_SECOND, TESTS, running_server, thread_times
from front_end_bursts import measure_bursts, measure_singles

from nanovllm.bench.http_client import Endpoint, stream
from nanovllm.bench.record import summary, write_record
from nanovllm.config import SchedulerLimits
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import AddRequest, decode_for_engine, encode
from nanovllm.engine.scheduler import Scheduler
from nanovllm.sampling_params import SamplingParams


async def send(port: int, num_streams: int, num_words: int, num_tokens: int) -> float:
    """Events per token of so many streams at once."""
    prompt = " ".join(f"w{number % 49}" for number in range(num_words))
    fields = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"model": "fake", "stream": True, "stream_options": {"include_usage": True}, **fields}).encode()
    endpoint = Endpoint(f"http://127.0.0.1:{port}", "/v1/completions", None)
    exchanges = await asyncio.gather(*(stream(endpoint, body, 120.0) for _ in range(num_streams)))
    if errors := {exchange.error for exchange in exchanges if exchange.error}:
        raise SystemExit(f"failed: {sorted(errors)}")
    return sum(len(exchange.token_times) for exchange in exchanges) / (num_streams * num_tokens)


async def send_alone(port: int, num_requests: int, num_words: int) -> None:
    for _ in range(num_requests):
        await send(port, 1, num_words, 1)


def measure_alone(num_requests: int = 100, num_words: int = 512, repeats: int = 5) -> dict[str, Any]:
    """Of one request, microseconds: from its first to its last byte, and the processor time of everybody meanwhile."""
    values: dict[str, list[float]] = {"wall_us": [], "busy_us": []}
    with running_server({}, {"builder": "served:counting", "max_num_seqs": 8, "num_kv_blocks": 131_072}) as (port, pids):
        processes = [*pids["front end"], *pids["engine"]]

        def busy_s() -> float:
            return time.process_time() + sum(sum(thread_times(pid)) for pid in processes)

        asyncio.run(send_alone(port, num_requests, num_words))  # warm
        for _ in range(repeats):
            began, busy = time.perf_counter(), busy_s()
            asyncio.run(send_alone(port, num_requests, num_words))
            values["busy_us"].append((busy_s() - busy) / num_requests * 1e6)
            values["wall_us"].append((time.perf_counter() - began) / num_requests * 1e6)
    print("alone", values, flush=True)
    return {"words": num_words, "tokens": 1, **{key: summary(numbers) for key, numbers in values.items()}}


def measure_engine(num_requests: int = 256, repeats: int = 9) -> dict[str, Any]:
    """What a request costs the engine's thread until its prompt is in a batch, microseconds, by length of the prompt.

    `intake_us`: to decode its message and let it through the door. `admit_us`: to hash, place and schedule it, in a step.
    """
    sys.path.insert(0, str(TESTS))
    from support import CountingExecutor

    params = SamplingParams(temperature=0.0, max_tokens=512, ignore_eos=True)
    results: dict[str, Any] = {}
    for num_tokens in (4, 512, 1024):
        intake, admit = [], []
        for _ in range(repeats):
            scheduler = Scheduler(BlockManager(17_052, 64, True), SchedulerLimits(num_requests, 8192))
            engine = LLMEngine(scheduler, CountingExecutor(), vocab_size=1 << 31, max_model_len=16_384, num_steps_ahead=1)
            payloads = [
                encode(AddRequest(number, str(number), [number * 1024 + place for place in range(num_tokens)], params, [], 0, ""))
                for number in range(num_requests)
            ]
            began = time.thread_time()
            for payload in payloads:
                message = decode_for_engine(payload)
                engine.add_request(message.token_ids, message.params, request_id=message.request_id)
            taken = time.thread_time()
            engine.step(may_collect=False)
            admit.append((time.thread_time() - taken) / len(scheduler.running) * 1e6)
            intake.append((taken - began) / num_requests * 1e6)
        results[str(num_tokens)] = {"intake_us": summary(intake), "admit_us": summary(admit)}
        print(
            "engine", num_tokens, {key: round(value["median"], 1) for key, value in results[str(num_tokens)].items()}, flush=True
        )
    return results


def measure(builder: str, loads: dict[str, tuple[int, int]], num_streams: int, repeats: int) -> dict[str, Any]:
    """Name of a load -> processor time per request, microseconds. `loads`: (words, tokens)."""
    engine = {"builder": builder, "max_num_seqs": num_streams, "num_kv_blocks": 131_072}
    results: dict[str, Any] = {}
    with running_server({}, engine) as (port, pids):
        (server,) = pids["front end"]
        for name, (num_words, num_tokens) in loads.items():
            asyncio.run(send(port, num_streams, num_words, num_tokens))  # warm
            values: dict[str, list[float]] = {"events_per_token": [], "loop_us": [], "threads_us": [], "client_us": []}
            for _ in range(repeats):
                before = (*thread_times(server), time.process_time())
                values["events_per_token"].append(asyncio.run(send(port, num_streams, num_words, num_tokens)))
                after = (*thread_times(server), time.process_time())
                for key, start, end in zip(("loop_us", "threads_us", "client_us"), before, after):
                    values[key].append((end - start) / num_streams * 1e6)
            medians = {key: summary(numbers) for key, numbers in values.items()}
            results[name] = {"words": num_words, "tokens": num_tokens, **medians}
            print(name, {key: round(value["median"], 3) for key, value in medians.items()}, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="of the long answers")
    parser.add_argument("--steps-per-second", type=float, default=10.0, help="of the paced load")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only-alone", action="store_true", help="not the loads of many streams")
    parser.add_argument(
        "--only-bursts", action="store_true", help="only what `front_end_bursts.py` measures, by the wall's clock"
    )
    parser.add_argument("--burst-repeats", type=int, default=5)
    parser.add_argument("--record", help="write a record with this name")
    arguments = parser.parse_args()
    shape = arguments.streams, arguments.repeats
    content: dict[str, Any] = {}
    if not arguments.only_alone:
        content |= {"bursts": measure_bursts(arguments.burst_repeats), "singles": measure_singles()}
    if not arguments.only_bursts:
        content |= {"alone": measure_alone(), "engine": measure_engine()}
    if not (arguments.only_alone or arguments.only_bursts):
        one_token = {"short": (4, 1), "words 512": (512, 1), "words 1024": (1024, 1)}
        content["loads"] = measure("served:counting", {**one_token, "saturated": (4, arguments.tokens)}, *shape)
        os.environ[STEPS_PER_SECOND] = str(arguments.steps_per_second)  # the bursts had theirs
        content["loads"] |= measure("front_end:paced", {"paced": (4, arguments.tokens)}, *shape)
    if arguments.record:
        print(write_record(arguments.record, settings=vars(arguments), **content))


if __name__ == "__main__":
    main()
