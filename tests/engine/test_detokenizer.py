"""What is released equals full decoding, whatever the cut; stop strings end the text where a slow search would."""

from __future__ import annotations

import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders, models

from nanovllm.engine.detokenizer import IncrementalDetokenizer, StopStrings
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
LETTERS = ["a", "b", "ab", "ba", "aab", "abab", "bb", "Ġ", "a" * 7]
CHINESE = ["ä", "¸", "Ń", "ä¸", "ŃåĽ", "½"]


def make_backend(tokens: list[str], decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return backend


BACKEND = make_backend(list(dict.fromkeys([*LETTERS, *CHINESE, *ALPHABET])), decoders.ByteLevel())
TOKENIZER = Tokenizer(TokenizerParts(BACKEND))
SIZE = TOKENIZER.vocab_size
END = TOKENIZER.token_to_id("<end>")


def ids(*tokens: str) -> list[int]:
    return [TOKENIZER.token_to_id(token) for token in tokens]


def spelled(text: str) -> list[int]:
    return [TOKENIZER.token_to_id(ALPHABET_OF[byte]) for byte in text.encode()]


def _alphabet() -> dict[int, str]:
    from nanovllm.text_stream import _byte_alphabet

    return {byte: character for character, byte in _byte_alphabet().items()}


ALPHABET_OF = _alphabet()

# Like Llama 2, where the newline is a byte token. The ids of the byte tokens are the bytes.
BYTE_FALLBACK = Tokenizer(
    TokenizerParts(
        make_backend(
            [*(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"],
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        )
    )
)
NEWLINE, A, B = 0x0A, 256, 257


def in_pieces(draw, items):
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


class Detokenizer(IncrementalDetokenizer):
    """Keeps what it has released."""

    text = ""

    def append(self, token_ids):
        new = super().append(token_ids)
        self.text += new
        return new

    def finish(self):
        new = super().finish()
        self.text += new
        return new


def run(token_ids_in_pieces, **params):
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(max_tokens=None, **params))
    for piece in token_ids_in_pieces:
        detokenizer.append(piece)
    detokenizer.finish()
    return detokenizer


token_lists = st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(0, 14), st.just(END)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), token_ids=token_lists, skip=st.booleans(), unseen_stop=st.booleans())
def test_the_text_is_that_of_full_decoding(data, token_ids, skip, unseen_stop):
    detokenizer = run(in_pieces(data.draw, token_ids), skip_special_tokens=skip, stop=["never\x00"] if unseen_stop else ())
    assert detokenizer.text == TOKENIZER.decode(token_ids, skip)
    assert detokenizer.text == BACKEND.decode(token_ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens == len(token_ids)
    assert detokenizer.stop_string is None


def first_completed(text: str, stops: list[str], searched_from: int) -> tuple[int, str] | None:
    """The slow twin: end and stop string, reading character by character."""
    for end in range(searched_from + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    token_ids=st.lists(st.one_of(st.integers(0, 14), st.just(END)), max_size=30),
    stops=st.lists(
        st.one_of(st.text("ab ", min_size=1, max_size=6), st.sampled_from(["中", "国a", "\ufffd"])), min_size=1, max_size=4
    ),
    min_tokens=st.integers(0, 12),
    includes=st.booleans(),
)
def test_stop_strings_end_the_text_where_a_slow_search_finds_them(data, token_ids, stops, min_tokens, includes):
    detokenizer = run(in_pieces(data.draw, token_ids), stop=stops, min_tokens=min_tokens, include_stop_str_in_output=includes)

    lengths = [0]  # of the certain text after so many tokens
    stream = TOKENIZER.text_stream(True)
    for token_id in token_ids:
        lengths.append(lengths[-1] + len(stream.push([token_id])))
    text = TOKENIZER.decode(token_ids)
    quiet = lengths[min(max(min_tokens - 1, 0), len(token_ids))]
    if len(token_ids) < min_tokens:
        quiet = len(text)
    found = first_completed(text, stops, quiet)
    if found is None:
        assert (detokenizer.text, detokenizer.stop_string) == (text, None)
    else:
        end, stop = found
        assert detokenizer.stop_string == stop
        assert detokenizer.text == text[: end if includes else end - len(stop)]
        assert detokenizer.num_tokens == next((n for n, length in enumerate(lengths) if length >= end), len(token_ids))


def test_half_characters_wait_for_their_other_half():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams())
    assert [detokenizer.append([token_id]) for token_id in ids("ä", "¸", "Ń", "a")] == ["", "", "中", "a"]
    assert detokenizer.append(ids("ä", "¸")) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == "中a\ufffd"


def test_an_emoji_of_several_characters_comes_character_by_character():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams())
    deltas = [delta for token_id in spelled("👩‍👧!") if (delta := detokenizer.append([token_id]))]
    assert deltas == ["👩", "\u200d", "👧", "!"]


def test_the_beginning_of_a_stop_string_is_held_back():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["abb"]))
    assert [detokenizer.append([token_id]) for token_id in ids("a", "b", "ab", "a")] == ["", "", "ab", "ab"]
    assert detokenizer.finish() == "a"
    assert detokenizer.text == "ababa"


def test_nothing_is_released_after_a_stop_string():
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=["ba"]))
    assert detokenizer.append(ids("a", "abab", "bb")) == "aa"
    assert (detokenizer.stop_string, detokenizer.num_tokens) == ("ba", 2)
    assert detokenizer.append(ids("a")) == detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.num_tokens) == ("aa", 2)


def test_a_stop_string_counts_from_min_tokens_on():
    def text(min_tokens):
        return run([ids("a", "b", "a", "b", "a", "b")], stop=["ab"], min_tokens=min_tokens).text

    assert [text(n) for n in range(8)] == ["", "", "", "ab", "ab", "abab", "abab", "ababab"]


def test_the_first_completed_stop_string_wins_and_of_those_the_longest():
    assert run([ids("abab")], stop=["bab", "ba"]).stop_string == "ba"
    assert run([ids("aab")], stop=["b", "aab", "ab"]).stop_string == "aab"


def test_sequences_of_a_request_can_share_the_automaton():
    params = SamplingParams(stop=["ab"])
    shared = StopStrings(params.stop)
    for _ in range(2):
        detokenizer = Detokenizer(TOKENIZER, params, shared)
        assert detokenizer.append(ids("b", "a", "b")) == "b"
        assert detokenizer.stop_string == "ab"


def test_special_tokens_are_left_out_unless_asked_for():
    assert run([ids("a", "<end>", "b")]).text == "ab"
    assert run([ids("a", "<end>", "b")], skip_special_tokens=False).text == "a<end>b"
    assert run([ids("a", "<end>", "b")], stop=["ab"]).stop_string == "ab"


def test_a_newline_in_a_byte_token_stops_at_once():
    detokenizer = Detokenizer(BYTE_FALLBACK, SamplingParams(stop=["\n"], max_tokens=3))
    assert [detokenizer.append([token_id]) for token_id in (A, B, NEWLINE)] == ["a", "b", ""]
    assert (detokenizer.stop_string, detokenizer.num_tokens, detokenizer.text) == ("\n", 3, "ab")  # without `finish`


def test_a_run_of_newlines_in_byte_tokens_stops_at_the_first():
    for pieces in ([[NEWLINE] * 8], [[NEWLINE]] * 8):
        detokenizer = Detokenizer(BYTE_FALLBACK, SamplingParams(stop=["\n"], include_stop_str_in_output=True))
        assert "".join(map(detokenizer.append, pieces)) == "\n"
        assert (detokenizer.stop_string, detokenizer.num_tokens) == ("\n", 1)


def test_a_run_of_newlines_in_byte_tokens_stops_at_min_tokens():
    detokenizer = Detokenizer(BYTE_FALLBACK, SamplingParams(stop=["\n"], min_tokens=3))
    assert detokenizer.append([NEWLINE] * 8) == "\n\n"
    assert (detokenizer.stop_string, detokenizer.num_tokens) == ("\n", 3)


def test_a_stop_string_may_begin_and_end_among_byte_tokens():
    detokenizer = Detokenizer(BYTE_FALLBACK, SamplingParams(stop=["b\n中"]))
    deltas = [detokenizer.append([token_id]) for token_id in (A, B, NEWLINE, *"🎉".encode(), B, NEWLINE, *"中".encode())]
    assert deltas == ["a", "", "", "", "", "", "b\n🎉", "", "", "", "", ""]
    assert detokenizer.stop_string == "b\n中"


def test_invalid_byte_tokens_do_not_hide_a_stop_string():
    detokenizer = Detokenizer(BYTE_FALLBACK, SamplingParams(stop=["\n"]))
    assert [detokenizer.append([token_id]) for token_id in (0xFF, 0xE4, NEWLINE)] == ["\ufffd", "", "\ufffd"]
    assert detokenizer.stop_string == "\n"
