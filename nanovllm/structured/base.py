"""The seam of structured output: a `Grammar` compiles what a user asks for, a `Matcher` follows one sequence.

A matcher belongs to its sequence, on the control plane: it survives a preemption, because the tokens that it has read
do. Before a token is drawn it says which tokens may come; afterwards the scheduler tells it which one came. A batch
carries the matchers of the chunks that draw under a grammar, and the model runner asks them for their masks once the
forward pass is under way, so that a GPU hides the work. Today's one backend is `llguidance_backend.py`; where its grammars
begin only after a mark, `after_mark.py` stands before it.
Knows no tensors, no requests and no scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from nanovllm.sampling_params import StructuredOutput

if TYPE_CHECKING:
    import numpy as np  # takes as long to import as the whole scheduler

BITS = 32  # tokens per word of a mask


class Matcher(Protocol):
    """One sequence's place in a grammar. Nothing here raises: what goes wrong is told by the next `accept`."""

    @property
    def error(self) -> str | None:
        """What went wrong."""
        ...

    def fill_mask(self, mask: np.ndarray) -> None:
        """Write all of it, [num_mask_words] int32: the bits of the tokens that may come next are 1, the others 0."""
        ...

    def accept(self, token_id: int) -> str | None:
        """Take the drawn token. Returns the reason for the sequence to end here, if there is one.

        "stop": the text is complete and nothing can follow it, or this token ends it. "error": the matcher has failed.
        """
        ...


Matchers = Mapping[int, Matcher]  # by the sample that has to follow them


def begin_masks(matchers: Sequence[Matcher], masks: np.ndarray) -> Callable[[], None]:
    """Begin to write what matcher i allows to line i of `masks`, [number of matchers, num_mask_words] int32.

    The masks are there when the function that is returned has been called; nobody may touch a matcher until then. A matcher
    may name another one that has taken its place (`current`). A grammar engine that has something better than one after the
    other brings it as `begin_together` of its matchers.
    """
    kinds = set(map(type, matchers))
    if any(hasattr(kind, "current") for kind in kinds):
        matchers = [getattr(matcher, "current", matcher) for matcher in matchers]
        kinds = set(map(type, matchers))
    begun = []
    for kind in kinds:
        begin_together = getattr(kind, "begin_together", None)
        if begin_together is not None and len(kinds) == 1:
            return begin_together(matchers, masks)
        lines = [line for line, matcher in enumerate(matchers) if type(matcher) is kind]
        if begin_together is not None:
            own = masks[lines]
            begun.append((begin_together([matchers[line] for line in lines], own), lines, own))
        else:
            for line in lines:
                matchers[line].fill_mask(masks[line])

    def finish() -> None:
        for finish_kind, lines, own in begun:
            finish_kind()
            masks[lines] = own

    return finish


class Grammar(Protocol):
    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> Matcher:
        """A matcher at the beginning of a text. Raises `InvalidGrammar`.

        `can_end_early=False`: do not offer an end token where the text could also go on (`ignore_eos`).
        """
        ...

    def prepare(self, structured: StructuredOutput) -> None:
        """The work of `compile`, on a thread beside the engine's, which then has next to none. Raises `InvalidGrammar`."""
        ...


def num_mask_words(vocab_size: int) -> int:
    """Token t is bit t % 32 of word t // 32."""
    return -(-vocab_size // BITS)
