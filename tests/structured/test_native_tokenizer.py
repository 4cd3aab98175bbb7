"""llguidance's own tokenizer in the place of ours: only where it does the same, and then it cannot be told apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import llguidance
import pytest
import tokenizers
from structured.model import PERSON, allowed_tokens, schema
from test_tokenizer import byte_level_backend, sentencepiece_backend, unigram_backend

from nanovllm import LLM, StructuredOutput
from nanovllm.errors import InvalidGrammar
from nanovllm.structured.llguidance_backend import LLGuidanceGrammar, _VocabularyView
from nanovllm.structured.native_tokenizer import PROBES, native_tokenizer
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

STRUCTURED = [
    schema(**PERSON),
    StructuredOutput("json_object"),
    StructuredOutput("regex", r"[0-9]{4}-[0-9]{2} (fox|the lazy dog)+"),
    StructuredOutput("choice", ["the quick brown fox", "the quick brown dogs", "<div>naïve café, 你好</div>"]),
    StructuredOutput("grammar", 'start: NUM (" plus " NUM){3,}\nNUM: /[0-9]{1,3}/'),
]


def tokenizer_of(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(TokenizerParts(backend))


def view_of(tokenizer: Tokenizer, num_unused: int = 7) -> _VocabularyView:
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    return _VocabularyView(tokenizer, tokenizer.vocab_size + num_unused, [end])


def native_of(tokenizer: Tokenizer, view: _VocabularyView) -> object | None:
    return native_tokenizer(llguidance, tokenizer.to_json(), view, [view.eos_token_id])


def real_grammar(llm: LLM, num_threads: int) -> LLGuidanceGrammar:
    of_engine = llm.engine._door._grammar
    assert isinstance(of_engine, LLGuidanceGrammar)
    return LLGuidanceGrammar(of_engine._tokenizer, of_engine._vocab_size, of_engine._end_token_ids, num_threads)


class TestWhetherItStandsForOurs:
    def test_on_the_real_model_it_does(self, llm: LLM):
        grammar = real_grammar(llm, num_threads=2)
        grammar.prepare(StructuredOutput("json_object"))  # as a server does before it is ready
        assert vars(grammar)["_native_vocabulary"] is not None and "_vocabulary" in vars(grammar)

    def test_one_thread_needs_none(self, llm: LLM):
        assert real_grammar(llm, num_threads=1)._native_vocabulary is None

    @pytest.mark.parametrize("backend", [byte_level_backend, sentencepiece_backend])
    def test_on_both_kinds_that_models_have_it_does(self, backend: Callable[[], tokenizers.Tokenizer]):
        tokenizer = tokenizer_of(backend())
        native = native_of(tokenizer, view_of(tokenizer))
        assert native is not None
        for text in ("the quick brown fox", "</s>", "a<s>b</s>", *PROBES):
            token_ids = native.tokenize_str(text)  # type: ignore[attr-defined]
            assert native.decode_bytes(token_ids) == text.encode()  # type: ignore[attr-defined]
            assert not set(token_ids) & tokenizer.special_token_ids, "written out they are plain text"

    def test_a_kind_that_it_does_not_read(self):
        tokenizer = tokenizer_of(unigram_backend())
        assert native_of(tokenizer, view_of(tokenizer)) is None

    def test_one_token_whose_bytes_differ(self):
        tokenizer = tokenizer_of(byte_level_backend())
        view = view_of(tokenizer)
        token_id = tokenizer.token_to_id("Ġt") or tokenizer.token_to_id("a")
        assert token_id is not None
        view.tokens[token_id] += b"?"
        assert native_of(tokenizer, view) is None

    def test_two_tokens_that_differ_only_in_where_one_ends(self):
        tokenizer = tokenizer_of(byte_level_backend())
        view = view_of(tokenizer)
        long = next(i for i, text in enumerate(view.tokens) if len(text) > 1 and i not in tokenizer.special_token_ids)
        view.tokens[long : long + 2] = view.tokens[long][:1], view.tokens[long][1:] + view.tokens[long + 1]
        assert native_of(tokenizer, view) is None

    def test_a_token_that_is_special_only_to_one(self):
        tokenizer = tokenizer_of(byte_level_backend())
        view = view_of(tokenizer)
        view.special_token_ids.append(5)
        assert native_of(tokenizer, view) is None

    def test_a_text_that_is_cut_elsewhere(self, monkeypatch: pytest.MonkeyPatch):
        tokenizer = tokenizer_of(byte_level_backend())
        encode, one = Tokenizer.encode_literally, PROBES[5]
        assert native_of(tokenizer, view_of(tokenizer)) is not None

        def letters(self: Tokenizer, text: str) -> list[int]:
            return encode(self, text) if text != one else [i for letter in text for i in encode(self, letter)]

        monkeypatch.setattr(Tokenizer, "encode_literally", letters)
        assert native_of(tokenizer, view_of(tokenizer)) is None

    def test_a_token_that_writes_nothing_but_to_one(self):
        tokenizer = tokenizer_of(byte_level_backend())
        view = view_of(tokenizer)
        view.tokens[tokenizer.token_to_id("a")] = b""  # type: ignore[index]
        assert native_of(tokenizer, view) is None

    def test_a_tokenizer_that_fails_is_not_taken(self, monkeypatch: pytest.MonkeyPatch):
        def fail(self: Tokenizer, text: str) -> list[int]:
            raise RuntimeError("unk token is not in the vocabulary")

        monkeypatch.setattr(Tokenizer, "encode_literally", fail)
        tokenizer = tokenizer_of(byte_level_backend())
        assert native_of(tokenizer, view_of(tokenizer)) is None

    def test_tokens_that_only_look_special(self):
        """As Qwen's `<tool_call>` and `<think>` do to llguidance."""
        tokenizer = tokenizer_of(with_tool_calls())
        call = tokenizer.token_to_id("<tool_call>")
        assert call is not None and call not in tokenizer.special_token_ids
        grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.token_to_id("</s>")], num_threads=2)  # type: ignore[list-item]
        assert grammar._native_vocabulary is not None
        matcher = grammar.compile(StructuredOutput("choice", ["<tool_call>fox"]))
        assert allowed_tokens(matcher, tokenizer.vocab_size) == [call], "what is forced is what the model has learnt"
        matcher = grammar.compile(StructuredOutput("regex", "[a-z<>_]+"))
        assert matcher._inner is not None and call in allowed_tokens(matcher, tokenizer.vocab_size)


@pytest.mark.parametrize("structured", STRUCTURED, ids=lambda one: one.kind)
def test_it_cannot_be_told_apart(llm: LLM, structured: StructuredOutput):
    """Random walks over SmolLM2's vocabulary: the same masks, so the same tokens where one text is forced."""
    grammar, by_python = real_grammar(llm, num_threads=2), real_grammar(llm, num_threads=1)
    assert grammar._native_vocabulary is not None
    for seed in range(3):
        choose, matchers = random.Random(seed), [grammar.compile(structured), by_python.compile(structured)]
        for _ in range(60):
            allowed, expected = (allowed_tokens(matcher, grammar._vocab_size) for matcher in matchers)
            assert allowed == expected
            token_id = choose.choice(allowed)
            reasons = [matcher.accept(token_id) for matcher in matchers]
            assert reasons[0] == reasons[1]
            if reasons[0] is not None:
                break


@pytest.mark.parametrize("backend", [byte_level_backend, sentencepiece_backend])
def test_a_grammar_may_call_for_a_special_token_by_name(backend: Callable[[], tokenizers.Tokenizer]):
    tokenizer = tokenizer_of(backend())
    end, start = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<s>")
    assert end is not None and start is not None
    grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size, [end], num_threads=2)
    assert grammar._native_vocabulary is not None
    matcher = grammar.compile(StructuredOutput("grammar", 'start: <s> "fox"'))
    assert allowed_tokens(matcher, tokenizer.vocab_size) == [start]


def with_tool_calls() -> tokenizers.Tokenizer:
    backend = byte_level_backend()
    backend.add_tokens([tokenizers.AddedToken("<tool_call>", special=False, normalized=False)])
    return backend


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (tokenizers.normalizers.NFC(), "xe\u0301y"),
        (tokenizers.normalizers.NFC(), "\u212b"),
        (tokenizers.normalizers.NFKC(), "ﬁx it"),
        (tokenizers.normalizers.Lowercase(), "The Fox"),
        (tokenizers.normalizers.Sequence([tokenizers.normalizers.NFD(), tokenizers.normalizers.Strip()]), " ñ "),
    ],
)
def test_a_text_that_the_tokenizer_would_change_is_written_as_it_is(normalizer: object, text: str, num_threads: int):
    backend = byte_level_backend()
    backend.normalizer = normalizer
    tokenizer = tokenizer_of(backend)
    grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.token_to_id("</s>")], num_threads)  # type: ignore[list-item]
    assert (grammar._native_vocabulary is None) == (num_threads == 1)
    matcher, reason, token_ids = grammar.compile(StructuredOutput("choice", [text])), None, []
    while reason is None:
        token_ids.append(random.Random(0).choice(allowed_tokens(matcher, tokenizer.vocab_size)))
        reason = matcher.accept(token_ids[-1])
    assert reason == "stop" and tokenizer.decode(token_ids) == text


def test_an_error_names_special_tokens_as_the_model_does():
    """And not as they are called for llguidance: with that name a grammar could write them."""
    tokenizer = tokenizer_of(byte_level_backend())
    messages = []
    for num_threads in (1, 2):
        grammar = LLGuidanceGrammar(tokenizer, tokenizer.vocab_size, [tokenizer.token_to_id("</s>")], num_threads)  # type: ignore[list-item]
        with pytest.raises(InvalidGrammar, match="unknown special token") as refusal:
            grammar.compile(StructuredOutput("grammar", 'start: <nosuch> "a"'))
        assert refusal.value.__context__ is None
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


def test_names_of_special_tokens_cannot_be_guessed():
    tokenizer = tokenizer_of(byte_level_backend())
    description = json.loads(tokenizer.to_json())
    named = {token["content"] for token in description["added_tokens"]}
    view, seen = view_of(tokenizer), []

    class Library:
        @staticmethod
        def LLTokenizer(text: str, **_: object) -> None:
            seen.append({token["content"] for token in json.loads(text)["added_tokens"]})
            raise ValueError("of no kind that I read")

    for _ in range(2):
        assert native_tokenizer(Library, tokenizer.to_json(), view, [view.eos_token_id]) is None
    assert not seen[0] & (named | seen[1]) and all(len(name) > 32 for name in seen[0])
