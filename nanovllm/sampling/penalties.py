"""Everything that changes a logit before the temperature: bias, penalties, masks.

Each feature is one function: it takes the rows of a batch, picks those which use it, puts its operands on the device,
and returns the edit to run at every step, or None. All tokens of the past are read from the token table on the device,
because the latest may not have reached the host. The draw is in `sampler.py`; knows nothing of temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.batch import RowSampling
from nanovllm.kernels.upload import upload
from nanovllm.structured.base import Matchers, begin_masks, num_mask_words

# Not -inf: masks that contradict each other (say min_tokens, and allowed_token_ids that are all stop tokens) leave the
# allowed tokens equal to each other, and still above the rest. Any finite logit vanishes beside it in float32.
FORBIDDEN = -1e20


class EditedRow(NamedTuple):
    sample: int  # line of the logits
    row: int  # line of the token table
    sampling: RowSampling


class EditedLogits:
    """The logits of one step on their way through the edits, which copy them only if they change something."""

    def __init__(self, logits: Tensor, positions: Sequence[int], token_table: Tensor) -> None:
        self.logits = logits  # [num_samples, vocab]
        self.positions = positions  # [num_samples] on the host
        self.token_table = token_table  # [max_num_seqs, max_model_len + 1] int32
        self.is_edited = False

    @cached_property
    def scores(self) -> Tensor:
        self.is_edited = True
        if self.logits.device.type == "cpu" and self.logits.dtype == torch.float32:
            return torch.from_numpy(self.logits.numpy().copy())  # torch would wake its threads for a tenth of a millisecond
        return self.logits.to(torch.float32, copy=True)

    @cached_property
    def positions_on_device(self) -> Tensor:
        return upload(list(self.positions), self.logits.device)  # [num_samples] int64


Edit = Callable[[EditedLogits], None]


def edits_logits(sampling: RowSampling) -> bool:
    """Whether a row needs any of this module."""
    params = sampling.params
    penalises = params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    restricts = params.allowed_token_ids is not None or bool(sampling.bad_words)
    restricts |= params.min_tokens > 0 and bool(sampling.stop_token_ids)  # without them nothing could end it early
    return penalises or restricts or params.logit_bias is not None


def build_edits(rows: list[EditedRow], device: torch.device) -> list[Edit]:
    """The edits that these rows need, in order. Masks commute with penalties; they come last so that nothing lifts them."""
    pipeline = (logit_bias, repetition_penalty, output_penalties, allowed_tokens, bad_tokens, bad_phrases, min_tokens)
    return [edit for build in pipeline if (edit := build(rows, device)) is not None]


def apply_edits(edits: list[Edit], logits: Tensor, positions: Sequence[int], token_table: Tensor) -> Tensor:
    """Edited logits, [num_samples, vocab]: a float32 copy, or `logits` themselves if nothing was to change."""
    batch = EditedLogits(logits, positions, token_table)
    for edit in edits:
        edit(batch)
    return batch.scores if batch.is_edited else logits


def logit_bias(rows: list[EditedRow], device: torch.device) -> Edit | None:
    biases = [(r.sample, token, bias) for r in rows for token, bias in (r.sampling.params.logit_bias or {}).items()]
    if not biases:
        return None
    samples, tokens, values = (upload(column, device) for column in zip(*biases, strict=True))  # [m] each
    values = values.float()

    def add_bias(batch: EditedLogits) -> None:
        batch.scores[samples, tokens] += values

    return add_bias


def repetition_penalty(rows: list[EditedRow], device: torch.device) -> Edit | None:
    """Divide positive and multiply negative logits of all tokens in the prompt or the output."""
    rows = [r for r in rows if r.sampling.params.repetition_penalty != 1.0]
    if not rows:
        return None
    samples, table_rows = _index_columns(rows, device)
    penalties = upload([r.sampling.params.repetition_penalty for r in rows], device)[:, None]  # [r, 1]

    def penalise_repetition(batch: EditedLogits) -> None:
        longest = max(batch.positions[r.sample] for r in rows)
        tokens = batch.token_table[:, :longest].index_select(0, table_rows).long()  # [r, longest]
        is_past = torch.arange(longest, device=device) < batch.positions_on_device[samples][:, None]
        tokens = torch.where(is_past, tokens, tokens[:, :1])  # padding repeats a token: writes the same value again
        logits = batch.scores[samples[:, None], tokens]  # [r, longest]
        batch.scores[samples[:, None], tokens] = torch.where(logits > 0, logits / penalties, logits * penalties)

    return penalise_repetition


def output_penalties(rows: list[EditedRow], device: torch.device) -> Edit | None:
    """Subtract frequency_penalty for each time that a token was generated, and presence_penalty once."""
    rows = [r for r in rows if r.sampling.params.frequency_penalty or r.sampling.params.presence_penalty]
    if not rows:
        return None
    samples, table_rows = _index_columns(rows, device)
    frequency = upload([r.sampling.params.frequency_penalty for r in rows], device)[:, None]  # [r, 1]
    presence = upload([r.sampling.params.presence_penalty for r in rows], device)[:, None]  # [r, 1]
    prompt_lengths = upload([r.sampling.num_prompt_tokens for r in rows], device)[:, None]  # [r, 1]
    first = min(r.sampling.num_prompt_tokens for r in rows)
    counts: Tensor | None = None  # [r, vocab], all 0 between the steps: clearing what was counted beats a new tensor

    def penalise_output(batch: EditedLogits) -> None:
        nonlocal counts
        last = max(batch.positions[r.sample] for r in rows)
        if last <= first:
            return
        columns = torch.arange(first, last, device=device)
        is_output = (columns >= prompt_lengths) & (columns < batch.positions_on_device[samples][:, None])
        tokens = batch.token_table[:, first:last].index_select(0, table_rows).long()  # [r, last - first]
        tokens = torch.where(is_output, tokens, 0)  # padding adds 0 to the count of token 0, which stays right
        if counts is None:
            counts = batch.scores.new_zeros(len(rows), batch.scores.shape[-1])
        times = counts.scatter_add_(1, tokens, is_output.float()).gather(1, tokens)  # [r, last - first]
        counts.scatter_(1, tokens, 0.0)
        logits = batch.scores[samples[:, None], tokens]
        batch.scores[samples[:, None], tokens] = logits - frequency * times - presence * (times > 0)

    return penalise_output


def allowed_tokens(rows: list[EditedRow], device: torch.device) -> Edit | None:
    rows = [r for r in rows if r.sampling.params.allowed_token_ids is not None]
    if not rows:
        return None
    lines, _ = _index_columns(rows, device)
    samples, tokens = _upload_pairs([(r.sample, t) for r in rows for t in r.sampling.params.allowed_token_ids or ()], device)

    def keep_allowed(batch: EditedLogits) -> None:
        allowed = batch.scores[samples, tokens].clamp_(min=FORBIDDEN)  # [m]; above the rest even if the model says -inf
        batch.scores.index_fill_(0, lines, -torch.inf)
        batch.scores[samples, tokens] = allowed

    return keep_allowed


def bad_tokens(rows: list[EditedRow], device: torch.device) -> Edit | None:
    """bad_words of one token: forbidden always."""
    pairs = [(r.sample, word[0]) for r in rows for word in r.sampling.bad_words if len(word) == 1]
    if not pairs:
        return None
    samples, tokens = _upload_pairs(pairs, device)
    forbidden = torch.full((len(pairs),), FORBIDDEN, device=device)

    def forbid_tokens(batch: EditedLogits) -> None:
        batch.scores.index_put_((samples, tokens), forbidden)

    return forbid_tokens


def bad_phrases(rows: list[EditedRow], device: torch.device) -> Edit | None:
    """bad_words of several tokens: the last is forbidden while the text, prompt included, ends with the others."""
    phrases = [(r, word) for r in rows for word in r.sampling.bad_words if len(word) > 1]
    if not phrases:
        return None
    samples, tokens = _upload_pairs([(r.sample, word[-1]) for r, word in phrases], device)
    table_rows = upload([r.row for r, _ in phrases], device)[:, None]  # [w, 1]
    longest = max(len(word) for _, word in phrases) - 1
    padded = [[-1] * (longest + 1 - len(word)) + list(word[:-1]) for _, word in phrases]
    beginnings = upload(list(chain.from_iterable(padded)), device).view(-1, longest)  # [w, longest], from the right

    def forbid_endings(batch: EditedLogits) -> None:
        columns = batch.positions_on_device[samples][:, None] + torch.arange(-longest, 0, device=device)  # [w, longest]
        latest = batch.token_table[table_rows, columns.clamp(min=0)]  # [w, longest]
        matches = (beginnings < 0) | ((latest == beginnings) & (columns >= 0))
        _forbid_where(matches.all(-1), batch.scores, samples, tokens)

    return forbid_endings


def min_tokens(rows: list[EditedRow], device: torch.device) -> Edit | None:
    """Forbid the tokens that would end the sequence before `min_tokens` are generated."""
    rows = [r for r in rows if r.sampling.params.min_tokens > 0 and r.sampling.stop_token_ids]
    if not rows:
        return None
    ends = {r.sample: r.sampling.num_prompt_tokens + r.sampling.params.min_tokens for r in rows}  # first position free to end
    pairs = [(r.sample, token) for r in rows for token in r.sampling.stop_token_ids]
    samples, tokens = _upload_pairs(pairs, device)
    end_positions = upload([ends[sample] for sample, _ in pairs], device)  # [m]

    def forbid_early_end(batch: EditedLogits) -> None:
        if any(batch.positions[sample] < end for sample, end in ends.items()):
            _forbid_where(batch.positions_on_device[samples] < end_positions, batch.scores, samples, tokens)

    return forbid_early_end


def grammar_masks(matchers: Matchers, vocab_size: int, device: torch.device) -> Edit:
    """What grammars allow. For one step: the matchers are asked now, while the forward pass is under way.

    Comes last and forbids for good: where nothing that is allowed is left, the allowed tokens are equal to each other.
    """
    masks, _ = upload_masks(matchers, max(matchers) + 1, vocab_size, device)
    if device.type == "cpu":
        return _keep_in_grammar_on_cpu(list(matchers), masks.numpy(), vocab_size)
    lines = upload(list(matchers), device)  # [m]
    bits = (masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1  # [m, words, 32]
    ceiling = bits.flatten(1)[:, :vocab_size].float().sub_(0.5).mul_(torch.inf)  # [m, vocab]: inf or -inf

    def keep_in_grammar(batch: EditedLogits) -> None:
        scores = batch.scores.index_select(0, lines).clamp_(min=FORBIDDEN)
        batch.scores.index_copy_(0, lines, torch.minimum(scores, ceiling, out=scores))

    return keep_in_grammar


def _keep_in_grammar_on_cpu(lines: list[int], masks: np.ndarray, vocab_size: int) -> Edit:
    """The same by numpy: a row is 20 us of work, for which torch would wake its threads six times."""
    ceiling = np.unpackbits(masks.view(np.uint8), axis=1, count=vocab_size, bitorder="little").astype(np.float32)
    ceiling -= np.float32(0.5)
    ceiling *= np.float32(np.inf)  # [m, vocab]: inf or -inf

    def keep_in_grammar(batch: EditedLogits) -> None:
        scores = batch.scores.numpy()
        for line, row_ceiling in zip(lines, ceiling):
            row = scores[line]
            np.maximum(row, np.float32(FORBIDDEN), out=row)
            np.minimum(row, row_ceiling, out=row)  # both keep what is not a number

    return keep_in_grammar


def upload_masks(matchers: Matchers, num_samples: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks, [m, num_mask_words] int32, in which a set bit is an allowed token; the line of each sample, [num_samples] int32.

    A sample without a mask has the line -1. One copy, of bits, because bytes would be 8 times as many.
    """
    words_per_mask = num_mask_words(vocab_size)
    on_host = torch.empty(num_samples + len(matchers) * words_per_mask, dtype=torch.int32, pin_memory=device.type == "cuda")
    array = on_host.numpy()
    lines, masks = array[:num_samples], array[num_samples:].reshape(len(matchers), words_per_mask)
    lines.fill(-1)
    lines[list(matchers)] = np.arange(len(matchers))
    begin_masks(list(matchers.values()), masks)()
    on_device = on_host.to(device, non_blocking=True)
    return on_device[num_samples:].view(len(matchers), -1), on_device[:num_samples]


def _forbid_where(condition: Tensor, scores: Tensor, samples: Tensor, tokens: Tensor) -> None:
    """Adds, since a token may be in several of the pairs, of which only some apply."""
    scores.index_put_((samples, tokens), torch.where(condition, FORBIDDEN, 0.0), accumulate=True)


def _index_columns(rows: list[EditedRow], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lines of the logits, lines of the token table: [r] int64 each."""
    return _upload_pairs([(r.sample, r.row) for r in rows], device)


def _upload_pairs(pairs: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = upload(list(chain.from_iterable(pairs)), device).view(-1, 2).T
    return first, second
