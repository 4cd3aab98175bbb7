"""Streaming: what a live output has grown, and the bytes that a client is sent for it.

Owns the deltas of an output, the merging of several requests into one stream, OpenAI's chunks, named events, and usage.
All of an answer that never changes is encoded once; a chunk costs the encoding of one small struct. Knows no endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from nanovllm.errors import NONFINITE_LOGITS, NanoVllmError, NotFinite
from nanovllm.outputs import GenerationOutput, PositionLogprobs
from nanovllm.server.errors import HttpError
from nanovllm.server.protocol import CompletionTokensDetails, GenerationFields, PromptTokensDetails, Usage

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
Outputs = AsyncIterator[GenerationOutput]


@dataclass(slots=True)
class Delta:
    """What one completion has grown since the last look."""

    index: int  # which of the n completions
    is_first: bool
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None  # of the last delta of a completion
    stop_reason: int | str | None


class Deltas:
    """Cuts the live output of one request into deltas. Their sum is the output, however often one looks."""

    def __init__(self, n: int) -> None:
        self._seen = [(0, 0, False)] * n  # characters, tokens, end

    def take(self, output: GenerationOutput) -> list[Delta]:
        found = []
        for index, completion in enumerate(output.completions):
            num_characters, num_tokens, has_ended = self._seen[index]
            if has_ended:
                continue
            text, token_ids = completion.text[num_characters:], completion.token_ids[num_tokens:]
            reason = completion.finish_reason
            if not (text or token_ids or reason):
                continue
            if reason == "error":
                raise _failure(completion.stop_reason)
            self._seen[index] = num_characters + len(text), num_tokens + len(token_ids), reason is not None
            logprobs = completion.logprobs and completion.logprobs[num_tokens : num_tokens + len(token_ids)]
            is_first = not (num_characters or num_tokens)
            found.append(Delta(index, is_first, text, token_ids, logprobs, reason, completion.stop_reason))
        return found


def _failure(reason: int | str | None) -> NanoVllmError:
    """With another reason it is the grammar's: no token of the vocabulary could follow. Without one it is ours."""
    if reason == NONFINITE_LOGITS:
        return NotFinite(reason)
    if isinstance(reason, str):
        return HttpError(400, f"no text of this form could be generated: {reason}", code="grammar_failed")
    return HttpError(500, "the generation failed", type="api_error", code="generation_failed")


async def merged(streams: Sequence[Outputs]) -> AsyncGenerator[tuple[int, GenerationOutput]]:
    """The outputs of several requests as they grow, each with its number. An error of one ends, and aborts, all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:  # type: ignore[type-var]
            async for output in stream:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, GenerationOutput | None]] = asyncio.Queue(2 * len(streams))
    tasks = [asyncio.ensure_future(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            number, output = await _next(queue, tasks)
            if output is None:
                num_open -= 1
            else:
                yield number, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(number: int, stream: Outputs, queue: asyncio.Queue[Any]) -> None:
    async with aclosing(stream):  # type: ignore[type-var]
        async for output in stream:
            await queue.put((number, output))
    await queue.put((number, None))


async def _next(queue: asyncio.Queue[Any], tasks: list[asyncio.Task[None]]) -> Any:
    """The next item; an error that has ended one of the tasks is raised instead of waiting for ever."""
    if not queue.empty():
        return queue.get_nowait()
    item = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait({item, *(task for task in tasks if not task.done())}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        return await item
    finally:
        item.cancel()


async def finished(streams: Sequence[Outputs]) -> list[GenerationOutput]:
    """Run requests to their end. Outputs in the order of the streams."""
    outputs: dict[int, GenerationOutput] = {}
    async with aclosing(merged(streams)) as growing:
        async for number, output in growing:
            outputs[number] = output
    return [outputs[number] for number in range(len(streams))]


# --- usage


def usage_of(outputs: Iterable[GenerationOutput], num_reasoning: int | None = None) -> Usage:
    """Of finished outputs, or of what there is so far."""
    num_prompt = num_completion = num_cached = 0
    for output in outputs:
        num_prompt += len(output.prompt_token_ids)
        num_completion += sum(len(completion.token_ids) for completion in output.completions)
        num_cached += output.metrics.num_cached_tokens
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        completion_tokens_details=None if num_reasoning is None else CompletionTokensDetails(reasoning_tokens=num_reasoning),
    )


def usage_options(body: GenerationFields) -> tuple[bool, bool]:
    """(usage in a last chunk, usage in every chunk)."""
    options = body.stream_options
    return bool(options and options.include_usage), bool(options and options.continuous_usage_stats)


# --- bytes


class ChunkWriter:
    """OpenAI's chunks of one answer."""

    def __init__(self, head: dict[str, Any], include_usage: bool) -> None:
        """`head`: id, object, created, model ...: all that stands before `choices`."""
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._rest: dict[str, Any] = {"usage": None} if include_usage else {}
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def chunk(self, choice: msgspec.Struct) -> bytes:
        return b"%b%b%b" % (self._head, _encode(choice), self._tail)

    def chunk_with(self, choice: msgspec.Struct | None, **extra: Any) -> bytes:
        """A chunk with more fields beside `choices`, such as usage. No choice: an empty list."""
        choices = b"" if choice is None else _encode(choice)
        return b"%b%b],%b\n\n" % (self._head, choices, _encode({**self._rest, **extra})[1:])


def named_event(event: msgspec.Struct) -> bytes:
    """An event whose name is its `type`: of /v1/responses and /v1/messages."""
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), _encode(event))  # type: ignore[attr-defined]
