"""POST /v1/completions: prompts in, text out. Speaks OpenAI's protocol with vLLM's additions.

One answer may hold several prompts, each with `n` choices: choice `prompt * n + i`. What a field means stands in
`fields.py`. Read next: `chat.py`, which adds templates, tools and reasoning.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.outputs import CompletionOutput, GenerationOutput, PositionLogprobs
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.answers import Identity, begin, token_names
from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.logprobs import TokenNames, completion_logprobs, prompt_logprobs
from nanovllm.server.params import make_params, structured_of
from nanovllm.server.prompts import check_model, prompt_ids, read_prompts
from nanovllm.server.protocol import CompletionChoice, CompletionRequest, CompletionResponse, GenerationFields
from nanovllm.server.respond import json_response
from nanovllm.server.streaming import DONE, ChunkWriter, Delta, Deltas, Outputs, finished, merged, usage_of

if TYPE_CHECKING:
    from nanovllm.server.context import Server

PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
REFUSED = refused(PATH)


async def create_completion(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, CompletionRequest, REFUSED)
    check_model(server, body.model)
    params = _params(body)
    prompts = read_prompts(server, body.prompt, "prompt")
    room = params.max_tokens or 1
    ids = [await prompt_ids(server, prompt, body, room) for prompt in prompts]
    identity = Identity.of(server, request, "cmpl-", body.request_id)
    echoes = [_echo(server, body, params, prompt, one) for prompt, one in zip(prompts, ids)]
    answer = Answer(body, identity, params.n, token_names(server, body), echoes)
    streams = begin(server, request, ids, params, body, identity)
    if body.stream:
        return server.sse(request, answer.events(streams))
    return json_response(answer.whole(await server.run(request, finished(streams))))


def _params(body: CompletionRequest) -> SamplingParams:
    check_stream_options(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadField("best_of", f"best_of={body.best_of} must equal n: completions are not ranked")
    options = {}
    if body.echo and body.logprobs is not None:
        if body.stream:
            raise BadField("echo", "echo with logprobs is not available in a stream: they are known when the answer ends")
        options["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # the prompt alone is wanted; the engine has to generate something, which is dropped
    structured = structured_of(body)
    if structured is not None:
        options["structured"] = structured
    return make_params(body, max_tokens=max_tokens, logprobs=body.logprobs, **options)


def check_stream_options(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options", "stream_options goes with stream=true, and only with it")
    if body.stream and body.prompt_logprobs is not None:
        raise BadField("prompt_logprobs", "prompt_logprobs is not available in a stream: they are known when the answer ends")


def _echo(server: Server, body: CompletionRequest, params: SamplingParams, prompt: str | list[int], token_ids: list[int]) -> str:
    """The text that is put before an answer."""
    if not body.echo:
        return ""
    if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
        return prompt
    return server.engine.tokenizer.decode(token_ids, params.skip_special_tokens)


class Answer:
    """One answer: whole, or chunk by chunk."""

    def __init__(self, body: CompletionRequest, identity: Identity, n: int, names: TokenNames, echoes: list[str]) -> None:
        self._body, self._identity, self._n, self._names, self._echoes = body, identity, n, names, echoes
        self._has_text = body.max_tokens != 0

    def whole(self, outputs: list[GenerationOutput]) -> CompletionResponse:
        choices = [self._choice(number, output, one) for number, output in enumerate(outputs) for one in output.completions]
        usage = usage_of(outputs)
        if not self._has_text:
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        return CompletionResponse(**self._identity.head("text_completion"), choices=choices, usage=usage)

    def _choice(self, number: int, output: GenerationOutput, completion: CompletionOutput) -> CompletionChoice:
        body, names = self._body, self._names
        token_ids, positions = completion.token_ids, completion.logprobs
        if not self._has_text:
            token_ids, positions = [], positions and []
        logprobs = None
        if positions is not None:
            before: list[PositionLogprobs | None] = _narrowed(output.prompt_logprobs, body.logprobs) if body.echo else []
            ids = output.prompt_token_ids + token_ids if body.echo else token_ids
            logprobs = completion_logprobs(names, ids, [*before, *positions])
        return CompletionChoice(
            index=number * self._n + completion.index,
            text=self._echoes[number] + (completion.text if self._has_text else ""),
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            token_ids=token_ids if body.return_token_ids else None,
            prompt_token_ids=output.prompt_token_ids if body.return_token_ids else None,
            prompt_logprobs=prompt_logprobs(names, output.prompt_logprobs) if body.prompt_logprobs is not None else None,
        )

    async def events(self, streams: list[Outputs]) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        writer = ChunkWriter(self._identity.head("text_completion"), include_usage)
        deltas = [Deltas(self._n) for _ in streams]
        outputs: dict[int, GenerationOutput] = {}
        async with aclosing(merged(streams)) as growing:
            async for number, output in growing:
                outputs[number] = output
                choices = [self._delta(number, output, delta) for delta in deltas[number].take(output)]
                if continuous:
                    usage = usage_of(outputs.values())
                    yield b"".join([writer.chunk_with(choice, usage=usage) for choice in choices])
                elif choices:
                    yield writer.chunk(choices[0]) if len(choices) == 1 else b"".join(map(writer.chunk, choices))
        if include_usage:
            yield writer.chunk_with(None, usage=usage_of(outputs.values()))
        yield DONE

    def _delta(self, number: int, output: GenerationOutput, delta: Delta) -> CompletionChoice:
        """The first one of a completion brings the echo along."""
        is_first = delta.start == 0 and self._is_first(number, delta.index)
        text = delta.text if self._has_text else ""
        choice = CompletionChoice(
            index=number * self._n + delta.index,
            text=self._echoes[number] + text if is_first else text,
            logprobs=None,
            finish_reason=delta.finish_reason,
        )
        return choice
