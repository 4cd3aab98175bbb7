"""Every error that nanovllm raises on purpose.

    NanoVllmError
    |-- ConfigError                  an option is unknown, malformed, or cannot be honoured
    |   `-- NotEnoughMemory          the model or its cache cannot fit; names the option that would help
    |-- RequestError                 HTTP 400: one request is refused, nobody else is disturbed
    |   |-- InvalidSamplingParams
    |   |-- InvalidPrompt            empty, wrong type, token ids out of range
    |   |-- PromptTooLong
    |   |-- InvalidGrammar           structured output: malformed, not supported, too large, or too slow to compile
    |   `-- InvalidChatTemplate      the template refused the messages, or ran too long
    |-- ModelError                   the checkpoint cannot be served
    |   |-- ModelNotFound
    |   |-- InvalidCheckpoint        truncated, malformed or lying files
    |   |-- UnsupportedArchitecture
    |   |-- UnsupportedConfigValue
    |   |-- UnsupportedTokenizer
    |   `-- WeightMismatch           lists missing, unexpected and wrongly shaped tensors
    |-- CapacityError                HTTP 429 / 503
    |   `-- CacheTooSmall            the request could never fit into the KV cache
    |-- NotFinite                    HTTP 500: the model's output for one request is not a number
    `-- EngineDead                   HTTP 500: carries the worker's traceback

A message says what happened with the values, why it is refused, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NONFINITE_LOGITS = "the model's output is not a finite number"  # the stop reason of a completion that ends with "error"


class NanoVllmError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(NanoVllmError, ValueError):
    """An option is unknown, malformed, or cannot be honoured."""


class NotEnoughMemory(ConfigError):
    """The model or its KV cache cannot fit into the memory that it was given."""


class RequestError(NanoVllmError, ValueError):
    """One request is refused at the door."""


class InvalidSamplingParams(RequestError):
    """A sampling parameter has the wrong type or an impossible value."""


class InvalidPrompt(RequestError):
    """A prompt is empty, of the wrong type, or has token ids that the model does not know."""


class PromptTooLong(RequestError):
    """A prompt leaves no room for one generated token within `max_model_len`."""


class InvalidGrammar(RequestError):
    """A JSON schema, regular expression or grammar is malformed, uses what is not supported, or is too costly."""


class InvalidChatTemplate(RequestError):
    """A chat template refused its messages, broke, or exceeded its limits."""


class ModelError(NanoVllmError):
    """A checkpoint cannot be served."""


class ModelNotFound(ModelError):
    """No model at the given folder, file or hub id."""


class InvalidCheckpoint(ModelError):
    """A model file is truncated, malformed, or contradicts itself."""


class UnsupportedArchitecture(ModelError):
    """No family in `models/registry.py` implements this architecture."""


class UnsupportedConfigValue(ModelError):
    """A checkpoint's config asks for something that would be computed wrongly; refused instead."""


class UnsupportedTokenizer(ModelError):
    """The checkpoint's tokenizer is of a kind that is not implemented."""


class WeightMismatch(ModelError):
    """The tensors of the checkpoint and the parameters of the model do not correspond one to one."""

    def __init__(self, missing: Iterable[str] = (), unexpected: Iterable[str] = (), wrong_shape: Iterable[str] = ()) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.wrong_shape = sorted(wrong_shape)
        parts = [
            f"{len(names)} {label}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            for label, names in (
                ("missing from the checkpoint", self.missing),
                ("unknown to the model", self.unexpected),
                ("of the wrong shape", self.wrong_shape),
            )
            if names
        ]
        super().__init__("checkpoint and model disagree; tensors " + "; ".join(parts))


class CapacityError(NanoVllmError):
    """There is no room for this now, or ever."""


class CacheTooSmall(CapacityError, ValueError):
    """A request needs more KV blocks than the whole cache has."""


class NotFinite(NanoVllmError):
    """The model computed NaN or infinity for one request, which ends with it; the others go on."""


class EngineDead(NanoVllmError, RuntimeError):
    """The engine failed earlier and takes no more work."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'top_k'?"` when something is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
