"""What users receive: one `GenerationOutput` per request, with one `CompletionOutput` per requested completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class TokenLogprob(NamedTuple):
    """One candidate at one position."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token


@dataclass(slots=True)
class PositionLogprobs:
    """The token at one position, with the most likely alternatives."""

    chosen: TokenLogprob
    top: list[TokenLogprob] = field(default_factory=list)  # most likely first


def add_text(owner: Any, new: str) -> None:
    """`owner.text += new`, which copies the whole text for every token: here a string that nobody else has grows in place."""
    text, owner.text = owner.text, ""
    text += new
    owner.text = text


@dataclass(slots=True)
class CompletionOutput:
    """One of the n completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token id or the stop string that ended it; of an error, what happened
    logprobs: list[PositionLogprobs] | None = None


class TtftParts(NamedTuple):
    """Where the engine process spent the time to the first token, seconds. The rest of it is the front end's."""

    queue: float  # from its arrival to the first scheduling
    prefill: float  # until the result of the prompt's last chunk is on the host
    first_decode: float  # until the first token is an output


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of the engine's clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    tokenized_time: float | None = None  # when it was ready for the engine; of an `AsyncEngine`
    ttft_parts: TtftParts | None = None  # of an `AsyncEngine`'s request that has a first token

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds: (finish - first token) / (tokens - 1)."""
        if self.finish_time is None or self.first_token_time is None or self.num_generated_tokens < 2:
            return None
        return (self.finish_time - self.first_token_time) / (self.num_generated_tokens - 1)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A prompt as a vector; its length is the model's hidden size. Not normalised."""

    embedding: list[float]
    num_prompt_tokens: int


@dataclass(slots=True)
class GenerationOutput:
    """The answer to one request. `output["text"]` and `output["token_ids"]` give the first completion's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    completions: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # None at position 0: nothing precedes it
    embedding: list[float] | None = None  # of a request with pooling, in place of text
    finished: bool = False

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(f"{key!r}; an output has 'text' and 'token_ids', and more as attributes")
        return getattr(self.completions[0], key)
