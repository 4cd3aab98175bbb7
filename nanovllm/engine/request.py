"""Request: one user call, which becomes n sequences and one live output.

Owns the answer under construction. Text is optional: without a tokenizer the engine speaks token ids only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.engine.detokenizer import IncrementalDetokenizer, StopStrings
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, GenerationOutput, RequestMetrics, add_text
from nanovllm.tokenizer import Tokenizer


@dataclass(slots=True)
class Request:
    """`sequences[i]` produces `output.completions[i]`, through `detokenizers[i]` when there is a tokenizer."""

    sequences: list[Sequence]
    output: GenerationOutput
    detokenizers: list[IncrementalDetokenizer]
    num_unfinished: int

    @classmethod
    def begin(cls, sequences: list[Sequence], prompt: str | None, tokenizer: Tokenizer | None) -> Request:
        first = sequences[0]
        params = first.params
        completions = [CompletionOutput(index, logprobs=[] if params.logprobs is not None else None) for index in range(params.n)]
        metrics = RequestMetrics(first.arrival_time, num_prompt_tokens=first.num_prompt_tokens)
        output = GenerationOutput(first.request_id, prompt, list(first.token_ids), completions, metrics)
        detokenizers = []
        if tokenizer is not None:
            stop_strings = StopStrings(params.stop) if params.stop else None
            detokenizers = [IncrementalDetokenizer(tokenizer, params, stop_strings) for _ in sequences]
        return cls(sequences, output, detokenizers, len(sequences))

    def grow(self, sequence: Sequence, clock: Callable[[], float]) -> str | None:
        """Take over a sequence's new tokens. Returns the stop string that they completed, if any."""
        if self.output.metrics.first_token_time is None:
            self.output.metrics.first_token_time = clock()
            self._note_prompt()
        if sequence.sampling.pooling is not None:
            return None  # the result is the vector
        completion = self.output.completions[sequence.index]
        new_token_ids = sequence.token_ids[sequence.num_prompt_tokens + len(completion.token_ids) :]
        completion.token_ids.extend(new_token_ids)
        if completion.logprobs is not None:
            completion.logprobs.extend(sequence.logprobs[len(completion.logprobs) :])
        if not self.detokenizers:
            return None
        detokenizer = self.detokenizers[sequence.index]
        add_text(completion, detokenizer.append(new_token_ids))
        return detokenizer.stop_string

    def close_sequence(self, sequence: Sequence, now: float) -> None:
        """A sequence ended: flush its text, take over its reason; the last one closes the request."""
        completion = self.output.completions[sequence.index]
        completion.finish_reason, completion.stop_reason = sequence.finish_reason, sequence.stop_reason
        if sequence.finish_reason == "error" and sequence.matcher is not None and sequence.stop_reason is None:
            completion.stop_reason = sequence.matcher.error
        if sequence.sampling.pooling is not None and sequence.embedding is not None and sequence.finish_reason != "error":
            self.output.embedding, completion.finish_reason = sequence.embedding, "stop"
        if self.detokenizers:
            detokenizer = self.detokenizers[sequence.index]
            add_text(completion, detokenizer.finish())
            if detokenizer.stop_string is not None:
                completion.finish_reason, completion.stop_reason = "stop", detokenizer.stop_string
        self.num_unfinished -= 1
        if self.num_unfinished == 0:
            self._close(now)

    def _note_prompt(self) -> None:
        """What is known when the prompt is computed: with the first token."""
        first, metrics = self.sequences[0], self.output.metrics
        metrics.first_scheduled_time, metrics.num_cached_tokens = first.first_scheduled_time, first.num_cached_tokens
        if first.params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None, *first.prompt_logprobs]

    def _close(self, now: float) -> None:
        metrics = self.output.metrics
        if metrics.first_token_time is None:
            self._note_prompt()
        metrics.finish_time = now
        metrics.num_generated_tokens = sum(len(completion.token_ids) for completion in self.output.completions)
        metrics.num_preemptions = sum(sequence.num_preemptions for sequence in self.sequences)
        self.output.finished = True
