"""What a user may ask of one generation, validated on construction.

Owns the meaning and the limits of every sampling option. Nobody re-interprets a value later: the scheduler reads
the stopping rules, the sampler reads the rest. Knows nothing of models; checks against a vocabulary or a context
length happen in `LLMEngine.add_request`, where both are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidGrammar, InvalidSamplingParams, did_you_mean

MAX_LOGPROBS = 64  # candidates reported per position
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_CHARACTERS = 8192  # of all stop strings together: 300 bytes each while the request runs
MAX_CHOICES = 128  # upper limit of n
MAX_COUNT = 2**31 - 1  # of tokens: what fits an int32
MIN_TOP_P = 1e-6  # float32 must tell it from 0
MIN_REPETITION_PENALTY = 0.01  # logits are divided by it
GREEDY_BELOW = 1e-5  # temperatures below this are greedy: dividing by them overflows
STRUCTURED_KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")
MAX_STRUCTURED_BYTES = 256 * 1024  # of a schema, regular expression or grammar; of all choices together
MAX_CHOICE_STRINGS = 1000
MAX_MARK_LENGTH = 64  # characters


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that the text must have. Whether it compiles is found out where the tokenizer is known.

    json_object     any JSON object; `value` is left out
    json_schema     the schema, as JSON text or as a mapping (kept as text)
    regex           a regular expression that the whole text must match
    choice          a list of strings, one of which is the text
    grammar         Lark as llguidance reads it, or GBNF

    `after`, such as "</think>": the form begins after this mark, and the text before it is free, but has no end. With
    `opened_by`, such as "<think>", that is so if the text begins with it, and else the form begins at once.
    """

    kind: str
    value: str | Sequence[str] | Mapping[str, Any] = ""
    after: str | None = None
    opened_by: str | None = None

    def __post_init__(self) -> None:
        self._check_marks()
        if self.kind not in STRUCTURED_KINDS:
            known = ", ".join(STRUCTURED_KINDS)
            raise InvalidGrammar(
                f"{self.kind!r} is no kind of structured output ({known}){did_you_mean(str(self.kind), STRUCTURED_KINDS)}"
            )
        if self.kind == "choice":
            object.__setattr__(self, "value", self._checked_choices())
        elif self.kind == "json_schema" and isinstance(self.value, Mapping):
            object.__setattr__(self, "value", _schema_text(self.value))
        if not isinstance(self.value, (str, tuple)) or (self.kind != "choice" and isinstance(self.value, tuple)):
            raise InvalidGrammar(f"{self.kind} must be a string, got {type(self.value).__name__}")
        if (not self.value) != (self.kind == "json_object"):
            raise InvalidGrammar(f"{self.kind} {'takes no value' if self.value else 'is empty'}")
        num_bytes = _num_bytes(self.kind, self.value)
        if num_bytes > MAX_STRUCTURED_BYTES:
            raise InvalidGrammar(f"{self.kind} has {num_bytes} bytes; at most {MAX_STRUCTURED_BYTES} are allowed")

    @property
    def text(self) -> str:
        """The value of every kind but choice."""
        return self.value if isinstance(self.value, str) else ""

    @property
    def choices(self) -> tuple[str, ...]:
        return self.value if isinstance(self.value, tuple) else ()

    def _check_marks(self) -> None:
        for name in ("after", "opened_by"):
            mark = getattr(self, name)
            if mark is None:
                continue
            if not isinstance(mark, str) or not mark:
                raise InvalidGrammar(f"{name} must be a non-empty string, got {mark!r}")
            if len(mark) > MAX_MARK_LENGTH:
                raise InvalidGrammar(f"{name} has {len(mark)} characters; at most {MAX_MARK_LENGTH} are allowed")
            _num_bytes(name, mark)
        if self.opened_by is not None and self.after is None:
            raise InvalidGrammar(f"opened_by={self.opened_by!r} needs after: the mark where the form begins")

    def _checked_choices(self) -> tuple[str, ...]:
        if isinstance(self.value, (str, bytes)) or not isinstance(self.value, Sequence):
            raise InvalidGrammar(f"choice must be a list of strings, got {type(self.value).__name__}")
        if len(self.value) > MAX_CHOICE_STRINGS:
            raise InvalidGrammar(f"choice has {len(self.value)} entries; at most {MAX_CHOICE_STRINGS} are allowed")
        for choice in self.value:
            if not isinstance(choice, str) or not choice:
                raise InvalidGrammar(f"choice must hold non-empty strings, got {choice!r}")
        return tuple(self.value)


def _schema_text(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidGrammar(f"json_schema cannot be written as JSON: {error}") from None


def _num_bytes(kind: str, value: str | tuple[str, ...]) -> int:
    try:
        return len("".join(value).encode())
    except UnicodeEncodeError:
        raise InvalidGrammar(f"{kind} has half of a surrogate pair, which is not a character") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request. `InvalidSamplingParams` names the field that is wrong.

    Order of the pipeline: logit_bias, allowed_token_ids, bad_words, min_tokens (masks); penalties; the mask of
    `structured`, which nothing overrules; temperature; min_p; top_k, top_p; draw. `logprobs` are of the model's own
    distribution, before any of it.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # smallest set of most likely tokens whose probability reaches this
    top_k: int = 0  # 0 (or -1): all tokens
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one
    n: int = 1  # completions per prompt
    max_tokens: int | None = 64  # generated tokens at most; None: until the context is full
    min_tokens: int = 0  # no end before this many generated tokens
    stop: str | Sequence[str] = ()  # strings that end the text
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None  # same seed, same tokens, whatever else is in the batch
    presence_penalty: float = 0.0  # subtracted once from every token generated before; -2 to 2
    frequency_penalty: float = 0.0  # subtracted per earlier occurrence in the output; -2 to 2
    repetition_penalty: float = 1.0  # divides (multiplies, if negative) logits of tokens seen in prompt or output
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit, -100 to 100
    allowed_token_ids: Sequence[int] | None = None  # nothing else may be drawn
    bad_words: Sequence[str] = ()  # words whose tokens, at the start or after a space, may not be drawn in a row
    logprobs: int | None = None  # candidates reported per generated token; 0: the drawn one only
    prompt_logprobs: int | None = None  # the same for the prompt
    skip_special_tokens: bool = True  # leave special tokens out of the text
    structured: StructuredOutput | None = None  # the form that the text must have

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def _check_numbers(self) -> None:
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, MIN_TOP_P, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100.0)
        _check_int("top_k", self.top_k, -1, MAX_COUNT)
        _check_int("n", self.n, 1, MAX_CHOICES)
        _check_int("min_tokens", self.min_tokens, 0, MAX_COUNT)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_COUNT)
            if self.min_tokens > self.max_tokens:
                raise InvalidSamplingParams(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise InvalidSamplingParams(f"structured must be a StructuredOutput, got {type(self.structured).__name__}")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidSamplingParams(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check_lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _set(self, "stop", _strings("stop", stop, MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH))
        num_characters = sum(map(len, self.stop))
        if num_characters > MAX_STOP_CHARACTERS:
            raise InvalidSamplingParams(f"stop has {num_characters} characters; at most {MAX_STOP_CHARACTERS} are allowed in all")
        _set(self, "bad_words", _strings("bad_words", self.bad_words, 1024, MAX_STOP_STRING_LENGTH))
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            _set(self, "allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise InvalidSamplingParams("allowed_token_ids is empty: no token could be drawn; leave it out to allow all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidSamplingParams(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
            _token_ids("logit_bias", list(self.logit_bias))
            for token_id, bias in self.logit_bias.items():
                _check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
            _set(self, "logit_bias", dict(self.logit_bias) or None)


def _set(params: SamplingParams, name: str, value: Any) -> None:
    """Normalise a field of a frozen object; only `__post_init__` may."""
    object.__setattr__(params, name, value)


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidSamplingParams(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:  # also NaN
        raise InvalidSamplingParams(f"{name}={value} is outside [{low:g}, {high:g}]")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSamplingParams(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise InvalidSamplingParams(f"{name}={value} must be between {low} and {high}")


def _strings(name: str, values: Any, max_count: int, max_length: int) -> tuple[str, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidSamplingParams(f"{name} must be a list of strings, got {values!r}")
    if len(values) > max_count:
        raise InvalidSamplingParams(f"{name} has {len(values)} entries; at most {max_count} are allowed")
    for value in values:
        if not isinstance(value, str) or not value:
            raise InvalidSamplingParams(f"{name} must hold non-empty strings, got {value!r}")
        if len(value) > max_length:
            raise InvalidSamplingParams(f"{name} holds a string of {len(value)} characters; at most {max_length} are allowed")
    return tuple(values)


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidSamplingParams(f"{name} must be a list of token ids, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise InvalidSamplingParams(f"{name} must hold token ids (whole numbers from 0), got {value!r}")
    return tuple(values)
