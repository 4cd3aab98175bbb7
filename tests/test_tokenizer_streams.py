"""Text streams give, in whatever pieces, exactly what decoding the whole list gives."""

from __future__ import annotations

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


def make(tokens, decoder):
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken("é é", normalized=False), AddedToken("中文 plain", normalized=False)])
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return Tokenizer(TokenizerParts(backend))


TOKENIZERS = {
    "byte_level": make([*sorted(ALPHABET), "ĠĠ", "ä¸", "ŃåĽ½", "Ġthe"], decoders.ByteLevel()),
    "byte_fallback": make([*BYTES, *WORDS], decoders.Sequence(STRIP)),
    "without_strip": make([*BYTES, *WORDS], decoders.Sequence(STRIP[:3])),
    "strip_two": make([*BYTES, *WORDS], decoders.Sequence([*STRIP[:3], decoders.Strip(" ", 2, 0)])),
    "metaspace": make(WORDS, decoders.Metaspace()),
    "metaspace_never": make(WORDS, decoders.Metaspace(prepend_scheme="never")),
    "no_decoder": make(WORDS, None),
}


def in_pieces(draw, items):
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stream_equals_decoding_at_once(kind, data):
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.vocab_size
    # Mostly tokens from the ends of the vocabulary: words, added and special tokens, and ids that do not exist.
    ids = st.one_of(st.integers(0, size + 2), st.integers(max(0, size - 14), size + 1))
    token_ids = data.draw(st.lists(ids, max_size=24))
    skip = data.draw(st.booleans())
    stream = tokenizer.text_stream(skip)
    text = "".join(stream.push(piece) for piece in in_pieces(data.draw, token_ids)) + stream.finish()
    assert text == tokenizer.decode(token_ids, skip)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12))
def test_invalid_bytes_become_the_same_replacement_characters(data):
    from nanovllm.text_stream import _byte_alphabet

    tokenizer = TOKENIZERS["byte_level"]
    character_of = {byte: character for character, byte in _byte_alphabet().items()}
    token_ids = [tokenizer.token_to_id(character_of[byte]) for byte in data]
    stream = tokenizer.text_stream(True)
    text = "".join(stream.push([token_id]) for token_id in token_ids) + stream.finish()
    assert text == tokenizer.decode(token_ids) == data.decode("utf-8", "replace")


def test_the_byte_alphabet_is_that_of_the_library():
    from nanovllm.text_stream import _byte_alphabet

    assert set(_byte_alphabet()) == set(ALPHABET)
    assert sorted(_byte_alphabet().values()) == list(range(256))


def test_half_characters_are_held_back():
    tokenizer = TOKENIZERS["byte_fallback"]
    stream = tokenizer.text_stream(True)
    released = [stream.push([byte]) for byte in "中".encode()]
    assert released == ["", "", ""]
    assert stream.push([tokenizer.token_to_id("x")]) == "中x"


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
        make(WORDS, decoder)
