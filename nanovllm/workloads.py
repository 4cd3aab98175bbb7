"""Workloads: named, seeded lists of requests with their arrival times, and a checksum that says they are the same.

A workload is data. It knows no server, no engine and no tensors, so the client, the offline benchmark and the simulator
take the same one. Prompts are token ids. All randomness is `random.Random(seed)`, whose methods give the same numbers in
every Python since 3.2, so a checksum identifies a workload everywhere. A maker's keyword arguments are its parameters,
with their defaults; what it was given is in the record.

    poisson:rate=50,num_requests=1500,num_input=512     a name, and the parameters that differ from their defaults
"""

from __future__ import annotations

import hashlib
import inspect
import json
import statistics
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf, isfinite
from pathlib import Path
from random import Random
from typing import Any

from nanovllm.errors import ConfigError, did_you_mean

VOCABULARY = 10_000  # token ids of random prompts are from 1 up to, but not including, this
MAX_VOCABULARY = 1 << 20


@dataclass(frozen=True, slots=True)
class Request:
    arrival_s: float  # since the start; with `after`, since the end of that request
    prompt: tuple[int, ...]  # token ids
    num_output: int  # tokens to generate, exactly
    tenant: str = ""
    after: int | None = None  # index of the request that must have ended before: the turn before this one


@dataclass(frozen=True)
class Workload:
    name: str
    seed: int
    parameters: dict[str, Any]
    requests: list[Request]
    temperature: float = 0.0

    @cached_property
    def checksum(self) -> str:
        """Of everything that is sent, and when (to the microsecond)."""
        digest = hashlib.sha256(f"{self.temperature}".encode())
        for one in self.requests:
            row = [round(one.arrival_s * 1e6), one.num_output, one.tenant, one.after, one.prompt]
            digest.update(json.dumps(row, separators=(",", ":")).encode())
        return digest.hexdigest()[:16]

    @property
    def is_all_at_once(self) -> bool:
        return all(one.arrival_s == 0.0 and one.after is None for one in self.requests)

    def describe(self) -> dict[str, Any]:
        """What a record says about it: enough to make it again, and to see what it is."""
        return {
            "name": self.name,
            "seed": self.seed,
            "parameters": {key: str(value) if value in (inf,) else value for key, value in self.parameters.items()},
            "temperature": self.temperature,
            "input_tokens": _distribution([len(one.prompt) for one in self.requests]),
            "output_tokens": _distribution([one.num_output for one in self.requests]),
            "checksum": self.checksum,
        }


SHIFT = 1009  # a prime


def shifted(workload: Workload, number: int) -> Workload:
    """The same workload in other words: every token id moved by `number` places, so that no prefix cache knows it yet.

    Which prompts share what with each other stays as it is. Ids stay within the range that the workload uses:
        ids from 1 to 9, number 1, SHIFT 1009: 9 -> 1 + (8 + 1009) % 9 = 1
    """
    low = min(min(one.prompt) for one in workload.requests)
    size = max(max(one.prompt) for one in workload.requests) - low + 1
    offset = number * SHIFT - low
    requests = [replace(one, prompt=tuple(low + (token + offset) % size for token in one.prompt)) for one in workload.requests]
    return replace(workload, requests=requests)


def deal(requests: Sequence[Request], count: int) -> list[tuple[list[int], list[Request]]]:
    """Requests dealt out round-robin: for each of `count` parts the indices of its requests, and the requests.

    One that waits for another goes where that one went; `after` is then an index into its part.
    """
    parts: list[tuple[list[int], list[Request]]] = [([], []) for _ in range(count)]
    seats: list[tuple[int, int]] = []  # of each request: its part, and its place there
    turn = 0
    for index, one in enumerate(requests):
        if one.after is None:
            part, before = turn % count, None
            turn += 1
        else:
            part, before = seats[one.after]
        indices, dealt = parts[part]
        seats.append((part, len(dealt)))
        indices.append(index)
        dealt.append(replace(one, after=before))
    return parts


def _distribution(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "sum": sum(values)}


# --- makers: each yields requests; the order of random calls is part of the workload


def nano_vllm(rng: Random, num_requests: int = 256, shortest: int = 100, longest: int = 1024) -> Iterator[Request]:
    """The benchmark of nano-vllm: everything at once, ids 0 to 10,000, all prompts drawn before all output lengths."""
    prompts = [tuple(rng.randint(0, 10_000) for _ in range(rng.randint(shortest, longest))) for _ in range(num_requests)]
    for prompt in prompts:
        yield Request(0.0, prompt, rng.randint(shortest, longest))


def fixed(
    rng: Random,
    num_requests: int = 64,
    rate: float = inf,
    num_input: int = 256,
    num_output: int = 128,
    vocabulary: int = VOCABULARY,
) -> Iterator[Request]:
    """Equal lengths, equal distances; `rate` in requests per second, inf: all at once."""
    for number in range(num_requests):
        yield Request(number / rate, _tokens(rng, num_input, vocabulary), num_output)


def poisson(
    rng: Random,
    num_requests: int = 200,
    rate: float = 4.0,
    num_input: int = 256,
    num_output: int = 128,
    spread: float = 0.0,
    vocabulary: int = VOCABULARY,
) -> Iterator[Request]:
    """Independent arrivals. `spread` 0.5: lengths are uniform from half to one and a half times the given ones.

    With rate inf and spread 0 this is the random data set of `vllm bench serve`.
    """
    lengths = [(_around(rng, num_input, spread), _around(rng, num_output, spread)) for _ in range(num_requests)]
    prompts = [_tokens(rng, length, vocabulary) for length, _ in lengths]
    arrivals = _poisson_arrivals(rng, num_requests, rate)
    for at, prompt, (_, length) in zip(arrivals, prompts, lengths):
        yield Request(at, prompt, length)


def bursty(
    rng: Random,
    num_requests: int = 200,
    rate: float = 4.0,
    burst: int = 16,
    num_input: int = 256,
    num_output: int = 128,
    vocabulary: int = VOCABULARY,
) -> Iterator[Request]:
    """`burst` requests at once, bursts by a Poisson process; `rate` is the mean of requests per second."""
    starts = _poisson_arrivals(rng, -(-num_requests // burst), rate / burst)
    for number in range(num_requests):
        yield Request(starts[number // burst], _tokens(rng, num_input, vocabulary), num_output)


def shared_prefix(
    rng: Random,
    num_requests: int = 200,
    rate: float = 4.0,
    num_documents: int = 8,
    document: int = 1024,
    question: int = 32,
    num_output: int = 64,
    vocabulary: int = VOCABULARY,
) -> Iterator[Request]:
    """Retrieval: a question after one of a few long documents. Lengths in tokens."""
    documents = [_tokens(rng, document, vocabulary) for _ in range(num_documents)]
    for at in _poisson_arrivals(rng, num_requests, rate):
        yield Request(at, rng.choice(documents) + _tokens(rng, question, vocabulary), num_output)


def multi_turn(
    rng: Random,
    num_sessions: int = 16,
    rate: float = 1.0,
    num_turns: int = 5,
    system: int = 256,
    message: int = 64,
    num_output: int = 64,
    think_s: float = 0.5,
    vocabulary: int = VOCABULARY,
) -> Iterator[Request]:
    """Agents: each turn is sent `think_s` seconds after the last answer, with the whole conversation before it.

    The answers inside later prompts are random tokens of the right length, not what the server said: so the prompts are
    the same for every server, and a prefix cache finds everything up to the last message.
    """
    preamble = _tokens(rng, system, vocabulary)
    index = 0
    for at in _poisson_arrivals(rng, num_sessions, rate):
        prompt = preamble + _tokens(rng, message, vocabulary)
        for turn in range(num_turns):
            yield Request(think_s if turn else at, prompt, num_output, after=index - 1 if turn else None)
            prompt += _tokens(rng, num_output, vocabulary) + _tokens(rng, message, vocabulary)
            index += 1


def long_context(
    rng: Random,
    num_requests: int = 16,
    rate: float = 0.5,
    shortest: int = 4096,
    longest: int = 16_384,
    num_output: int = 64,
    vocabulary: int = VOCABULARY,
) -> Iterator[Request]:
    """Few requests, long prompts of uniform length."""
    for at in _poisson_arrivals(rng, num_requests, rate):
        yield Request(at, _tokens(rng, rng.randint(shortest, longest), vocabulary), num_output)


def multi_tenant(
    rng: Random, seconds: float = 30.0, rate: float = 4.0, scale: int = 16, vocabulary: int = VOCABULARY
) -> Iterator[Request]:
    """Three tenants: "chat" (short, steady), "batch" (long outputs, all at the start), "report" (long prompts, in bursts).

    `rate` is that of "chat"; lengths are multiples of `scale` tokens.
    """
    requests = [
        Request(at, _tokens(rng, 8 * scale, vocabulary), 4 * scale, "chat")
        for at in _poisson_arrivals(rng, round(seconds * rate), rate)
    ]
    requests += [Request(0.0, _tokens(rng, 4 * scale, vocabulary), 16 * scale, "batch") for _ in range(round(seconds * rate / 8))]
    starts = _poisson_arrivals(rng, max(1, round(seconds * rate / 32)), rate / 32)
    requests += [Request(at, _tokens(rng, 64 * scale, vocabulary), 2 * scale, "report") for at in starts for _ in range(4)]
    yield from sorted(requests, key=lambda one: one.arrival_s)


def trace(rng: Random, path: str = "", vocabulary: int = VOCABULARY, speed: float = 1.0) -> Iterator[Request]:
    """Replay a file of JSON lines, `speed` times as fast. Two forms, see docs/benchmarks.md: ours, and Mooncake's."""
    if not path:
        raise ConfigError("workload 'trace' needs a file: path=FILE")
    blocks: dict[int, tuple[int, ...]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"workload 'trace': path={path!r} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield _trace_request(rng, json.loads(line), blocks, vocabulary, speed)
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is not a request of a trace: {error!r}") from error


def _trace_request(
    rng: Random, line: dict[str, Any], blocks: dict[int, tuple[int, ...]], vocabulary: int, speed: float
) -> Request:
    if "timestamp" in line:  # Mooncake's: milliseconds, and an id for each 512 tokens of the prompt
        prompt: tuple[int, ...] = ()
        for block_id in line.get("hash_ids", []):
            if block_id not in blocks:
                blocks[block_id] = _tokens(rng, 512, vocabulary)
            prompt += blocks[block_id]
        length = int(line["input_length"])
        prompt = prompt[:length] + _tokens(rng, length - len(prompt), vocabulary)
        return Request(line["timestamp"] / 1e3 / speed, prompt, int(line["output_length"]))
    prompt = tuple(line["prompt"]) if "prompt" in line else _tokens(rng, int(line["num_input"]), vocabulary)
    after = line.get("after")
    after = None if after is None else int(after)
    return Request(line["arrival_s"] / speed, prompt, int(line["num_output"]), line.get("tenant", ""), after)


def _tokens(rng: Random, count: int, vocabulary: int) -> tuple[int, ...]:
    """`count` times `rng.randrange(1, vocabulary)`, a few times faster: the same 32-bit words of the generator, in one piece."""
    ids, tokens = _token_ids(vocabulary), []
    shift = 32 - len(ids).bit_length()
    limit = len(ids) << shift
    while (missing := count - len(tokens)) > 0:
        words = struct.unpack(f"<{missing}I", rng.getrandbits(32 * missing).to_bytes(4 * missing, "little"))
        tokens += [ids[word >> shift] for word in words if word < limit]
    return tuple(tokens)


@lru_cache
def _token_ids(vocabulary: int) -> tuple[int, ...]:
    """All that may be drawn; prompts share these objects. Raises `ValueError` when there is none."""
    if not 2 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"vocabulary={vocabulary} must be from 2 to {MAX_VOCABULARY}")
    return tuple(range(1, vocabulary))


def _around(rng: Random, length: int, spread: float) -> int:
    return max(1, rng.randint(round(length * (1 - spread)), round(length * (1 + spread)))) if spread else length


def _poisson_arrivals(rng: Random, count: int, rate: float) -> list[float]:
    """The first at 0, gaps exponential with mean 1 / rate."""
    arrivals, now = [], 0.0
    for _ in range(count):
        arrivals.append(now)
        now += 0.0 if rate == inf else rng.expovariate(rate)
    return arrivals


# --- by name

Maker = Callable[..., Iterator[Request]]
MAKERS: dict[str, Maker] = {
    "nano-vllm": nano_vllm,
    "fixed": fixed,
    "poisson": poisson,
    "bursty": bursty,
    "shared-prefix": shared_prefix,
    "multi-turn": multi_turn,
    "long-context": long_context,
    "multi-tenant": multi_tenant,
    "trace": trace,
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # the course's scenarios, at a size for the embedded model on a CPU
    "tiny-sharegpt-online": ("poisson", {"num_requests": 24, "rate": 2.0, "num_input": 64, "num_output": 32, "spread": 0.5}),
    "tiny-random-online": ("poisson", {"num_requests": 24, "rate": 2.0, "num_input": 64, "num_output": 32}),
    "tiny-prefix-repetition-online": ("shared-prefix", {"num_requests": 24, "rate": 2.0, "document": 256, "num_output": 16}),
    "tiny-sharegpt-throughput": ("poisson", {"num_requests": 24, "rate": inf, "num_input": 64, "num_output": 32, "spread": 0.5}),
    "tiny-instructcoder-online": (
        "poisson",
        {"num_requests": 24, "rate": 2.0, "num_input": 128, "num_output": 64, "spread": 0.5},
    ),
    "tiny-sonnet-throughput": (
        "shared-prefix",
        {"num_requests": 24, "rate": inf, "num_documents": 1, "document": 48, "question": 80, "num_output": 32},
    ),
    "tiny-random-latency": ("fixed", {"num_requests": 1, "num_input": 64, "num_output": 32}),
}
NAMES = (*MAKERS, *PRESETS)
TEMPERATURES = {"nano-vllm": 0.6}  # the others are greedy


def make_workload(name: str, seed: int = 0, **parameters: Any) -> Workload:
    """Raises `ConfigError` for an unknown name or parameter, or values that give no requests."""
    if name not in NAMES:
        raise ConfigError(f"no workload {name!r}{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}")
    kind, preset = PRESETS.get(name, (name, {}))
    known = {key: value.default for key, value in inspect.signature(MAKERS[kind]).parameters.items() if key != "rng"}
    for key, value in parameters.items():
        if key not in known:
            raise ConfigError(f"workload {name!r} has no parameter {key!r}{did_you_mean(key, known)}; it has {', '.join(known)}")
        _check_parameter(name, key, value, type(known[key]))
    chosen = {**known, **preset, **parameters}
    try:
        requests = list(MAKERS[kind](Random(seed), **chosen))
    except (ValueError, ZeroDivisionError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"workload {name!r} cannot be made with {chosen}: {error}") from error
    if not requests or any(not one.prompt or one.num_output < 1 for one in requests):
        raise ConfigError(f"workload {name!r} with {chosen} has no requests, or some without a prompt or without output")
    for index, one in enumerate(requests):
        if not 0 <= one.arrival_s < inf:
            raise ConfigError(f"workload {name!r}: request {index} comes at {one.arrival_s} s, which must be at least 0")
        if one.after is not None and not 0 <= one.after < index:
            raise ConfigError(f"workload {name!r}: request {index} comes after {one.after}, which must be one before it")
    return Workload(name, seed, chosen, requests, TEMPERATURES.get(name, 0.0))


def _check_parameter(name: str, key: str, value: Any, kind: type) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_good = {
        str: isinstance(value, str),
        int: isinstance(value, int) and not isinstance(value, bool) and value > 0,
        float: is_number and value >= 0 and (isfinite(value) or key == "rate") and not (key in ("rate", "speed") and value == 0),
    }[kind]
    if not is_good:
        wanted = {str: "text", int: "a whole number above 0", float: "a number above 0"}[kind]
        raise ConfigError(f"workload {name!r}: {key}={value!r} must be {wanted}")


def parse_workload(text: str, seed: int = 0, settings: Sequence[str] = ()) -> Workload:
    """A workload by its description, `NAME` or `NAME:PARAMETER=VALUE,...`; `settings` are more of these, and win.

    Raises `ConfigError` that says what is wrong.
    """
    name, _, rest = text.partition(":")
    return make_workload(name, seed, **parse_parameters([*filter(None, rest.split(",")), *settings]))


def parse_parameters(settings: Sequence[str]) -> dict[str, Any]:
    """["rate=inf", "num_requests=8"] to values: whole numbers, numbers, else text."""
    parameters: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"workload: {setting!r} is not of the form PARAMETER=VALUE")
        parameters[key.replace("-", "_")] = _parse(text)
    return parameters


def _parse(text: str) -> int | float | str:
    """What is no number is text; `make_workload` refuses it by the parameter's name where a number belongs."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def write_trace(workload: Workload, path: Path) -> None:
    """As JSON lines that the workload `trace` reads."""
    rows = (
        {"arrival_s": one.arrival_s, "prompt": one.prompt, "num_output": one.num_output, "tenant": one.tenant, "after": one.after}
        for one in workload.requests
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
