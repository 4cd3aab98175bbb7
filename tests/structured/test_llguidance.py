"""The llguidance backend over tokenizers of all kinds: masks are right, ends are right, faults are named."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest
import tokenizers
from structured.model import PERSON, allowed_tokens, schema
from test_tokenizer import byte_level_backend, sentencepiece_backend, unigram_backend

from nanovllm import StructuredOutput
from nanovllm.errors import InvalidGrammar
from nanovllm.structured import llguidance_backend, mask_budget
from nanovllm.structured.base import begin_masks, num_mask_words
from nanovllm.structured.llguidance_backend import LLGuidanceGrammar, LLGuidanceMatcher
from nanovllm.structured.mask_budget import FREE_SECONDS, SECONDS_AT_ONCE, SECONDS_PER_ENDED, MaskBudget
from nanovllm.structured.mask_threads import MaskThreads
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level_backend,
    "SentencePiece": sentencepiece_backend,
}


class Model:
    """A tokenizer and its grammars, with a few rows of embedding that no token has."""

    def __init__(self, backend: tokenizers.Tokenizer, end: str = "</s>") -> None:
        self.tokenizer = Tokenizer(TokenizerParts(backend))
        self.end = self.tokenizer.token_to_id(end)
        self.vocab_size = self.tokenizer.vocab_size + 7
        self.grammar = LLGuidanceGrammar(self.tokenizer, self.vocab_size, [self.end])

    def compile(self, structured: StructuredOutput, can_end_early: bool = True) -> LLGuidanceMatcher:
        return self.grammar.compile(structured, can_end_early)

    def allowed(self, matcher: LLGuidanceMatcher) -> set[int]:
        return set(allowed_tokens(matcher, self.vocab_size))

    def walk(self, structured: StructuredOutput, seed: int, max_tokens: int = 400) -> tuple[str, str | None]:
        """A text of random tokens that the masks allow, and the reason why it ended."""
        matcher, choose, token_ids, reason = self.compile(structured), random.Random(seed), [], None
        while reason is None and len(token_ids) < max_tokens:
            token_id = choose.choice(sorted(self.allowed(matcher)))
            token_ids.append(token_id)
            reason = matcher.accept(token_id)
        return self.tokenizer.decode(token_ids), reason


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> Model:
    return Model(KINDS[request.param]())


@pytest.fixture(scope="module")
def byte_level() -> Model:
    return Model(byte_level_backend())


def test_random_texts_satisfy_their_schema(model):
    schemas = [
        PERSON,
        {"type": "array", "items": {"enum": ["a", "ß", 3, None]}, "maxItems": 3},
        {"type": "string", "pattern": "^[0-9]{3}-[a-z]+$", "maxLength": 9},
        {
            "anyOf": [
                {"type": "boolean"},
                {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False},
            ]
        },
    ]
    ends = 0
    for one, seed in itertools.product(schemas, range(6)):
        text, reason = model.walk(schema(**one), seed)
        if reason == "stop":
            ends += 1
            jsonschema.validate(json.loads(text), one)
    assert ends >= 20, "random numbers may be long, but most texts end"


def test_random_texts_match_their_expression(model):
    for expression, seed in itertools.product(
        [r"[ab]{2,5}", r"(fox|dog)(, (fox|dog)){0,2}\.", r"\d{4}-\d{2}", r"天[地玄]?|🎉"], range(5)
    ):
        text, reason = model.walk(StructuredOutput("regex", expression), seed)
        assert reason == "stop" and re.fullmatch(expression, text)


def test_choices_may_hold_anything(model):
    choices = ['say "hi"', "a\\b\nc\t", "x/y/", "天地🎉", "\u0001", "don't", "I", "Id", "{}", "a" * 60]
    seen = {model.walk(StructuredOutput("choice", choices), seed)[0] for seed in range(60)}
    assert seen <= set(choices) and len(seen) > 5


def test_special_tokens_in_a_text_are_spelled_out(model):
    texts = ["a</s>b", "<s>", "</s>"]
    for seed, text in enumerate(texts):
        matcher, token_ids, reason = model.compile(StructuredOutput("choice", [text])), [], None
        while reason is None:
            token_ids.append(random.Random(seed).choice(sorted(model.allowed(matcher))))
            reason = matcher.accept(token_ids[-1])
        assert reason == "stop" and model.tokenizer.decode(token_ids, skip_special_tokens=False) == text
        assert not set(token_ids) & model.tokenizer.special_token_ids


def test_a_vocabulary_without_all_characters_spells_what_it_can():
    model = Model(unigram_backend())
    assert {model.walk(StructuredOutput("choice", ["lazy dog", "brown fox"]), seed) for seed in range(9)} == {
        ("lazy dog", "stop"),
        ("brown fox", "stop"),
    }
    assert model.walk(StructuredOutput("choice", ["fox{"]), 0)[1] == "error"


def test_a_mask_holds_exactly_the_tokens_that_fit(byte_level):
    """Of `[0-9a-z]{1,3}x?`, where it is easy to say."""
    fits = re.compile(rb"[0-9a-z]{1,3}x?")
    after = {b"": fits, b"1": re.compile(rb"[0-9a-z]{1,2}x?|x"), b"12a": re.compile(rb"x")}
    for text, rest in after.items():
        matcher = byte_level.compile(StructuredOutput("regex", "[0-9a-z]{1,3}x?"))
        for byte in text:
            assert matcher.accept(byte_level.tokenizer.token_to_id(chr(byte))) is None
        spelled = {token_id: byte_level.tokenizer.token_bytes(token_id) for token_id in range(byte_level.vocab_size)}
        expected = {
            token_id
            for token_id, data in spelled.items()
            if rest.fullmatch(data) and token_id not in byte_level.tokenizer.special_token_ids
        }
        assert byte_level.allowed(matcher) == expected | ({byte_level.end} if text else set())


def test_the_end_is_allowed_where_the_text_may_end(byte_level):
    matcher = byte_level.compile(StructuredOutput("regex", "a{2,3}"))
    a = byte_level.tokenizer.token_to_id("a")
    assert byte_level.end not in byte_level.allowed(matcher)
    assert matcher.accept(a) is None and byte_level.end not in byte_level.allowed(matcher)
    assert matcher.accept(a) is None and byte_level.allowed(matcher) == {a, byte_level.end}
    assert matcher.accept(a) == "stop"  # nothing can follow: no token is spent on saying so
    other = byte_level.compile(StructuredOutput("regex", "a{2,3}"))
    assert [other.accept(a), other.accept(a), other.accept(byte_level.end)] == [None, None, "stop"]


def test_an_early_end_can_be_left_out(byte_level):
    matcher = byte_level.compile(StructuredOutput("regex", "a*"), can_end_early=False)
    assert byte_level.end not in byte_level.allowed(matcher)
    empty = byte_level.compile(StructuredOutput("regex", "(a)?b{0}"), can_end_early=False)
    assert byte_level.end not in byte_level.allowed(empty)


def test_a_token_that_does_not_fit_is_an_error_that_stays(byte_level):
    matcher = byte_level.compile(StructuredOutput("regex", "a+"))
    b = byte_level.tokenizer.token_to_id("b")
    assert matcher.accept(b) == "error" and "doesn't satisfy the grammar" in matcher.error
    assert "<state>" not in matcher.error
    assert byte_level.allowed(matcher) == {byte_level.end}
    assert matcher.accept(b) == "error" and matcher.accept(byte_level.end) == "error"


def test_a_matcher_that_breaks_tells_it_with_the_next_token(byte_level):
    class Broken:
        def unsafe_compute_mask_ptr(self, *_):
            raise BaseException("as a panic")

    matcher = LLGuidanceMatcher(Broken(), [byte_level.end], True, MaskBudget())
    assert byte_level.allowed(matcher) == {byte_level.end}
    assert matcher.accept(byte_level.end) == "error" and "as a panic" in matcher.error


def test_nothing_allowed_is_an_error(byte_level):
    class Silent:
        def unsafe_compute_mask_ptr(self, *_):
            pass

        def is_error(self):
            return False

    matcher = LLGuidanceMatcher(Silent(), [byte_level.end], True, MaskBudget())
    matcher.fill_mask(np.zeros(num_mask_words(byte_level.vocab_size), np.int32))
    assert matcher.accept(3) == "error" and matcher.error == "no token fits here"


@pytest.mark.parametrize("number", [1, 7, 8, 30])
def test_threads_fill_the_masks_that_one_would(number):
    byte_level = Model(byte_level_backend())
    byte_level.grammar._budget = MaskBudget(num_threads=4)
    sources = [StructuredOutput("regex", f"a{{{i + 1}}}[b-{chr(99 + i % 20)}]+") for i in range(number)]
    a, size = byte_level.tokenizer.token_to_id("a"), (number, num_mask_words(byte_level.vocab_size))
    matchers, alone = ([byte_level.compile(source) for source in sources] for _ in range(2))
    for _ in range(3):
        masks, expected = np.full(size, 0x55AA55AA, np.int32), np.zeros(size, np.int32)
        begin_masks(matchers, masks)()
        for matcher, mask in zip(alone, expected, strict=True):
            matcher.fill_mask(mask)
        assert np.array_equal(masks, expected) and masks.any(axis=1).all()
        for matcher in (*matchers, *alone):
            if a in byte_level.allowed(matcher):
                assert matcher.accept(a) is None


@pytest.fixture
def strands_taken(monkeypatch) -> list[LLGuidanceMatcher]:
    """What each matcher of a sequence is a copy of."""
    taken, fork = [], LLGuidanceMatcher.fork

    def noted(self: LLGuidanceMatcher, can_end_early: bool, budget: MaskBudget) -> LLGuidanceMatcher:
        if budget.num_threads > 1:  # else one that is being compiled
            taken.append(self)
        return fork(self, can_end_early, budget)

    monkeypatch.setattr(LLGuidanceMatcher, "fork", noted)
    return taken


def test_threads_seldom_meet_at_one_compiled_grammar(strands_taken):
    """Copies of one share what they learn, under a lock: threads would wait for each other."""
    byte_level = Model(byte_level_backend())
    byte_level.grammar._budget = MaskBudget(num_threads=3)
    source, other = StructuredOutput("regex", "a+"), StructuredOutput("regex", "b+")
    for _ in range(18):
        byte_level.compile(source)
    assert strands_taken[:6] == strands_taken[6:12] == strands_taken[12:] and len(set(strands_taken)) == 6
    byte_level.compile(other)
    assert strands_taken[18] not in strands_taken[:18]


def test_where_there_are_many_grammars_each_has_fewer_compiled_copies(monkeypatch):
    monkeypatch.setattr(llguidance_backend, "MAX_STRANDS", 9)
    byte_level = Model(byte_level_backend())
    byte_level.grammar._budget = MaskBudget(num_threads=3)
    compiled = byte_level.grammar._compiled
    for text, expected in (("a+", [6]), ("b+", [4, 4]), ("c+", [3, 3, 3]), ("d+", [2, 2, 2, 2])):
        for _ in range(8):
            byte_level.compile(StructuredOutput("regex", text))
        assert [len(strands) for strands in compiled.values()] == expected
    for number in range(16):
        byte_level.compile(StructuredOutput("regex", f"e{{{number + 1}}}"))
    assert {len(strands) for strands in compiled.values()} == {1}


def test_a_copy_that_compiles_slower_than_the_first_refuses_nobody(monkeypatch):
    byte_level, source = Model(byte_level_backend()), StructuredOutput("regex", "a+")
    byte_level.grammar._budget = MaskBudget(num_threads=3)
    byte_level.grammar.prepare(source)
    monkeypatch.setattr(llguidance_backend, "MAX_COMPILE_SECONDS", -1)
    byte_level.grammar.prepare(source)
    assert byte_level.compile(source).accept(byte_level.tokenizer.token_to_id("a")) is None
    with pytest.raises(InvalidGrammar, match="compile"):
        byte_level.grammar.prepare(StructuredOutput("regex", "b+"))


def test_after_a_grammar_is_prepared_the_engine_compiles_nothing_more(strands_taken, monkeypatch):
    """A thread beside the engine's prepares: a request of many completions, or the copies for threads, stop no step."""
    byte_level = Model(byte_level_backend())
    grammar, compiled_by = byte_level.grammar, []
    grammar._budget = MaskBudget(num_threads=3)
    compile_one = grammar._compile
    monkeypatch.setattr(grammar, "_compile", lambda source: (compiled_by.append(threading.get_ident()), compile_one(source))[1])
    for source in (StructuredOutput("regex", "a+"), StructuredOutput("regex", "b+", after="c", opened_by="d")):
        compiled_by.clear()
        for num_prepared in (1, 2, 3, 4, 5, 6, 6):
            thread = threading.Thread(target=grammar.prepare, args=[source])
            thread.start()
            thread.join()
            strands_taken.clear()
            for _ in range(8):
                grammar.compile(source)
            assert threading.get_ident() not in compiled_by
            assert len(compiled_by) == num_prepared
        if source.after is None:
            assert len(set(strands_taken)) == 6


class Clock:
    processor = wall = 0.0


def test_lots_are_drawn_only_after_masks_have_taken_long():
    clock = Clock()
    budget = MaskBudget(lambda: clock.wall, num_threads=4)
    budget.note_together(64, FREE_SECONDS)
    assert budget.draw_lots(64, 4) == set()
    budget.note_together(64, 2 * FREE_SECONDS)
    clock.wall += 1
    assert [len(budget.draw_lots(64, 4)) for _ in range(mask_budget.NUM_STEPS_WATCHED + 2)] == [
        4
    ] * mask_budget.NUM_STEPS_WATCHED + [0, 0]


def test_who_is_slow_now_and_then_is_watched_until_the_time_is_made_good():
    """Else a mask that is slow just after the last lots were drawn would never be paid."""
    clock = Clock()
    budget = MaskBudget(lambda: clock.wall, num_threads=4)
    num_watched = 0
    for step in range(200):
        num_watched += bool(budget.draw_lots(64, 4))
        if step == 0:
            clock.wall += 0.3
            budget.note_together(64, 0.3)
        clock.wall += 0.01
    assert 0.3 / mask_budget.SHARE_OF_TIME / 0.01 - 3 < num_watched < 0.3 / mask_budget.SHARE_OF_TIME / 0.01 + 3


class Inner:
    """A matcher of the library that allows everything, and takes its time by a clock of ours: while the threads take theirs."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
        ctypes.memset(address, 0xFF, num_bytes)
        self.clock.processor += self.seconds

    def is_error(self) -> bool:
        return False


def filled_by_threads(monkeypatch, seconds: list[float], num_steps: int, num_threads: int = 8) -> list[LLGuidanceMatcher]:
    """Matchers after steps of 20 ms, of which the masks' time beyond that is on top."""
    clock = Clock()

    class Pool:
        def unsafe_compute_mask_ptr(self, matchers: list[tuple[Inner, int]], address: int, stride: int, count: int) -> None:
            for _, line in matchers:
                ctypes.memset(address + line * stride, 0xFF, stride)
            seconds = [inner.seconds for inner, _ in matchers]
            clock.wall += max(0.0, *seconds, sum(seconds) / num_threads)

    threads = MaskThreads(Pool())
    monkeypatch.setattr(llguidance_backend, "mask_threads", lambda _: threads)
    monkeypatch.setattr(llguidance_backend.time, "thread_time", lambda: clock.processor)
    budget = MaskBudget(lambda: clock.wall, num_threads)
    matchers = [LLGuidanceMatcher(Inner(clock, each), [7], True, budget) for each in seconds]
    for _ in range(num_steps):
        begin_masks(matchers, np.zeros((len(matchers), 2), np.int32))()
        clock.wall += 0.02
    return matchers


@pytest.mark.parametrize("number", [16, 64, 256])
def test_many_masks_that_threads_compute_in_time_end_nobody(number, monkeypatch):
    matchers = filled_by_threads(monkeypatch, [0.002] * number, 300)
    assert [matcher.error for matcher in matchers] == [None] * number


def test_one_mask_that_is_slow_once_in_a_while_ends_nobody(monkeypatch):
    matchers = filled_by_threads(monkeypatch, [0.04, *[0.0001] * 15], 8)
    assert [matcher.error for matcher in matchers] == [None] * 16


def test_slow_masks_among_many_are_found_and_end(monkeypatch):
    matchers = filled_by_threads(monkeypatch, [*[0.2] * 8, *[0.0001] * 56], 600)
    assert all(matcher.error for matcher in matchers[:8]) and not any(matcher.error for matcher in matchers[8:])


@pytest.mark.parametrize("slow", [0.05, 0.2])
def test_one_mask_that_is_always_slow_among_many_is_found_and_ends(slow, monkeypatch):
    """Steps wait for it alone, whatever the threads do meanwhile."""
    matchers = filled_by_threads(monkeypatch, [slow, *[0.0001] * 63], 2000)
    assert matchers[0].error and not any(matcher.error for matcher in matchers[1:])


def test_after_a_panic_in_the_threads_everybody_has_a_mask(monkeypatch):
    class Panicking:
        def unsafe_compute_mask_ptr(self, *_):
            raise BaseException("as a panic")

    monkeypatch.setattr(llguidance_backend, "mask_threads", lambda _: MaskThreads(Panicking()))
    budget = MaskBudget(num_threads=4)
    matchers = [LLGuidanceMatcher(Inner(Clock(), 0.0), [7], True, budget) for _ in range(8)]
    for matcher in matchers[::2]:
        matcher.give_up()
    masks = np.zeros((8, 2), np.int32)
    begin_masks(matchers, masks)()
    assert masks[::2].tolist() == [[1 << 7, 0]] * 4 and masks[1::2].tolist() == [[-1, -1]] * 4


def test_who_is_over_and_drawn_by_lot_has_a_mask_of_ends_only(monkeypatch):
    clock = Clock()

    class Pool:
        def unsafe_compute_mask_ptr(self, matchers: list[tuple[Inner, int]], address: int, stride: int, count: int) -> None:
            for _, line in matchers:
                ctypes.memset(address + line * stride, 0xFF, stride)

    threads = MaskThreads(Pool())
    monkeypatch.setattr(llguidance_backend, "mask_threads", lambda _: threads)
    budget = MaskBudget(lambda: clock.wall, num_threads=4)
    matchers = [LLGuidanceMatcher(Inner(clock, 0.0), [7], True, budget) for _ in range(8)]
    for matcher in matchers[::2]:
        matcher.give_up()
    monkeypatch.setattr(budget, "draw_lots", lambda *_: {0, 1})
    masks = np.full((8, 2), 0x55, np.int32)
    begin_masks(matchers, masks)()
    assert masks[::2].tolist() == [[1 << 7, 0]] * 4 and masks[1::2].tolist() == [[-1, -1]] * 4


def test_a_complete_text_may_be_asked_for_a_mask_and_stays_complete(byte_level):
    """A step that was dispatched before the end was known still draws."""
    matcher = byte_level.compile(StructuredOutput("regex", "a"))
    assert matcher.accept(byte_level.tokenizer.token_to_id("a")) == "stop"
    assert byte_level.allowed(matcher) == {byte_level.end} and matcher.error is None


@pytest.mark.parametrize(("number", "threads"), [(1, 1), (8, 1), (8, 2), (16, 2)])
def test_grammars_that_get_slower_and_slower_are_ended_and_cost_a_step_so_much_however_many_they_are(
    number, threads, monkeypatch
):
    monkeypatch.setattr(mask_budget, "FREE_SECONDS", 0.00005)
    monkeypatch.setattr(mask_budget, "USUAL_SECONDS", 0.000005)
    monkeypatch.setattr(mask_budget, "SECONDS_AT_ONCE", 0.1)
    model = Model(byte_level_backend())

    def wall_time() -> float:
        """Of a quiet machine: on a busy one the budget would refill faster than threads can spend it."""
        mine = time.thread_time()
        return mine + (time.process_time() - mine) / threads

    model.grammar._budget = MaskBudget(wall_time, threads)
    slow = [model.compile(StructuredOutput("grammar", 'start: x\nx: x x x | "a" | "b"')) for _ in range(number)]
    fast = model.compile(StructuredOutput("regex", "a+"))
    a = model.tokenizer.token_to_id("a")
    longest, started = 0.0, time.thread_time()
    while running := [matcher for matcher in slow if matcher.error is None]:
        before = time.thread_time()
        begin_masks([*running, fast], np.zeros((len(running) + 1, num_mask_words(model.vocab_size)), np.int32))()
        longest = max(longest, time.thread_time() - before)
        assert fast.accept(a) is None
        for matcher in running:
            matcher.accept(a)
    assert [matcher.error for matcher in slow if not re.search("too ambiguous|items", matcher.error)] == []
    assert longest < 0.1 + number * 2 * SECONDS_PER_ENDED + 0.2
    assert time.thread_time() - started < 30  # 11 on a slow machine


def test_the_budget_refills_with_time_and_the_one_that_took_most_ends_first():
    class Spender:
        ended = False

        def give_up(self):
            self.ended = True

    now = 0.0
    budget = MaskBudget(lambda: now)
    small, large = Spender(), Spender()
    for _ in range(100):  # a third of the time for slow masks: for ever
        budget.charge(large, 0.1 + FREE_SECONDS)
        budget.charge(small, FREE_SECONDS)
        now += 0.3
    assert not small.ended and not large.ended
    budget.charge(large, SECONDS_AT_ONCE - 0.1)
    budget.charge(small, 0.2)
    assert large.ended and not small.ended, "also when it is another that finds it empty"


def test_forks_of_one_compilation_do_not_disturb_each_other(byte_level):
    first, second = (byte_level.compile(StructuredOutput("regex", "ab|cd")) for _ in range(2))
    a = byte_level.tokenizer.token_to_id("a")
    assert first.accept(a) is None
    assert a not in byte_level.allowed(first) and a in byte_level.allowed(second)


def test_compiled_grammars_are_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(llguidance_backend, "MAX_COMPILED", 3)
    fresh = Model(byte_level_backend())
    for number in range(6):
        fresh.compile(StructuredOutput("regex", f"a{number}"))
    assert [kept.text for kept in fresh.grammar._compiled] == ["a3", "a4", "a5"]


def test_a_vocabulary_that_is_no_multiple_of_the_word_size_fits(byte_level):
    assert byte_level.vocab_size % 32
    mask = np.full(-(-byte_level.vocab_size // 32) + 1, 7, dtype=np.int32)
    byte_level.compile(StructuredOutput("json_object")).fill_mask(mask[:-1])
    assert mask[-1] == 7


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (schema(type="objekt"), "Invalid type: objekt"),
        (schema(type="array", uniqueItems=True), "uniqueItems"),
        (schema(type="string", format="nonsense"), "Unknown format: nonsense"),
        (schema(type="string", pattern="(a"), "unclosed group"),
        (schema(type="integer", minimum=5, maximum=3), "Unsatisfiable"),
        (schema(**{"$ref": "http://example.org/x"}), "example.org"),
        (schema(**{"$ref": "#"}), "no text satisfies it"),
        (schema(**{"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}), "uniqueItems"),
        (StructuredOutput("regex", "(a"), "unclosed group"),
        (StructuredOutput("regex", "(?=a)b"), "look-around"),
        (StructuredOutput("regex", r"(a)\1"), "backreference"),
        (StructuredOutput("grammar", "start: foo"), "unknown name"),
        (StructuredOutput("grammar", "start: ((("), "Expected token"),
        (StructuredOutput("grammar", 'start: start "a"'), "no text satisfies it"),
        (StructuredOutput("grammar", "root ::= nothing"), "nothing"),
        (StructuredOutput("grammar", "\u0000"), "grammar"),
    ],
)
def test_faults_are_named(byte_level, structured, message):
    with pytest.raises(InvalidGrammar, match=f"(?s)^{structured.kind}: .*{message}") as caught:
        byte_level.compile(structured)
    assert len(str(caught.value)) < 500 and "<state>" not in str(caught.value)


def test_what_compiles_slowly_is_refused(byte_level, monkeypatch):
    slow = schema(type="object", properties={f"p{i}": {"type": "string"} for i in range(400)})
    monkeypatch.setattr(llguidance_backend, "MAX_COMPILE_SECONDS", 0.001)
    with pytest.raises(InvalidGrammar, match="longer than 0.001 seconds"):
        byte_level.compile(slow)
    monkeypatch.undo()
    byte_level.compile(slow)


def test_a_model_without_an_end_token_cannot_follow_a_grammar(byte_level):
    with pytest.raises(InvalidGrammar, match="a token that ends a text"):
        LLGuidanceGrammar(byte_level.tokenizer, byte_level.vocab_size, []).compile(StructuredOutput("json_object"))


def test_without_llguidance_the_error_says_what_to_install(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidGrammar, match=r"pip install 'nanovllm\[grammar\]'"):
        LLGuidanceGrammar(byte_level.tokenizer, byte_level.vocab_size, [byte_level.end]).compile(StructuredOutput("json_object"))


def test_a_schema_may_say_how_it_is_spaced(byte_level):
    compact = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
    spaced = schema(**PERSON, **compact)
    texts = [byte_level.walk(spaced, seed) for seed in range(8)]
    assert all(re.fullmatch(r'\{"name": "[^\n]*", "age": \d+\}', text) for text, reason in texts if reason == "stop")
    assert sum(reason == "stop" for _, reason in texts) > 4


def test_whitespace_between_the_parts_of_json_is_limited(byte_level):
    matcher = byte_level.compile(StructuredOutput("json_object"))
    newline, brace = byte_level.tokenizer.token_to_id("Ċ"), byte_level.tokenizer.token_to_id("{")
    assert matcher.accept(brace) is None
    for _ in range(32):
        assert newline in byte_level.allowed(matcher) and matcher.accept(newline) is None
    assert newline not in byte_level.allowed(matcher)


def test_what_others_have_learnt_up_to_a_limit_fails_nobody_else():
    """Copies of one compiled grammar share the states that its lexer has met, and their number is limited."""
    model, choose = Model(byte_level_backend()), random.Random(0)
    source = StructuredOutput("regex", "([xy]{1,200}){1,100}")
    tokens = [token_id for token_id in map(model.tokenizer.token_to_id, "xy") if token_id is not None]

    def write(matcher: LLGuidanceMatcher, number: int) -> int:
        mask = np.zeros(num_mask_words(model.vocab_size), np.int32)
        for done in range(number):
            matcher.fill_mask(mask)
            if matcher.accept(choose.choice(tokens)) is not None:
                return done
        return number

    long, beside = model.compile(source), model.compile(source)
    assert long._strand is beside._strand and write(beside, 10) == 10
    num_written = write(long, 1000)
    assert 50 < num_written < 1000 and long.error is not None and "too many" in long.error
    assert write(beside, 40) == 40 and beside.error is None, "it goes on from where it was"
    later = model.compile(source)
    assert write(later, 40) == 40 and later._strand is not beside._strand


def test_a_grammars_vocabulary_is_freed_with_it():
    import gc
    import weakref

    model = Model(byte_level_backend())
    model.compile(StructuredOutput("json_object"))
    view = weakref.ref(model.grammar._view)
    del model
    gc.collect()
    assert view() is None


@pytest.mark.parametrize(
    ("options", "is_limited"),
    [
        ({}, True),
        ({"x-guidance": {}}, True),
        ({"properties": {"x-guidance": {}}}, True),
        ({"x-guidance": {"whitespace_pattern": "[ ]+"}}, False),
    ],
)
def test_white_space_is_limited_unless_the_schema_says_otherwise(byte_level, options, is_limited):
    matcher = byte_level.compile(schema(type="object", **options))
    token_ids = [byte_level.tokenizer.token_to_id(piece) for piece in ("{", "\u0120")]
    assert matcher.accept(token_ids[0]) is None
    run = 0
    while run < 100 and token_ids[1] in byte_level.allowed(matcher):
        assert matcher.accept(token_ids[1]) is None
        run += 1
    assert run == (32 if is_limited else 100)
