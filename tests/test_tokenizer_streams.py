"""Text streams give, in whatever pieces, exactly what decoding the whole list gives, and what the library gives.

One deviation from the library: it replaces every byte of a run of byte tokens that is not valid UTF-8 as a whole;
here only the invalid parts are replaced, so that valid characters need not wait for the end of their run.
"""

from __future__ import annotations

import itertools

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders, models

from nanovllm.errors import UnsupportedTokenizer
from nanovllm.tokenizer import Tokenizer
from nanovllm.tokenizer_files import TokenizerParts

ALPHABET = tokenizers.pre_tokenizers.ByteLevel.alphabet()
WORDS = ["▁", "▁▁", "▁the", "▁a▁b", "x", "é", "中", " ", "", "<0x4", "▁▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
STRIP = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def make_backend(tokens, decoder):
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken("é é", normalized=False), AddedToken("中文 plain", normalized=False)])
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return backend


BACKENDS = {
    "byte_level": make_backend([*sorted(ALPHABET), "ĠĠ", "ä¸", "ŃåĽ½", "Ġthe"], decoders.ByteLevel()),
    "byte_fallback": make_backend([*BYTES, *WORDS], decoders.Sequence(STRIP)),
    "without_strip": make_backend([*BYTES, *WORDS], decoders.Sequence(STRIP[:3])),
    "strip_two": make_backend([*BYTES, *WORDS], decoders.Sequence([*STRIP[:3], decoders.Strip(" ", 2, 0)])),
    "metaspace": make_backend(WORDS, decoders.Metaspace()),
    "metaspace_never": make_backend(WORDS, decoders.Metaspace(prepend_scheme="never")),
    "no_decoder": make_backend(WORDS, None),
}
TOKENIZERS = {kind: Tokenizer(TokenizerParts(backend)) for kind, backend in BACKENDS.items()}
WITH_BYTE_TOKENS = ("byte_fallback", "without_strip", "strip_two")  # the ids of the byte tokens are the bytes


def in_pieces(draw, items):
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def streamed(tokenizer, pieces, skip_special_tokens=True):
    stream = tokenizer.text_stream(skip_special_tokens)
    return "".join(map(stream.push, pieces)) + stream.finish()


spelled_texts = st.text(max_size=3).map(lambda text: list(text.encode()))


def joined_lists(parts):
    return st.lists(parts, max_size=16).map(lambda lists: list(itertools.chain.from_iterable(lists)))


def token_lists(size):
    """Mostly tokens from the end of a vocabulary (words, added and special tokens, ids that do not exist), and texts
    in byte tokens."""
    ids = st.one_of(st.integers(0, size + 2), st.integers(max(0, size - 14), size + 1))
    return joined_lists(st.one_of(ids.map(lambda token_id: [token_id]), spelled_texts))


def with_valid_byte_runs(tokenizer, token_ids, skip_special_tokens):
    """U+FFFD spelled in byte tokens in the place of what is invalid: of this the library has the same opinion."""
    left_out = tokenizer.special_token_ids if skip_special_tokens else ()
    token_ids = [token_id for token_id in token_ids if token_id < tokenizer.vocab_size and token_id not in left_out]
    result = []
    for is_run, group in itertools.groupby(token_ids, lambda token_id: token_id < 256):
        ids = list(group)
        result += bytes(ids).decode("utf-8", "replace").encode() if is_run else ids
    return result


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stream_equals_decoding_at_once(kind, data):
    tokenizer = TOKENIZERS[kind]
    token_ids = data.draw(token_lists(tokenizer.vocab_size))
    skip = data.draw(st.booleans())
    text = streamed(tokenizer, in_pieces(data.draw, token_ids), skip)
    assert text == tokenizer.decode(token_ids, skip)
    for_library = with_valid_byte_runs(tokenizer, token_ids, skip) if kind in WITH_BYTE_TOKENS else token_ids
    assert text == BACKENDS[kind].decode(for_library, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", WITH_BYTE_TOKENS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_library_agrees_where_byte_tokens_are_valid(kind, data):
    tokenizer = TOKENIZERS[kind]
    words = st.integers(256, tokenizer.vocab_size - 1).map(lambda token_id: [token_id])
    token_ids = data.draw(joined_lists(st.one_of(spelled_texts, words)))
    text = streamed(tokenizer, in_pieces(data.draw, token_ids))
    assert text == tokenizer.decode(token_ids) == BACKENDS[kind].decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12))
def test_invalid_bytes_become_the_same_replacement_characters(data):
    from nanovllm.text_stream import _byte_alphabet

    tokenizer = TOKENIZERS["byte_level"]
    character_of = {byte: character for character, byte in _byte_alphabet().items()}
    token_ids = [tokenizer.token_to_id(character_of[byte]) for byte in data]
    text = streamed(tokenizer, [[token_id] for token_id in token_ids])
    assert text == tokenizer.decode(token_ids) == BACKENDS["byte_level"].decode(token_ids) == data.decode("utf-8", "replace")
    assert streamed(TOKENIZERS["without_strip"], [[byte] for byte in data]) == text


def test_ids_may_be_numbers_of_another_library():
    import torch

    tokenizer = TOKENIZERS["byte_fallback"]
    token_ids = [*"中".encode(), tokenizer.token_to_id("x"), tokenizer.token_to_id("<end>")]
    assert tokenizer.decode(torch.tensor(token_ids)) == tokenizer.decode(token_ids) == "中x"


def test_the_byte_alphabet_is_that_of_the_library():
    from nanovllm.text_stream import _byte_alphabet

    assert set(_byte_alphabet()) == set(ALPHABET)
    assert sorted(_byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize(
    ("data", "released"),
    [
        (b"\n\n", ["\n", "\n"]),
        ("🎉".encode(), ["", "", "", "🎉"]),
        ("中é!".encode(), ["", "", "中", "", "é", "!"]),
        (b"\n\xff\n", ["\n", "\ufffd", "\n"]),
        (b"\xe4\xb8\n", ["", "", "\ufffd\n"]),
        (b"\x80\xc3\xa9", ["\ufffd", "", "é"]),
    ],
)
def test_characters_in_byte_tokens_are_released_with_their_last_byte(data, released):
    tokenizer = TOKENIZERS["byte_fallback"]
    stream = tokenizer.text_stream()
    assert [stream.push([byte]) for byte in data] == released
    assert stream.finish() == ""
    assert tokenizer.decode(data) == "".join(released)


def test_the_library_replaces_the_whole_run_where_we_keep_what_is_valid():
    run = list(b"\n\xff\n")
    assert BACKENDS["byte_fallback"].decode(run) == "\ufffd" * 3
    assert TOKENIZERS["byte_fallback"].decode(run) == "\n\ufffd\n"


def test_another_token_ends_an_incomplete_character():
    tokenizer = TOKENIZERS["byte_fallback"]
    x, end, the = map(tokenizer.token_to_id, ["x", "<end>", "▁the"])
    first, second, third = "中".encode()

    def released(token_ids, skip_special_tokens=True):
        stream = tokenizer.text_stream(skip_special_tokens)
        return [*(stream.push([token_id]) for token_id in token_ids), stream.finish()]

    assert released([first, second, x]) == ["", "", "\ufffdx", ""]
    assert released([first, second]) == ["", "", "\ufffd"]
    assert released([the, first, second, third, the]) == ["the", "", "", "中", " the", ""]
    assert released([first, end, second, third]) == ["", "", "", "中", ""]  # skipped: as if it were not there
    assert released([first, end], skip_special_tokens=False) == ["", "\ufffd<end>", ""]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    ],
)
def test_decoders_that_would_be_restated_wrongly_are_refused(decoder):
    with pytest.raises(UnsupportedTokenizer, match="decoder .* is not implemented"):
        Tokenizer(TokenizerParts(make_backend(WORDS, decoder)))
