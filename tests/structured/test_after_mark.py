"""A grammar that begins after a mark: before it everything but an end is allowed, and the answer never loses its form."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from served import make_tokenizer
from structured.model import PERSON, allowed_tokens, make_llm
from structured.test_scheduling import MaskedExecutor, pick
from support import VOCAB_SIZE, assert_nothing_is_held, drain, greedy, make_scheduler, next_token
from test_real_model import pytestmark as needs_the_model
from test_tokenizer import byte_level_backend

from nanovllm import SamplingParams, StructuredOutput
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import AddRequest
from nanovllm.errors import InvalidGrammar
from nanovllm.recovery.keeper import Keeper
from nanovllm.server.reasoning import ReasoningSplitter
from nanovllm.structured.after_mark import MAX_LINE_BREAKS, AfterMark, MarkMasks
from nanovllm.structured.base import begin_masks, num_mask_words
from nanovllm.structured.llguidance_backend import LLGuidanceGrammar
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

END = b"<end>"
OPEN, CLOSE = "<think>", "</think>"
LETTERS = [bytes([byte]) for byte in b"<>/thinkabc\n "]
SPLIT = [
    END,
    *LETTERS,
    b"</",
    b"think",
    b"<th",
    b"\n\n",
    b"\n\n\n",
    b">\n",
    b">a",
    b">\n\n\n",
    b"nk>ab",
    b"k>\n\n",
    b"a</think>b",
    b"><",
    b"",
    b"</t",
]
WHOLE = [*SPLIT, CLOSE.encode(), OPEN.encode(), b"</think>\n\n", b"<think>\n"]  # fmt: skip
FORM = "abc"


class Spells:
    """A matcher for one text."""

    def __init__(self, tokens: Sequence[bytes], text: str = FORM) -> None:
        self.tokens, self.rest = tokens, text.encode()
        self.error: str | None = None

    def fill_mask(self, mask: np.ndarray) -> None:
        mask.fill(0)
        for token_id, text in enumerate(self.tokens):
            if (text and self.rest.startswith(text)) or (not self.rest and text == END):
                mask[token_id // 32] |= np.uint32(1 << token_id % 32).view(np.int32)

    def accept(self, token_id: int) -> str | None:
        text = self.tokens[token_id]
        if self.error is None and text and self.rest.startswith(text):
            self.rest = self.rest[len(text) :]
            return None if self.rest else "stop"
        if self.error is None and not self.rest and text == END:
            return "stop"
        self.error = self.error or f"{text!r} does not fit"
        return "error"


def marked(tokens: Sequence[bytes], opened_by: str | None = None, form: str = FORM) -> AfterMark:
    masks = MarkMasks(tokens, [0], CLOSE, opened_by)
    return AfterMark(Spells(tokens, form), masks, None if opened_by is None else Spells(tokens, form))


def allowed(matcher: AfterMark, tokens: Sequence[bytes]) -> list[bytes]:
    return [tokens[token_id] for token_id in allowed_tokens(matcher, len(tokens))]


def read(matcher: AfterMark, tokens: Sequence[bytes], *texts: bytes) -> str | None:
    """Each text is one token, which the mask must have allowed. The last verdict."""
    reason = None
    for text in texts:
        assert reason is None and text in allowed(matcher, tokens), text
        reason = matcher.accept(tokens.index(text))
    return reason


class TestMatcher:
    def test_before_the_mark_everything_is_allowed_but_an_end_and_what_runs_over_the_mark(self):
        everything = set(WHOLE)
        matcher = marked(WHOLE)
        assert set(allowed(matcher, WHOLE)) == everything - {END, b"a</think>b"}
        read(matcher, WHOLE, b"</", b"think")
        assert set(allowed(matcher, WHOLE)) == everything - {END, b"a</think>b", b">a", b"><", b">\n\n\n"}
        read(matcher, WHOLE, b"a")
        assert set(allowed(matcher, WHOLE)) == everything - {END, b"a</think>b"}

    @pytest.mark.parametrize(
        "mark",
        [
            [CLOSE.encode()],
            [b"</", b"think", b">"],
            [b"<", b"/", b"t", b"h", b"i", b"n", b"k", b">"],
            [b"<", b"</", b"think", b">"],  # begun twice
            [b"</", b"t", b"h", b"</t", b"h", b"i", b"n", b"k", b">"],
            [b"a", b"</t", b"h", b"i", b"n", b"k>\n\n"],
            [b"</think>\n\n"],
        ],
    )
    def test_the_mark_may_be_cut_in_any_way(self, mark):
        assert read(matcher := marked(WHOLE), WHOLE, b"a", b" ", *mark, b"a", b"b") is None
        assert allowed(matcher, WHOLE) == [b"c"]
        assert read(matcher, WHOLE, b"c") == "stop"

    def test_a_few_line_breaks_belong_to_the_mark(self):
        for breaks in ([], [b"\n"], [b"\n", b"\n"], [b"\n\n"]):
            matcher = marked(WHOLE)
            read(matcher, WHOLE, CLOSE.encode(), *breaks)
            left = MAX_LINE_BREAKS - len(b"".join(breaks))
            assert set(allowed(matcher, WHOLE)) == {b"a", *[b"\n", b"\n\n"][:left]}
            assert read(matcher, WHOLE, b"a", b"b", b"c") == "stop"

    def test_the_answer_may_hold_the_mark_again(self):
        matcher = marked(SPLIT, form="a</think>b")
        assert read(matcher, SPLIT, b"</", b"think", b">", b"a", b"</", b"think", b">") is None
        assert allowed(matcher, SPLIT) == [b"b"]

    def test_who_may_open_or_answer_does_either(self):
        assert set(allowed(marked(WHOLE, OPEN), WHOLE)) == {b"a", b"<think>", b"<think>\n"}  # not a piece of the mark
        assert set(allowed(marked(SPLIT, OPEN), SPLIT)) == {b"a", b"<", b"<th"}
        assert read(marked(WHOLE, OPEN), WHOLE, b"a", b"b", b"c") == "stop"
        assert read(marked(WHOLE, OPEN), WHOLE, b"<think>\n", b"</", b"think", b">\n", b"a", b"b", b"c") == "stop"
        assert read(marked(SPLIT, OPEN), SPLIT, b"<th", b"i", b"n", b"k", b">a", b"c", b"</", b"think", b">", b"a") is None

    def test_a_beginning_that_both_share_decides_nothing(self):
        matcher = marked(SPLIT, OPEN, "<thab")
        read(matcher, SPLIT, b"<th")
        assert set(allowed(matcher, SPLIT)) == {b"i", b"a"}
        assert read(matcher, SPLIT, b"a", b"b") == "stop"
        thinking = marked(SPLIT, OPEN, "<thab")
        read(thinking, SPLIT, b"<th", b"i")
        assert set(allowed(thinking, SPLIT)) == {b"n", b"nk>ab"}

    def test_where_the_opening_is_one_token_its_pieces_are_those_of_the_form(self):
        matcher = marked(WHOLE, OPEN, "<thab")
        assert set(allowed(matcher, WHOLE)) == {b"<", b"<th", b"<think>", b"<think>\n"}
        read(matcher, WHOLE, b"<th")
        assert allowed(matcher, WHOLE) == [b"a"]

    def test_a_form_that_is_complete_within_the_opening_mark(self):
        complete = marked(SPLIT, OPEN, "<think")
        assert read(complete, SPLIT, b"<th", b"i", b"n", b"k") is None
        assert set(allowed(complete, SPLIT)) == {b">", b">a", b">\n", b"><", b">\n\n\n", END}
        read(complete, SPLIT, b">a")  # so it was no answer
        assert END not in allowed(complete, SPLIT) and b" " in allowed(complete, SPLIT)

    def test_what_goes_wrong_is_told_by_the_matcher_behind(self):
        for start in ([CLOSE.encode()], [CLOSE.encode(), b"\n"]):
            matcher = marked(WHOLE)
            read(matcher, WHOLE, *start)
            assert matcher.accept(WHOLE.index(b"c")) == "error" and matcher.error == "b'c' does not fit"
        matcher = marked(WHOLE, OPEN)
        assert matcher.accept(WHOLE.index(b"c")) == "error" and matcher.error == "b'c' does not fit"

    @settings(max_examples=300, deadline=None)
    @given(
        tokens=st.sampled_from([SPLIT, WHOLE]),
        opened_by=st.sampled_from([None, OPEN]),
        form=st.sampled_from([FORM, "<a>", "<think", CLOSE, "\na"]),
        seed=st.integers(0, 10**9),
    )
    def test_whatever_is_drawn_the_answer_has_its_form(self, tokens, opened_by, form, seed):
        """And whoever splits the text later finds the same answer."""
        matcher, choose, texts, reason = marked(tokens, opened_by, form), random.Random(seed), [], None
        likely = {text for text in tokens if text and (text in CLOSE.encode() or CLOSE.encode() in text)}
        while reason is None and len(texts) < 2000:
            some = allowed(matcher, tokens)
            liked = [text for text in some if text in likely]
            texts.append(choose.choice(liked if liked and choose.random() < 0.8 else some))
            reason = matcher.accept(tokens.index(texts[-1]))
        assert reason in ("stop", None), matcher.error
        text = b"".join(texts).removesuffix(END).decode()
        if opened_by is None or text.startswith(OPEN):
            _, mark, answer = text.partition(CLOSE)
            assert mark or reason is None
            assert re.fullmatch(r"\n{0,2}" + re.escape(form), answer) or reason is None
        else:
            answer = text
            assert answer == form
        splitter = ReasoningSplitter(starts_inside=opened_by is None)
        pieces = splitter.push(text) + splitter.finish()
        if reason == "stop":
            assert "".join(piece for is_reasoning, piece in pieces if not is_reasoning) == (
                answer.lstrip() if CLOSE in text and (opened_by is None or text.startswith(OPEN)) else answer
            )


def test_masks_of_many_are_those_of_each_alone():
    """Matchers of different kinds in one step, and those whose place another one has taken."""

    calls: list[int] = []

    class Together(Spells):
        @staticmethod
        def begin_together(matchers: Sequence[Together], masks: np.ndarray) -> Callable[[], None]:
            assert all(type(matcher) is Together for matcher in matchers) and not masks.any()
            calls.append(len(matchers))

            def finish() -> None:
                for matcher, mask in zip(matchers, masks, strict=True):
                    matcher.fill_mask(mask)

            return finish

    masks = MarkMasks(WHOLE, [0], CLOSE)
    thinking, over = (AfterMark(Together(WHOLE), masks) for _ in range(2))
    read(over, WHOLE, CLOSE.encode(), b"a")
    for matchers in (
        [Together(WHOLE), thinking, over, Together(WHOLE, "c")],
        [thinking, over],
        [over, Together(WHOLE)],
        [thinking],
    ):
        together = np.zeros((len(matchers), num_mask_words(len(WHOLE))), dtype=np.int32)
        begin_masks(matchers, together)()
        for matcher, mask in zip(matchers, together, strict=True):
            matcher.fill_mask(alone := np.zeros_like(mask))
            assert (alone == mask).all()
    assert calls == [3, 1, 2]


class TestGrammar:
    def test_the_marks_of_a_real_vocabulary(self):
        tokenizer = Tokenizer(TokenizerParts(byte_level_backend()))
        end = tokenizer.token_to_id("</s>")
        grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size + 5, [end])
        form = StructuredOutput("json_schema", {"enum": ["</think>"]}, after=CLOSE, opened_by=OPEN)
        for thought in ("", f"{OPEN}\nHm, so </thin, or what?\n{CLOSE}\n\n"):
            matcher = grammar.compile(form)
            token_ids = tokenizer.encode_literally(thought + '"</think>"')
            for number, token_id in enumerate(token_ids):
                assert token_id in allowed_tokens(matcher, tokenizer.vocab_size + 5), (thought, number)
                assert matcher.accept(token_id) == ("stop" if number == len(token_ids) - 1 else None)
        assert grammar.compile(form).error is None  # the compiled one has not moved

    def test_threads_fill_the_masks_of_those_that_have_thought(self):
        """Beside some that still think, and some that began at once."""
        tokenizer = Tokenizer(TokenizerParts(byte_level_backend()))
        grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.token_to_id("</s>")], num_threads=4)
        form = StructuredOutput("regex", "[a-z]{3}[0-9]+")
        plain, thinking = [grammar.compile(form) for _ in range(4)], replace(form, after=CLOSE)
        still, over = [grammar.compile(thinking) for _ in range(3)], [grammar.compile(thinking) for _ in range(3)]
        for number, matcher in enumerate(over):
            for token_id in tokenizer.encode_literally("Hm." + CLOSE + "\nabc"[: number + 1]):
                assert matcher.accept(token_id) is None
        matchers = [one for three in zip(plain, still, over) for one in three] + plain[3:]
        masks = np.zeros((len(matchers), num_mask_words(tokenizer.vocab_size)), dtype=np.int32)
        begin_masks(matchers, masks)()
        for matcher, mask in zip(matchers, masks, strict=True):
            matcher.fill_mask(alone := np.zeros_like(mask))
            assert (alone == mask).all() and mask.any()

    def test_a_bad_form_is_refused_as_ever(self):
        tokenizer = Tokenizer(TokenizerParts(byte_level_backend()))
        grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.token_to_id("</s>")])
        with pytest.raises(InvalidGrammar, match="regex"):
            grammar.compile(StructuredOutput("regex", "(", after=CLOSE))


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"after": ""}, "after must be a non-empty string, got ''"),
        ({"after": 7}, "after must be a non-empty string, got 7"),
        ({"after": "x" * 65}, "after has 65 characters; at most 64"),
        ({"after": "\ud800"}, "after has half of a surrogate pair"),
        ({"after": CLOSE, "opened_by": ""}, "opened_by must be a non-empty string"),
        ({"opened_by": OPEN}, "opened_by='<think>' needs after"),
    ],
)
def test_marks_that_make_no_sense_are_named(marks, message):
    with pytest.raises(InvalidGrammar, match=re.escape(message)):
        StructuredOutput("json_object", **marks)


def test_marks_travel_to_the_engine():
    params = SamplingParams(structured=StructuredOutput("choice", ["a"], after=CLOSE, opened_by=OPEN))
    message = AddRequest(0, "r", [1], params, [], 0, "")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=AddRequest).params == params


# --- in the engine, over a fake model


TOKENS = [b"%d" % (token % 7) for token in range(VOCAB_SIZE)]  # a text is a row of digits


class Mod:
    """A matcher that depends on all of its tokens."""

    error: str | None = None

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def fill_mask(self, mask: np.ndarray) -> None:
        mask.fill(0)
        for token in range(VOCAB_SIZE):
            if hash((*self.tokens, token)) % 3 == 0:
                mask[token // 32] |= np.uint32(1 << token % 32).view(np.int32)

    def accept(self, token_id: int) -> str | None:
        self.tokens.append(token_id)
        return "stop" if len(self.tokens) == 6 else None


class ModGrammar:
    masks = MarkMasks(TOKENS, [VOCAB_SIZE - 1], "35")

    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> AfterMark:
        return AfterMark(Mod(), self.masks)


def naive(prompt: list[int], max_tokens: int) -> list[int]:
    matcher, tokens = ModGrammar().compile(StructuredOutput("regex", "x")), list(prompt)
    for _ in range(max_tokens):
        tokens.append(pick(next_token(tokens), allowed_tokens(matcher, VOCAB_SIZE)))
        if matcher.accept(tokens[-1]):
            break
    return tokens[len(prompt) :]


def make_marked_engine(num_steps_ahead: int = 1, **options: Any) -> LLMEngine:
    scheduler = make_scheduler(max_num_seqs=6, **options)
    blocks = scheduler.block_manager
    return LLMEngine(
        scheduler,
        MaskedExecutor(blocks.num_blocks, blocks.block_size),
        vocab_size=VOCAB_SIZE,
        max_model_len=blocks.num_blocks * blocks.block_size,
        num_steps_ahead=num_steps_ahead,
        grammar=ModGrammar(),
    )


THINKING: Any = greedy(structured=StructuredOutput("regex", "x", after="35"), n=2, max_tokens=60)
PROMPTS = [[i, 2 * i + 1, 5] for i in range(8)]


@pytest.mark.parametrize("num_steps_ahead", [0, 1, 2])
@pytest.mark.parametrize("num_blocks", [30, 90])
def test_whatever_the_schedule_each_sequence_thinks_for_itself(num_steps_ahead, num_blocks):
    engine = make_marked_engine(num_steps_ahead, num_blocks=num_blocks)
    outputs = [engine.output_of(engine.add_request(prompt, THINKING)) for prompt in PROMPTS]
    drain(engine)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert [completion.token_ids for completion in output.completions] == [naive(prompt, 60)] * 2
    reasons = [completion.finish_reason for output in outputs for completion in output.completions]
    assert {*reasons} == {"stop", "length"}
    assert num_blocks > 30 or sum(output.metrics.num_preemptions for output in outputs) > 0
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("num_steps", [2, 20, 40])
def test_after_a_crash_each_goes_on_where_it_was(tmp_path, num_steps):
    path, tokenizer = str(tmp_path / "journal"), make_tokenizer()
    engine = make_marked_engine(num_blocks=90)
    keeper = Keeper(engine, path, tokenizer, {}, 60.0)
    for prompt in PROMPTS[:3]:
        engine.add_request(prompt, THINKING)
    for _ in range(num_steps):
        engine.step()
    keeper._journal.close()  # as the kernel does with a killed process
    again = make_marked_engine(num_blocks=90)
    restored = Keeper(again, path, tokenizer, {}, 60.0)
    drain(again)
    entries = restored.entries()
    assert entries
    for entry in entries:
        prompt = entry.token_ids
        assert [completion.token_ids for completion in entry.completions] == [naive(prompt, 60)] * 2


# --- by the real model, which copies what it sees


EXAMPLES = "".join(
    f'Q: A {who}.\n<think>\nShort answer.\n</think>\n\n{{"name": "{name}", "age": {age}}}\n\n'
    for who, name, age in (("boy", "Bob", 7), ("girl", "Ann", 9))
)
ASKED = EXAMPLES + "Q: A man.\n"


def person(opened_by: str | None = OPEN, **options: Any) -> SamplingParams:
    form = StructuredOutput("json_schema", PERSON, after=CLOSE, opened_by=opened_by)
    return SamplingParams(**{"temperature": 0, "max_tokens": 60, "structured": form, **options})


class TestModel:
    pytestmark = needs_the_model

    def test_it_thinks_and_then_answers_in_form(self, llm):
        opens, inside, over = llm.generate(
            [ASKED, ASKED + "<think>\n", ASKED + "<think>\n\n</think>\n\n"], [person(), person(None), person()], use_tqdm=False
        )
        assert opens.text.startswith("<think>\nShort answer.\n</think>") and inside.text.startswith("Short answer.\n</think>")
        for output, answer in ((opens, opens.text), (inside, inside.text), (over, CLOSE + over.text)):
            assert output.completions[0].finish_reason == "stop"
            jsonschema.validate(json.loads(answer.partition(CLOSE)[2]), PERSON)

    def test_it_thinks_as_it_would_without_a_form(self, llm):
        free, formed = llm.generate([ASKED + "<think>\n"] * 2, [greedy(20), person(None)], use_tqdm=False)
        num_thought = len(llm.tokenizer.encode("Short answer.\n</think>", False))
        assert formed.token_ids[:num_thought] == free.token_ids[:num_thought]

    def test_batch_mates_and_steps_ahead_change_no_token(self, llm):
        drawn = [person(None, temperature=0.9, seed=seed, n=2, max_tokens=40) for seed in (1, 2)]
        mates = [greedy(24, ignore_eos=True), SamplingParams(max_tokens=24, structured=StructuredOutput("regex", "[a-z ]{50}"))]
        alone = [llm.generate([ASKED + "<think>\n"], params, use_tqdm=False)[0] for params in drawn]
        expected = [[one.token_ids for one in output.completions] for output in alone]
        prompts = [*[ASKED + "<think>\n"] * 2, "Once upon", "Say"]
        together = llm.generate(prompts, [*drawn, *mates], use_tqdm=False)[:2]
        assert [[one.token_ids for one in output.completions] for output in together] == expected
        with make_llm(num_steps_ahead=1, max_num_seqs=3, max_num_batched_tokens=64) as ahead:
            together = ahead.generate(prompts, [*drawn, *mates], use_tqdm=False)[:2]
            assert [[one.token_ids for one in output.completions] for output in together] == expected
            drain(ahead.engine)  # a step that was under way when the last one ended
            assert_nothing_is_held(ahead.engine)

    def test_what_may_end_it_while_it_thinks(self, llm):
        prompts = [ASKED + "<think>\n"] * 3
        asked = [person(None, max_tokens=4), person(None, stop="answer"), person(None, logit_bias={2: 100.0}, max_tokens=5)]
        cut, stopped, unended = (output.completions[0] for output in llm.generate(prompts, asked, use_tqdm=False))
        assert (cut.text, cut.finish_reason) == ("Short answer.\n", "length")
        assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("Short ", "stop", "answer")
        assert unended.finish_reason == "length" and 2 not in unended.token_ids
