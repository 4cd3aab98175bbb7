"""The real model for the tests of structured output, and what several of them ask of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from nanovllm import LLM, SamplingParams, StructuredOutput
from nanovllm.outputs import CompletionOutput
from nanovllm.structured.base import Matcher, num_mask_words

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def make_llm(**options: Any) -> LLM:
    return LLM(num_threads=1, **{"dtype": "float32", "num_kv_blocks": 320, "max_num_seqs": 32, **options})


def prompt(llm: LLM, text: str = "Describe a person as JSON with a name and an age.") -> list[int]:
    return llm.apply_chat_template([{"role": "user", "content": text}])


def schema(**keywords: Any) -> StructuredOutput:
    return StructuredOutput("json_schema", keywords)


def greedy(structured: StructuredOutput | None, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 48, "structured": structured, **options})


def answer(llm: LLM, params: SamplingParams, text: str = "Describe a person as JSON with a name and an age.") -> CompletionOutput:
    (output,) = llm.generate([prompt(llm, text)], params, use_tqdm=False)
    return output.completions[0]


def allowed_tokens(matcher: Matcher, vocab_size: int) -> list[int]:
    mask = np.full(num_mask_words(vocab_size), 0x55AA55AA, dtype=np.int32)  # what was there before
    matcher.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def parsed(text: str) -> Any:
    return json.loads(text)
