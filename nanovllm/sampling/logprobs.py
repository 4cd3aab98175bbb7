"""Log-probabilities of the model's own distribution, before any edit or filter.

Only the rows that asked pay, and only for a log-sum-exp and the few most likely tokens: no table of the vocabulary is
kept. Results stay on the device as a `BatchLogprobs` until the step is collected; `to_host` then turns them into what
users receive. Equal logits rank by token id, as in `filters.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nanovllm.outputs import PositionLogprobs, TokenLogprob
from nanovllm.sampling.filters import most_likely, row_blocks, tokens_ahead


@dataclass(frozen=True, slots=True)
class BatchLogprobs:
    """For m of the samples of a batch, with the `width` of the one that asked for most."""

    num_samples: int
    samples: tuple[int, ...]  # which samples of the batch asked, m of them
    num_top: tuple[int, ...]  # how many alternatives each asked for
    token_ids: Tensor  # [m] int64
    logprobs: Tensor  # [m] float32
    ranks: Tensor  # [m] int64, 1 is the most likely
    top_ids: Tensor  # [m, width] int64, most likely first
    top_logprobs: Tensor  # [m, width] float32

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BatchLogprobs:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    def to_host(self) -> list[PositionLogprobs | None]:
        """One entry per sample of the batch, None for those that did not ask. Waits for the device."""
        positions: list[PositionLogprobs | None] = [None] * self.num_samples
        chosen = zip(self.token_ids.tolist(), self.logprobs.tolist(), self.ranks.tolist(), strict=True)
        tops = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), self.num_top, strict=True)
        for sample, token, (ids, logprobs, count) in zip(self.samples, chosen, tops, strict=True):
            top = [TokenLogprob(*entry) for entry in zip(ids[:count], logprobs[:count], range(1, count + 1), strict=False)]
            positions[sample] = PositionLogprobs(TokenLogprob(*token), top)
        return positions


def sampled_logprobs(logits: Tensor, token_ids: Tensor, asked: dict[int, int], lines: Tensor) -> BatchLogprobs:
    """Of the samples in `asked` (sample: number of alternatives), which are the `lines`, [m], of `logits`, [n, vocab]."""
    samples = tuple(asked)
    if len(samples) < len(logits):
        logits, token_ids, num_samples = logits.index_select(0, lines), token_ids.index_select(0, lines), len(logits)
    else:
        num_samples = len(logits)
    tensors = _logprob_tensors(logits, token_ids, max(asked.values()))
    return BatchLogprobs(num_samples, samples, tuple(asked.values()), *tensors)


def prompt_logprobs(logits: Tensor, target_ids: Tensor, num_top: int) -> BatchLogprobs:
    """Of `target_ids`, [n], which are the tokens that follow, under `logits`, [n, vocab]."""
    num_targets = len(target_ids)
    tensors = _logprob_tensors(logits, target_ids, num_top)
    return BatchLogprobs(num_targets, tuple(range(num_targets)), (num_top,) * num_targets, *tensors)


def _logprob_tensors(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """token_ids, logprobs, ranks, top_ids, top_logprobs, as in `BatchLogprobs`."""
    num_top = min(num_top, logits.shape[-1])
    token_ids = token_ids.long().clamp(min=0)  # -1, no token, has none; what is said of it is dropped
    parts = [_logprobs_of_slice(logits[lines], token_ids[lines], num_top) for lines in row_blocks(logits, rows_on_cpu=4)]
    return token_ids, *(torch.cat(column) for column in zip(*parts, strict=True))


def _logprobs_of_slice(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.float()  # [b, vocab]
    total = logits.logsumexp(-1, keepdim=True)  # [b, 1]
    logprobs = (logits.gather(-1, token_ids[:, None]) - total)[:, 0]  # [b]
    ranks = tokens_ahead(logits, token_ids).sum(-1).long() + 1  # [b]
    top_logits, top_ids = most_likely(logits, num_top) if num_top else (total[:, :0], token_ids[:, None][:, :0])
    return logprobs, ranks, top_ids, top_logits - total
