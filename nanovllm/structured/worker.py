"""The process that compiles grammars of strangers; `checker.py` starts it, talks to it and kills it.

Reads lines of JSON: first the model's tokenizer, then one grammar after the other. Answers each with its error, or null.
Ends with its input. If its parent dies while a grammar takes long, an alarm ends it.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from nanovllm.errors import InvalidGrammar
from nanovllm.sampling_params import StructuredOutput
from nanovllm.structured.llguidance_backend import LLGuidanceGrammar
from nanovllm.tokenizer import Tokenizer

MAX_MEMORY_BYTES = 4 * 2**30  # of address space; reaching it ends the process
ALARM_FACTOR = 3  # times the deadline that the parent keeps


def main() -> None:
    limit_memory()
    model = json.loads(sys.stdin.readline())
    tokenizer = Tokenizer.from_json(model["tokenizer"])
    grammar = LLGuidanceGrammar(tokenizer, model["vocab_size"], model["end_token_ids"])
    error_of(grammar, StructuredOutput("json_object"))  # builds what all grammars share, outside of any deadline
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, ALARM_FACTOR * request["timeout_s"])
        error = error_of(grammar, StructuredOutput(request["kind"], request["value"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        say({"error": error})


def error_of(grammar: LLGuidanceGrammar, structured: StructuredOutput) -> str | None:
    try:
        grammar.compile(structured)
    except InvalidGrammar as error:
        return str(error)
    return None


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
