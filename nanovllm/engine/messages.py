"""What front ends and the engine process say to each other: msgpack, typed on both sides, without pickle.

A front end names the completions of a request by consecutive *handles* of its own (`handle + index`), so that the
engine can send one flat list of tokens per step. `SamplingParams` and the outputs travel as they are: msgspec reads
their fields, and `__post_init__` checks them again on arrival. `async_engine.py` and `engine_process.py` speak this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import tokenizers

from nanovllm import errors
from nanovllm.errors import NanoVllmError
from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a front end must know of the engine. All of it stays true while the engine lives."""

    model: str | None  # as the user named it; None: the embedded default model
    vocab_size: int
    max_model_len: int  # tokens of prompt and output together
    block_size: int  # tokens per KV block
    num_kv_blocks: int
    max_num_seqs: int  # sequences running at once, at most
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    device: str
    dtype: str
    memory_plan: str  # a table for people
    config: dict[str, Any]  # the `EngineConfig`, every "auto" decided
    pid: int  # of the engine process
    spec: dict[str, Any] = field(default_factory=dict)  # the `ModelSpec`
    roofline: dict[str, Any] = field(default_factory=dict)  # weight_bytes (of one weight, mean), peak (`Peak`, None: unknown)
    has_checkpoint: bool = False  # it keeps a journal: requests survive its crash


STEP_SIZE_EDGES = tuple(2**power for power in range(15))  # tokens of a step, up to and including; as vLLM counts them


class TokenizerMessage(msgspec.Struct):
    """A whole tokenizer, so that a front end reads no checkpoint."""

    backend: str  # tokenizer.json
    named_tokens: dict[str, str]
    end_token_ids: list[int]
    chat_templates: dict[str, str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerMessage:
        parts = tokenizer.parts
        return cls(parts.backend.to_str(), parts.named_tokens, sorted(parts.end_token_ids), parts.chat_templates)

    def open(self) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.backend)
        return Tokenizer(TokenizerParts(backend, self.named_tokens, frozenset(self.end_token_ids), self.chat_templates))


class Failure(msgspec.Struct):
    """An error on the wire: the name of a class in `errors.py`, and its message."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Errors that are not ours say nothing of the machine: their text belongs into the log."""
        for kind in type(error).__mro__:
            if _KINDS.get(kind.__name__) is kind:
                return cls(kind.__name__, str(error))
        return cls("NanoVllmError", f"internal error: {type(error).__name__}")

    def to_error(self) -> NanoVllmError:
        return _KINDS.get(self.kind, NanoVllmError)(self.message)


def _plain_kinds(kind: type[NanoVllmError]) -> dict[str, type[NanoVllmError]]:
    """The classes of `errors.py` that are made from a message alone; the others travel as their parent."""
    kinds = {} if "__init__" in vars(kind) or vars(errors).get(kind.__name__) is not kind else {kind.__name__: kind}
    for child in kind.__subclasses__():
        kinds |= _plain_kinds(child)
    return kinds


_KINDS = _plain_kinds(NanoVllmError)


# --- from a front end to the engine


class Hello(msgspec.Struct, tag="hello"):
    """The first message; answered by `Ready` when the model is loaded."""


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """Whose a request is, for an engine that keeps answers which a crash has cut off from their clients."""

    owner: str = ""  # who may ask for it
    name: str = ""  # what the client calls it
    path: str = ""  # the route that it came through
    number: int = 0  # which prompt of the client's call


class AddRequest(msgspec.Struct, tag="add", omit_defaults=True):
    """Without stop strings and bad words in `params`: text stays in the front end."""

    handle: int  # of completion 0
    request_id: str
    token_ids: list[int]
    params: SamplingParams
    bad_words: list[list[int]]
    priority: int
    cache_salt: str
    pooling: str | None = None  # "mean", "last": the answer is a vector
    stop: tuple[str, ...] = ()  # stop strings, and
    origin: Origin | None = None  # only to an engine that keeps a journal


class Abort(msgspec.Struct, tag="abort"):
    handle: int  # of completion 0
    index: int | None = None  # only this one of the completions


class Call(msgspec.Struct, tag="call"):
    """Something other than a request; `engine_process.CALLS` lists the names."""

    call_id: int
    name: str
    arguments: dict[str, Any]  # plain values: what they must be is the callee's to check


class Goodbye(msgspec.Struct, tag="goodbye"):
    """The front end leaves; what it left open is aborted."""


class Shutdown(msgspec.Struct, tag="shutdown"):
    """The engine process ends, with status 0."""


ToEngine = Hello | AddRequest | Abort | Call | Goodbye | Shutdown


# --- from the engine to a front end


class Ready(msgspec.Struct, tag="ready"):
    facts: EngineFacts
    tokenizer: TokenizerMessage


class LastWords(msgspec.Struct, tag="last_words"):
    """The engine failed, or could not start, and ends now."""

    failure: Failure
    traceback: str


class Begun(NamedTuple):
    """A request got its first token: what is known about its prompt."""

    handle: int
    first_scheduled_time: float | None  # of the monotonic clock, which all processes of a machine share
    num_cached_tokens: int
    prompt_logprobs: list[PositionLogprobs | None] | None
    arrival_time: float  # in the engine process; this and the next two are of the same clock
    prompt_done_time: float  # when the result of the prompt's last chunk was on the host
    first_token_time: float | None  # None: it ended without one


class Ended(NamedTuple):
    """One completion has its last token."""

    handle: int
    finish_reason: str
    stop_reason: int | str | None
    num_preemptions: int  # of the whole request, known with its last completion


class Refused(NamedTuple):
    handle: int
    failure: Failure


class Answer(NamedTuple):
    """To a `Call`: a value, or why there is none."""

    call_id: int
    value: Any
    failure: Failure | None


class Outputs(msgspec.Struct, tag="outputs", omit_defaults=True):
    """What a step brought, for all requests of one front end: token i belongs to handle i. Empty: a sign of life.

    A front end that does not read finds everything since its last message in the next one.
    """

    handles: list[int] = []
    token_ids: list[int] = []
    logprobs: dict[int, list[PositionLogprobs]] = {}  # handle -> one for each of its tokens above
    begun: list[Begun] = []
    ended: list[Ended] = []
    embeddings: dict[int, list[float]] = {}
    refused: list[Refused] = []
    answers: list[Answer] = []


ToFrontend = Ready | Outputs | LastWords

encode = msgspec.msgpack.Encoder().encode
decode_for_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_for_frontend = msgspec.msgpack.Decoder(ToFrontend).decode
