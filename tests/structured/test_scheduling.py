"""Sequences with a grammar in the real engine over a fake model: whatever the schedule, each follows its own matcher.

The matcher here is a few lines of Python that depend on every token, and that notice a mask which is asked for before
all tokens have been accepted. The oracle is a loop over one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support import VOCAB_SIZE, FakeExecutor, assert_nothing_is_held, drain, greedy, make_scheduler, naive_generate, next_token

from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import InvalidGrammar
from nanovllm.sampling_params import StructuredOutput
from nanovllm.structured.base import Matcher, num_mask_words

RULE = StructuredOutput("regex", "rule 3")  # the fake grammar reads the number


class RuleMatcher:
    """A token may come if the tokens so far and it, hashed, are a multiple of the rule; nothing follows every 41st hash."""

    def __init__(self, rule: int, fails_after: int | None = None) -> None:
        self.rule, self.fails_after = rule, fails_after
        self.tokens: list[int] = []
        self.num_masks = 0
        self.error: str | None = None

    def fill_mask(self, mask: np.ndarray) -> None:
        assert self.error or self.num_masks == len(self.tokens), "a mask was asked for while a token was under way"
        self.num_masks += 1
        mask.fill(0)
        for token in self.allowed():
            mask[token // 32] |= np.uint32(1 << token % 32).view(np.int32)

    def allowed(self) -> list[int]:
        return [token for token in range(VOCAB_SIZE) if hash((*self.tokens, token)) % self.rule == 0] or [0]

    def accept(self, token_id: int) -> str | None:
        if self.fails_after is not None and len(self.tokens) >= self.fails_after:
            self.error = "as told"
            return "error"
        self.tokens.append(token_id)
        return "stop" if hash(tuple(self.tokens)) % 41 == 0 else None


class RuleGrammar:
    def __init__(self, fails_after: int | None = None) -> None:
        self.fails_after = fails_after

    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> RuleMatcher:
        if "bad" in structured.text:
            raise InvalidGrammar("a bad rule")
        return RuleMatcher(int(structured.text.split()[-1]), self.fails_after)


def pick(wish: int, allowed: AbstractSequence[int]) -> int:
    return next((token for token in allowed if token >= wish), allowed[0])


class MaskedExecutor(FakeExecutor):
    """Draws the wished token, or the next one that the mask lets through; when the next step comes, or its result is wanted.

    The masks it has filled before, when it was told that it may.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self._held: list[tuple[Matcher, list[int], int, int]] = []  # matcher, tokens of the row, place, entry of the result
        self._masks: list[list[int]] = []  # of the held: the allowed tokens

    def dispatch(self, batch: ScheduledBatch) -> None:
        self._draw_held()
        super().dispatch(batch)
        for entry, matcher in batch.matchers.items():
            chunk = batch.sampled_chunks[entry]
            tokens = self._tokens[batch.rows[chunk]]
            self._held.append((matcher, tokens, len(tokens) - 1, entry))

    def collect(self) -> StepResult:
        if len(self._pending) == 1:
            self._draw_held()
        return super().collect()

    def begin_draw(self) -> None:
        if len(self._pending) == 1 and not self._masks:
            self._fill_masks()

    def _fill_masks(self) -> None:
        for matcher, *_ in self._held:
            matcher.fill_mask(mask := np.zeros(num_mask_words(VOCAB_SIZE), np.int32))
            self._masks.append(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

    def _draw_held(self) -> None:
        if not self._masks:
            self._fill_masks()
        for (_, tokens, place, entry), allowed in zip(self._held, self._masks, strict=True):
            tokens[place] = pick(tokens[place], allowed)
            self._pending[-1][1].token_ids[entry][0] = tokens[place]
        self._held.clear()
        self._masks.clear()


def naive_constrained(prompt: list[int], max_tokens: int, rule: int) -> list[int]:
    matcher, tokens = RuleMatcher(rule), list(prompt)
    for _ in range(max_tokens):
        tokens.append(pick(next_token(tokens), matcher.allowed()))
        if matcher.accept(tokens[-1]):
            break
    return tokens[len(prompt) :]


def make_engine(num_steps_ahead: int = 1, grammar: Any = None, **options: Any) -> LLMEngine:
    scheduler = make_scheduler(**options)
    blocks = scheduler.block_manager
    executor = MaskedExecutor(blocks.num_blocks, blocks.block_size)
    return LLMEngine(
        scheduler,
        executor,
        vocab_size=VOCAB_SIZE,
        max_model_len=blocks.num_blocks * blocks.block_size,
        num_steps_ahead=num_steps_ahead,
        grammar=grammar or RuleGrammar(),
    )


def ruled(rule: int, **options: Any) -> Any:
    return greedy(structured=StructuredOutput("regex", f"rule {rule}"), **options)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20), st.integers(0, 4), st.integers(1, 30)),
        min_size=1,
        max_size=6,
    ),
    num_steps_ahead=st.integers(0, 3),
    num_blocks=st.integers(14, 60),
    budget=st.sampled_from([2, 7, 64]),
    max_num_seqs=st.integers(1, 5),
    policy=st.sampled_from(["fcfs", "priority", "prefill_first"]),
)
def test_every_output_is_that_of_one_sequence_alone(requests, num_steps_ahead, num_blocks, budget, max_num_seqs, policy):
    engine = make_engine(num_steps_ahead, num_blocks=num_blocks, budget=budget, max_num_seqs=max_num_seqs, policy=policy)
    outputs, expected = [], []
    for prompt, rule, max_tokens in requests:  # rule 0: no grammar
        params = ruled(rule, max_tokens=max_tokens) if rule else greedy(max_tokens)
        outputs.append(engine.output_of(engine.add_request(prompt, params)))
        expected.append(naive_constrained(prompt, max_tokens, rule) if rule else naive_generate(prompt, max_tokens))
    drain(engine)
    assert [output.token_ids for output in outputs] == expected
    assert_nothing_is_held(engine)


def test_preempted_sequences_keep_their_place():
    engine = make_engine(num_blocks=12, max_num_seqs=4)
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    outputs = [engine.output_of(engine.add_request(prompt, ruled(2, max_tokens=30))) for prompt in prompts]
    drain(engine)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert [output.token_ids for output in outputs] == [naive_constrained(prompt, 30, 2) for prompt in prompts]


def test_each_completion_has_a_matcher_of_its_own():
    engine = make_engine()
    output = engine.output_of(engine.add_request([1, 2, 3], ruled(3, n=3, max_tokens=12)))
    drain(engine)
    assert [completion.token_ids for completion in output.completions] == [naive_constrained([1, 2, 3], 12, 3)] * 3


def test_a_grammar_does_not_keep_the_next_step_from_being_dispatched():
    engine = make_engine(num_steps_ahead=1)
    engine.add_request([1, 2, 3], greedy(12))
    engine.add_request([4, 5, 6], ruled(1, max_tokens=6))
    drain(engine)
    batches = engine.executor.batches
    plain, grammar = (seat.row for seat in batches[0].seats)
    steps = {row: [batch.step for batch in batches if row in batch.rows] for row in (plain, grammar)}
    assert steps[plain] == list(range(12)) and steps[grammar][:3] == [0, 1, 2]
    calls = [call for call, _ in engine.executor.log]
    assert calls[:5] == ["dispatch", "dispatch", "collect", "dispatch", "collect"]


@pytest.mark.parametrize("num_steps_ahead", [0, 1])
def test_a_matcher_that_fails_ends_its_request_alone(num_steps_ahead):
    engine = make_engine(num_steps_ahead, RuleGrammar(fails_after=3))
    failing = engine.output_of(engine.add_request([1, 2], ruled(1, max_tokens=20)))
    mate = engine.output_of(engine.add_request([3, 4], greedy(15)))
    drain(engine)
    assert (failing.completions[0].finish_reason, failing.completions[0].stop_reason) == ("error", "as told")
    assert failing.token_ids[:3] == naive_constrained([1, 2], 3, 1) and len(failing.token_ids) == 4
    assert mate.token_ids == naive_generate([3, 4], 15) and mate.completions[0].finish_reason == "length"
    assert_nothing_is_held(engine)


def test_an_abort_needs_no_goodbye():
    engine = make_engine()
    request_id = engine.add_request([1, 2, 3], ruled(1, n=2, max_tokens=20))
    for _ in range(4):
        engine.step()
    engine.abort(request_id)
    drain(engine)
    assert_nothing_is_held(engine)


def test_an_invalid_grammar_is_refused_at_the_door_and_changes_nothing():
    bad = greedy(structured=StructuredOutput("regex", "bad"))
    plain = greedy(5, n=2)
    untouched, engine = make_engine(), make_engine()
    with pytest.raises(InvalidGrammar, match="a bad rule"):
        engine.add_request([1, 2, 3], bad, request_id="mine")
    assert not engine.has_work
    assert_nothing_is_held(engine)
    for one in (untouched, engine):
        one.add_request([1, 2, 3], plain, request_id="mine")
    first, second = ([(s.seq_id, s.sampling) for s in one._requests["mine"].sequences] for one in (untouched, engine))
    assert first == second


def test_a_batch_with_one_invalid_grammar_leaves_nothing_behind():
    engine = make_engine()
    with pytest.raises(InvalidGrammar, match="a bad rule"):
        engine.generate([[1], [2]], [greedy(5), greedy(structured=StructuredOutput("regex", "bad"))])
    assert_nothing_is_held(engine)


def test_an_engine_without_a_grammar_engine_says_so():
    engine = make_engine()
    engine._door._grammar = None
    with pytest.raises(InvalidGrammar, match="built without one"):
        engine.add_request([1], greedy(structured=RULE))
