"""The text of a growing list of token ids: `push(ids)` returns text that no later token can change, `finish()` the rest.

The `tokenizers` library decodes finished lists; decoding again after every token would cost quadratic time, and the
usual tricks with a window of recent tokens are wrong for invalid byte sequences. So the decoders that language models
use are restated here as streams, and anything else is refused when the model loads. The library is the slow twin in
the tests. One deviation: of a run of byte tokens that is not valid UTF-8 only the invalid parts become U+FFFD. The
library replaces the whole run and so has to wait for its end, but in such vocabularies each newline is a byte token.
Knows nothing of stop strings: `engine/detokenizer.py` is the reader.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import tokenizers

from nanovllm.errors import UnsupportedTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class TextStreams:
    """Makes streams for one tokenizer and keeps what its tokens look like, so that sequences share the work."""

    def __init__(self, backend: tokenizers.Tokenizer, special_token_ids: Collection[int]) -> None:
        self._rules = rules = _read_decoder(backend)

        def content_of(token_id: int) -> Any:
            token = backend.id_to_token(token_id)
            return None if token is None else rules.content_of_token(token)

        every = _TokenTable(content_of)
        self._tables = {False: every, True: _TokenTable(every.__getitem__, special_token_ids)}

    def open(self, skip_special_tokens: bool) -> TextStream:
        return self._rules.open(self._tables[skip_special_tokens])

    def bytes_of(self, token_id: int) -> bytes:
        """What a token writes inside a text, special tokens too; empty for ids that the vocabulary does not know."""
        return self._rules.bytes_of(self._tables[False][token_id])


class _TokenTable(dict):
    """Token id -> what it contributes; filled as tokens appear. None: nothing, as if the token were not there."""

    def __init__(self, content_of: Callable[[int], Any], skipped: Collection[int] = ()):
        super().__init__(dict.fromkeys(skipped))
        self._content_of = content_of

    def __missing__(self, token_id: int) -> Any:
        content = self[token_id] = self._content_of(token_id)
        return content


class _ByteLevel:
    """GPT-2's scheme: every character of a token stands for a byte, and the bytes together are UTF-8."""

    def __init__(self) -> None:
        alphabet = _byte_alphabet()
        self._bytes = dict.fromkeys(range(256), 65535) | {ord(character): byte for character, byte in alphabet.items()}

    def content_of_token(self, token: str) -> str | bytes:
        """Text, or bytes that are no whole characters. A token with any character outside the alphabet is an added one."""
        try:
            content = token.translate(self._bytes).encode("latin-1")
        except UnicodeEncodeError:
            return token
        try:
            return content.decode()
        except UnicodeDecodeError:
            return content

    def bytes_of(self, content: str | bytes | None) -> bytes:
        return content.encode() if isinstance(content, str) else content or b""

    def open(self, table: _TokenTable) -> TextStream:
        return _ByteLevelStream(table)


class _ByteLevelStream:
    def __init__(self, table: _TokenTable) -> None:
        self._table = table
        self._utf8 = _utf8_decoder()
        self._has_half = False  # of a character: its first bytes have come

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            content = self._table[token_id]
            if content.__class__ is str and not self._has_half:
                text += content
            elif content:
                text += self._utf8.decode(content.encode() if isinstance(content, str) else content)
                self._has_half = self._utf8.getstate()[0] != b""
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class _Pieces:
    """SentencePiece's scheme: tokens are text with a sign for the space; rare characters are spelled in byte tokens."""

    def __init__(self) -> None:
        self.replacements: list[tuple[str, str]] = []
        self.has_byte_tokens = False
        self.strip = (" ", 0)  # this character, at most so many times, is cut from the start of the text
        self.separator = ""
        self.removed_from_first = ""  # Metaspace: a sign that is a space everywhere but in the first token

    def content_of_token(self, token: str) -> str | bytes:
        """Text, or the byte of a byte token."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self.has_byte_tokens else None
        return bytes.fromhex(match[1]) if match else token

    def bytes_of(self, content: str | bytes | None) -> bytes:
        if isinstance(content, str):
            sign = self.removed_from_first
            return (content.replace(sign, " ") if sign else self.separator + content).encode()
        return content or b""

    def open(self, table: _TokenTable) -> TextStream:
        return _PieceStream(table, self)


class _PieceStream:
    """A character spelled in byte tokens is held until its last byte; any other token ends what is incomplete."""

    def __init__(self, table: _TokenTable, rules: _Pieces) -> None:
        self._table = table
        self._rules = rules
        self._decode_utf8 = _utf8_decoder().decode
        self._num_to_strip = rules.strip[1]
        self._is_empty = True

    def push(self, token_ids: Sequence[int]) -> str:
        texts = []
        for token_id in token_ids:
            content = self._table[token_id]
            if isinstance(content, bytes):
                texts.append(self._decode_utf8(content))
            elif content is not None:
                texts.append(self._decode_utf8(b"", True) + self._with_place(content))
        text = "".join(texts)
        return self._stripped(text) if self._num_to_strip else text

    def finish(self) -> str:
        return self._stripped(self._decode_utf8(b"", True))

    def _with_place(self, text: str) -> str:
        rules, is_first = self._rules, self._is_empty
        self._is_empty = False
        if rules.removed_from_first:
            return text.replace(rules.removed_from_first, "" if is_first else " ")
        return text if is_first else rules.separator + text

    def _stripped(self, text: str) -> str:
        character = self._rules.strip[0]
        num = 0
        while num < min(self._num_to_strip, len(text)) and text[num] == character:
            num += 1
        # Whatever stands after the stripped part ends the stripping for good.
        self._num_to_strip = 0 if num < len(text) else self._num_to_strip - num
        return text[num:]


def _read_decoder(backend: tokenizers.Tokenizer) -> _ByteLevel | _Pieces:
    if backend.decoder is None:
        rules = _Pieces()
        rules.separator = " "
        return rules
    config = json.loads(backend.decoder.__getstate__())
    steps = config["decoders"] if config["type"] == "Sequence" else [config]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevel()
    rules = _Pieces()
    # The order in which SentencePiece-like tokenizers have these steps; another order would mean something else.
    order = ["Replace", "ByteFallback", "Fuse", "Strip"] if kinds != ["Metaspace"] else ["Metaspace"]
    position = 0
    for step in steps:
        while position < len(order) and order[position] != step["type"]:
            position += 1
        if position == len(order) or not _apply(step, rules, "Fuse" in kinds):
            raise UnsupportedTokenizer(
                f"the decoder {' + '.join(kinds)} of this tokenizer is not implemented: {json.dumps(step)}"
            )
    return rules


def _apply(step: dict[str, Any], rules: _Pieces, is_fused: bool) -> bool:
    """Take one step of a decoder into the rules; false if it asks for something else than they can say."""
    kind = step["type"]
    if kind == "Replace":
        rules.replacements.append((step["pattern"].get("String"), step["content"]))
        return "String" in step["pattern"]
    if kind == "ByteFallback":
        rules.has_byte_tokens = True
    elif kind == "Strip":
        rules.strip = (step["content"], step["start"])
        return step["stop"] == 0 and is_fused
    elif kind == "Metaspace":
        if step["prepend_scheme"] == "never":
            rules.replacements.append((step["replacement"], " "))
        else:
            rules.removed_from_first = step["replacement"]
    return True


def _utf8_decoder() -> codecs.IncrementalDecoder:
    """`decode(data, final=False)`: the characters complete so far; invalid bytes, and an unfinished end, become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet
