"""A grammar that begins after a mark: what a model thinks before its answer is free, up to `</think>`.

`AfterMark` stands before the matcher of the grammar until the mark has been written, in one token or in many. Until then
every token may come but two kinds: those that end a text, or the answer could be empty; and those that write the last of
the mark together with the first of the answer, of which the grammar could not read half. Line breaks after the mark belong to it.
Where the model itself opens what it thinks (`opened_by`), the text may begin with that mark or with the grammar; who is
right is known when the first tokens have been drawn. Knows no tokenizer and no grammar engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanovllm.structured.base import BITS, Matcher, num_mask_words

MAX_LINE_BREAKS = 2  # after the mark, where models are trained to write them


class MarkMasks:
    """What tokens do to a mark. Of one vocabulary, for all sequences; each mask is [num_mask_words] int32."""

    def __init__(
        self, token_bytes: Sequence[bytes], end_token_ids: Sequence[int], after: str, opened_by: str | None = None
    ) -> None:
        """`token_bytes`: what each token of the vocabulary writes."""
        self.token_bytes = token_bytes
        self.mark, self.opening = after.encode(), (opened_by or "").encode()
        self._num_words = num_mask_words(len(token_bytes))
        # By how much of the mark, of the opening and of the line breaks has been written already, in bytes.
        closing = self._with(self.mark[-1:])
        everything = self._mask(range(len(token_bytes)))
        forbidden = [[*end_token_ids, *self._crossing(closing, num)] for num in range(len(self.mark))]
        self.free = [everything & ~self._mask(token_ids) for token_ids in forbidden]
        self.opens = [self._mask(token_ids) for token_ids in self._opening()]
        breaks = {token_id: text for token_id, text in self._with(b"\n") if self.is_break(text)}
        self.breaks = [
            self._mask([token_id for token_id, text in breaks.items() if num + len(text) <= MAX_LINE_BREAKS])
            for num in range(MAX_LINE_BREAKS + 1)
        ]

    @staticmethod
    def is_break(text: bytes) -> bool:
        return 0 < len(text) <= MAX_LINE_BREAKS and not text.strip(b"\n")

    def _with(self, part: bytes) -> list[tuple[int, bytes]]:
        return [(token_id, text) for token_id, text in enumerate(self.token_bytes) if part and part in text]

    def _crossing(self, closing: list[tuple[int, bytes]], num_written: int) -> list[int]:
        """Tokens that write the rest of the mark, and more than line breaks."""
        begun = self.mark[:num_written]
        rests = [(token_id, (begun + text).partition(self.mark)[2]) for token_id, text in closing]
        return [token_id for token_id, rest in rests if rest and not self.is_break(rest)]

    def _opening(self) -> list[list[int]]:
        """Tokens that go on with the opening. More may follow in the same token: it is thought already."""
        pieces = [(token_id, text) for token_id, text in enumerate(self.token_bytes) if text and text in self.opening]
        closing = self._with(self.opening[-1:])
        found: list[list[int]] = []
        for rest in (self.opening[num:] for num in range(len(self.opening))):
            whole = [token_id for token_id, text in closing if text.startswith(rest)]
            found.append([*whole, *(token_id for token_id, text in pieces if text != rest and rest.startswith(text))])
            if whole and len(found) == 1:
                return [whole]  # a vocabulary that has the mark as one token has it for this purpose
        return found

    def _mask(self, token_ids: Sequence[int]) -> np.ndarray:
        bits = np.zeros(self._num_words * BITS, dtype=np.uint8)
        bits[list(token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


class AfterMark:
    """`Matcher` of a sequence whose grammar begins after a mark."""

    def __init__(self, inner: Matcher, masks: MarkMasks, at_once: Matcher | None = None) -> None:
        """`inner`: reads what follows the mark. `at_once`: the same, for a text that does not begin with `masks.opening`."""
        self._masks, self._after_mark = masks, inner
        self._inner = at_once or inner
        self._place = "start" if at_once else "free"  # then "breaks", "inner"
        self._num_written = 0  # bytes of what is awaited at this place

    @property
    def error(self) -> str | None:
        return None if self._place in ("start", "free") else self._inner.error

    @property
    def current(self) -> Matcher:
        """Whom to ask for masks."""
        return self._inner if self._place == "inner" else self

    def fill_mask(self, mask: np.ndarray) -> None:
        masks, num_written = self._masks, self._num_written
        if self._place == "free":
            mask[:] = masks.free[num_written]
        elif self._place == "start" and self._inner.error is not None:
            mask[:] = masks.opens[num_written]
        elif self._place == "start":
            self._inner.fill_mask(mask)
            mask |= masks.opens[num_written]
        else:
            self._inner.fill_mask(mask)
            if self._place == "breaks":
                mask |= masks.breaks[num_written]

    def accept(self, token_id: int) -> str | None:
        text = self._masks.token_bytes[token_id]
        if self._place == "start":
            return self._begin(token_id, text)
        if self._place == "free":
            return self._think(text)
        if self._place == "breaks":
            num_written = self._num_written + len(text)
            if self._masks.is_break(text) and num_written <= MAX_LINE_BREAKS:
                self._num_written = num_written
                return None
            self._place = "inner"
        return self._inner.accept(token_id)

    def _begin(self, token_id: int, text: bytes) -> str | None:
        rest = self._masks.opening[self._num_written :]
        if text.startswith(rest):
            self._place, self._inner, self._num_written = "free", self._after_mark, 0
            return self._think(text[len(rest) :])
        reason = self._inner.accept(token_id)
        num_written = self._num_written + len(text)
        if text and rest.startswith(text) and num_written < len(self._masks.opens):
            self._num_written = num_written  # whatever the grammar thinks of it: it may be content with it, too
            return None
        self._place = "inner"
        return reason

    def _think(self, text: bytes) -> None:
        mark = self._masks.mark
        seen = mark[: self._num_written] + text
        _, is_over, after = seen.partition(mark)
        if is_over:
            self._place, self._num_written = "breaks", min(len(after), MAX_LINE_BREAKS)
        else:
            fits = (num for num in range(min(len(mark) - 1, len(seen)), 0, -1) if seen.endswith(mark[:num]))
            self._num_written = next(fits, 0)
