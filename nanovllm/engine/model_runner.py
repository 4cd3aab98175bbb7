"""ModelRunner: one rank's execution of a step. Rows in, tokens out.

Owns the model, the row state, the KV caches and the sampler. Knows rows, never sequences or requests. A step is:
write the changes into the rows, gather the inputs, run the model, project the positions that draw, sample, and write
the tokens back into the rows, where the next step finds them. Nothing here waits for the device; `PendingStep.result`
does. Read next: `runner/inputs.py`, `models/decoder.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionBackend
from nanovllm.engine.batch import ScheduledBatch, Seat
from nanovllm.forward_context import ForwardContext
from nanovllm.kernels.draw_token import draw_tokens
from nanovllm.kernels.gather_inputs import gather_inputs
from nanovllm.kernels.upload import upload
from nanovllm.models.decoder import Decoder
from nanovllm.runner.cuda_graphs import Bucket, CudaGraphs, StepTensors
from nanovllm.runner.inputs import StepInputs, build_inputs
from nanovllm.runner.pending import Events, PendingStep, begin_timing
from nanovllm.runner.pooling import PromptPooling
from nanovllm.runner.state import RowState
from nanovllm.sampling.logprobs import BatchLogprobs, prompt_logprobs
from nanovllm.sampling.sampler import SampledTokens, Sampler

MAX_LOGIT_ROWS = 256  # prompt positions projected at a time when prompt log-probabilities are asked for


class ModelRunner:
    def __init__(
        self,
        model: Decoder,
        backend: AttentionBackend,
        kv_caches: list[Tensor],
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.state = RowState(max_num_seqs, max_model_len, block_size, device)
        self.sampler = Sampler(model.spec.vocab_size, max_num_seqs, device)
        self.graphs: CudaGraphs | None = None
        self._events = Events() if device.type == "cuda" else None
        self._is_plain = True  # the graph filled last can draw for all its rows
        self.late_compiles: list[str] = []  # kernels compiled while serving; see kernels/compiles.py
        self._prompt_logprobs: dict[int, Seat] = {}  # row -> who asked for them
        self._pooling = PromptPooling()

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, before: PendingStep | None = None) -> PendingStep:
        """Execute one step, in order. The draw of the step `before`, if it is held, starts when this one's inputs are written."""
        filled = None if batch.seats else self._fill(batch)
        if before is not None:
            before.draw()
        started = begin_timing(self._events)
        self._update_state(batch)
        filled = self._fill(batch) if batch.seats else filled
        asks_prompt = bool(self._prompt_logprobs) and not self._prompt_logprobs.keys().isdisjoint(batch.rows)
        pools = self._pooling.is_asked(batch.rows)
        needs_all = asks_prompt or pools  # the final states of every token of the step
        if filled is not None and not needs_all:
            pending = self._replay(batch, filled)
        else:
            inputs = build_inputs(batch, self.state, self.block_size)
            context = self._context(inputs)
            if len(batch.sampled_chunks) < batch.num_tokens and not needs_all:
                context.needed_tokens, needed = inputs.last_tokens(batch.sampled_chunks)
                context.needed_plan = self.backend.plan(needed)
            hidden = self.model(inputs.input_ids, context)  # [num_needed or num_tokens, hidden_size]
            pending = self._sample(batch, inputs, hidden)
            if asks_prompt:
                pending.prompt_logprobs = self._score_prompts(batch, inputs, hidden)
            if pools:
                pending.embeddings = self._pooling.pool(batch, inputs.query_start, hidden)
        pending.end_timing(started, self._events)
        return pending

    execute_model = run

    def _update_state(self, batch: ScheduledBatch) -> None:
        for seat in batch.seats:
            self.sampler.seat(seat.row, seat.sampling)
            self._pooling.seat(seat)
            self._prompt_logprobs.pop(seat.row, None)
            if seat.sampling.params.prompt_logprobs is not None:
                self._prompt_logprobs[seat.row] = seat
        self.state.seat(batch.seats)
        self.state.update_blocks(batch.block_updates)
        if batch.block_copies:
            device = self.state.block_tables.device
            sources, destinations = torch.tensor(batch.block_copies, device=device).unbind(1)
            for kv_cache in self.kv_caches:
                self.backend.copy_blocks(kv_cache, sources, destinations)

    def _context(self, inputs: StepInputs) -> ForwardContext:
        rotary = self.model.rotary.at(inputs.positions)  # type: ignore[union-attr]  # made by finish_loading
        plan = self.backend.plan(inputs.attention)
        return ForwardContext(rotary, inputs.slot_mapping, self.kv_caches, self.backend, plan)

    def _sample(self, batch: ScheduledBatch, inputs: StepInputs, hidden: Tensor) -> PendingStep:
        """Project and draw for the chunks that reach their sequence's end, and only for those."""
        chunks = batch.sampled_chunks
        if not chunks:
            return PendingStep(batch.step)
        if len(chunks) < len(hidden):
            hidden = hidden.index_select(0, inputs.last_tokens(chunks)[0])  # [num_samples, hidden_size]
        logits = self.model.compute_logits(hidden)  # [num_samples, vocab_size]
        return self._draw(batch, logits)

    def _draw(self, batch: ScheduledBatch, logits: Tensor) -> PendingStep:
        """Draw now; under grammars, which must have read the tokens before, when `PendingStep.draw` is called."""
        if batch.matchers:
            return PendingStep(batch.step, held=lambda: self._draw_tokens(batch, logits))
        return PendingStep(batch.step).send(*self._draw_tokens(batch, logits))

    @torch.inference_mode()
    def _draw_tokens(self, batch: ScheduledBatch, logits: Tensor) -> SampledTokens:
        rows, positions = _sampled_places(batch)
        sampled = self.sampler.sample(logits, rows, positions.tolist(), self.state.token_ids, batch.matchers)
        device = logits.device
        self.state.write_sampled(upload(rows, device), upload(positions, device), sampled.token_ids)
        return sampled

    # --- the same step as one graph

    def forward_step(self, step: StepTensors, drawn: Tensor) -> Tensor:
        """All of a step's device work, without the host: what a CUDA graph captures. Returns the logits, [S, vocab]."""
        input_ids, slots = gather_inputs(
            step.token_rows, step.positions, self.state.token_ids, self.state.block_tables, self.block_size
        )
        rotary = self.model.rotary.at(step.positions)  # type: ignore[union-attr]
        context = ForwardContext(rotary, slots, self.kv_caches, self.backend, step.plan)
        if step.needed_plan is not None:
            context.needed_tokens, context.needed_plan = step.sample_tokens, step.needed_plan
        hidden = self.model(input_ids, context)
        logits = self.model.compute_logits(hidden)
        places = step.sample_rows, step.sample_positions, self.state.token_ids
        draw_tokens(logits, step.inverse_temperature, step.keys, *places, drawn, held=step.held, place=step.place)
        return logits

    def _fill(self, batch: ScheduledBatch) -> Bucket | None:
        """Write the inputs of the graph that fits, if one does, on the host."""
        if self.graphs is None:
            return None
        if (bucket := self.graphs.advance(batch)) is None:
            rows, positions = _sampled_places(batch)
            inverse_temperature, keys, self._is_plain = self.sampler.plain_operands(rows, positions)
            bucket = self.graphs.fill(batch, positions, inverse_temperature, keys, bool(batch.matchers) or not self._is_plain)
        return bucket

    def _replay(self, batch: ScheduledBatch, bucket: Bucket) -> PendingStep:
        replayed = self.graphs.replay(bucket, len(batch.sampled_chunks))  # type: ignore[union-attr]
        if not self._is_plain:
            return self._draw(batch, replayed.logits)
        if batch.matchers:
            return PendingStep(batch.step, replayed.draw_under_masks, lambda: replayed.masks.begin(batch.matchers))
        return PendingStep(batch.step).send(replayed.token_ids)

    def _score_prompts(self, batch: ScheduledBatch, inputs: StepInputs, hidden: Tensor) -> dict[int, list[BatchLogprobs]]:
        """Log-probabilities of the prompt tokens that follow each computed position, for the rows that asked."""
        scores = {}
        for chunk, row in enumerate(batch.rows):
            seat = self._prompt_logprobs.get(row)
            if seat is None:
                continue
            start = batch.starts[chunk]
            num_targets = min(batch.lengths[chunk], seat.sampling.num_prompt_tokens - 1 - start)
            first = int(inputs.query_start[chunk])
            scores[chunk] = [
                prompt_logprobs(
                    self.model.compute_logits(hidden[first + offset : first + end]),
                    self.state.token_ids[row, start + offset + 1 : start + end + 1],
                    seat.sampling.params.prompt_logprobs or 0,
                )
                for offset in range(0, num_targets, MAX_LOGIT_ROWS)
                for end in (min(offset + MAX_LOGIT_ROWS, num_targets),)
            ]
        return scores


def _sampled_places(batch: ScheduledBatch) -> tuple[list[int], np.ndarray]:
    """Rows of the chunks that draw, and the positions that their tokens will take, [num_samples] int64."""
    chunks, positions = batch.sampled_chunks, np.array(batch.starts) + np.array(batch.lengths)
    return [batch.rows[chunk] for chunk in chunks], positions[np.array(chunks, dtype=np.int64)]
