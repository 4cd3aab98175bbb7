"""POST /v1/completions: prompts in, text out. Speaks OpenAI's protocol with vLLM's additions.

One answer may hold several prompts, each with `n` choices: choice `prompt * n + i`. What a field means stands in
`fields.py`. Read next: `chat.py`, which adds templates, tools and reasoning.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm.outputs import GenerationOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.answers import Identity, begin, token_names, whole_reply
from nanovllm.server.errors import BadField
from nanovllm.server.fields import refused
from nanovllm.server.logprobs import completion_logprobs, joined, prompt_logprobs
from nanovllm.server.params import make_params, structured_of
from nanovllm.server.prompts import check_model, encode_prompt, read_prompts
from nanovllm.server.protocol import CompletionChoice, CompletionRequest, CompletionResponse, GenerationFields, Usage
from nanovllm.server.streaming import DONE, ChunkWriter, Delta, Deltas, Outputs, finished, merged, usage_of, usage_options

if TYPE_CHECKING:
    from nanovllm.server.context import Server

PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
REFUSED = refused(PATH)


async def create_completion(request: Request) -> Response:
    server: Server = request.app.state.server
    body = await server.read(request, CompletionRequest, REFUSED)
    check_model(server, body.model)
    params = await _params(server, body)
    prompts = read_prompts(server, body.prompt, "prompt")
    room = params.max_tokens or 1
    ids = [await encode_prompt(server, prompt, body, room) for prompt in prompts]
    identity = Identity.of(server, request, "cmpl-", body.request_id)
    answer = Answer(server, body, params, identity, prompts, ids)
    streams = begin(server, request, ids, params, body, identity)
    if body.stream:
        return server.sse(request, answer.events(streams))
    return await whole_reply(params, answer.whole, await server.run(request, finished(streams)))


async def _params(server: Server, body: CompletionRequest) -> SamplingParams:
    check_stream_options(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadField("best_of", f"best_of={body.best_of} must equal n: completions are not ranked")
    options: dict[str, Any] = {}
    if body.echo and body.logprobs is not None:
        options["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # the prompt alone is wanted; the engine has to generate something, which is dropped
    structured = await structured_of(server, body)
    if structured is not None:
        options["structured"] = structured
    return make_params(body, max_tokens=max_tokens, logprobs=body.logprobs, **options)


def check_stream_options(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options", "stream_options goes with stream=true, and only with it")


class Answer:
    """One answer: whole, or chunk by chunk."""

    def __init__(
        self,
        server: Server,
        body: CompletionRequest,
        params: SamplingParams,
        identity: Identity,
        prompts: list[str | list[int]],
        ids: list[list[int]],
    ) -> None:
        self._body, self._params, self._identity = body, params, identity
        self._tokenizer = server.engine.tokenizer
        self._names = token_names(server, body, params)
        self._is_prompt_only = body.max_tokens == 0
        self._offsets: dict[int, Callable[[int], int]] = {}  # by choice, because a stream goes on
        self._echoes = [self._echo(prompt, one) for prompt, one in zip(prompts, ids)]

    def _echo(self, prompt: str | list[int], token_ids: list[int]) -> str:
        """The text that is put before an answer."""
        if not self._body.echo:
            return ""
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        return self._tokenizer.decode(token_ids, self._params.skip_special_tokens)

    def whole(self, outputs: list[GenerationOutput]) -> CompletionResponse:
        deltas = [(number, output, Deltas(self._params.n).take(output)) for number, output in enumerate(outputs)]
        choices = [self._choice(number, output, delta) for number, output, found in deltas for delta in found]
        return CompletionResponse(**self._identity.head("text_completion"), choices=choices, usage=self._usage(outputs))

    async def events(self, streams: list[Outputs]) -> AsyncIterator[bytes]:
        include_usage, continuous = usage_options(self._body)
        writer = ChunkWriter(self._identity.head("text_completion"), include_usage)
        deltas = [Deltas(self._params.n) for _ in streams]
        outputs: dict[int, GenerationOutput] = {}
        async with aclosing(merged(streams)) as growing:
            async for number, output in growing:
                outputs[number] = output
                choices = [self._choice(number, output, delta) for delta in deltas[number].take(output)]
                if continuous:
                    usage = self._usage(outputs.values())
                    yield b"".join([writer.chunk_with(choice, usage=usage) for choice in choices])
                elif choices:
                    yield writer.chunk(choices[0]) if len(choices) == 1 else b"".join(map(writer.chunk, choices))
        if include_usage:
            yield writer.chunk_with(None, usage=self._usage(outputs.values()))
        yield DONE

    def _choice(self, number: int, output: GenerationOutput, delta: Delta) -> CompletionChoice:
        """What a completion has grown. A whole answer is one delta; the first one brings what belongs to the prompt."""
        body = self._body
        if self._is_prompt_only:
            delta.text, delta.token_ids, delta.logprobs = "", [], delta.logprobs and []
        choice = CompletionChoice(
            index=number * self._params.n + delta.index,
            text=delta.text,
            logprobs=None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if body.return_token_ids else None,
        )
        if delta.logprobs is not None:
            if choice.index not in self._offsets:
                self._offsets[choice.index] = self._names.offsets(len(self._echoes[number]))
            choice.logprobs = completion_logprobs(self._names, delta.token_ids, delta.logprobs, self._offsets[choice.index])
        if delta.is_first and (body.echo or body.return_token_ids or body.prompt_logprobs is not None):
            self._add_prompt(choice, number, output)
        return choice

    def _add_prompt(self, choice: CompletionChoice, number: int, output: GenerationOutput) -> None:
        body, names = self._body, self._names
        choice.text = self._echoes[number] + choice.text
        if body.return_token_ids:
            choice.prompt_token_ids = output.prompt_token_ids
        if body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(names, output.prompt_logprobs, body.prompt_logprobs)
        if body.echo and choice.logprobs is not None and output.prompt_logprobs is not None:
            before = completion_logprobs(names, output.prompt_token_ids, output.prompt_logprobs, names.offsets(0), body.logprobs)
            choice.logprobs = joined(before, choice.logprobs)

    def _usage(self, outputs: Iterable[GenerationOutput]) -> Usage:
        usage = usage_of(outputs)
        if self._is_prompt_only:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage


routes = [Route(PATH, create_completion, methods=["POST"])]
