"""A model's tokenizer inside of llguidance, where it can stand for ours.

Where only one text is possible llguidance asks a tokenizer how to cut it. Ours is in Python, so each of its threads that
asks waits for Python's lock, which the engine has: with 64 sequences ten times a step. A tokenizer of its own, read
from the same tokenizer.json, needs no lock. Whether it does the same is not believed but tried, for each model: all
bytes of the vocabulary, and how it cuts some texts. Knows no grammars.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any, Protocol

NO_TEXT = 0xFF  # the byte that llguidance puts before special tokens; text has none
# They change a text before it is cut. What a grammar asks for is written as it is.
CHANGING = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"}
PROBES = (
    '{"name": "',
    '","age":',
    "\n  ],\n\t}\r\n",
    "2026-11-29T23:59:07.125Z +0100",
    "  indented twice,  and   thrice ",
    "The quick brown fox's DON'T isn't <b>bold</b>",
    "Grüße, naïve café, ÿ, Ελλάδα, Привет, 你好，世界, こんにちは, 안녕, नमस्ते",
    "🙂👩‍🚀 e\u0301 \u212b \ufb01 \u00a0|\u3000|",
    "\n  \n.'s",
    "a",
    " ",
)


class View(Protocol):
    """What our tokenizer says of a vocabulary."""

    tokens: list[bytes]
    special_token_ids: list[int]

    def encode(self, text: str) -> list[int]: ...

    def writes(self, token_ids: Sequence[int], text: str) -> bool: ...


def native_tokenizer(library: Any, tokenizer_json: str, view: View, end_token_ids: Sequence[int]) -> Any | None:
    """An `LLTokenizer` that equals `view`; None if there is none. Takes a second for 150,000 tokens.

    Its errors may name special tokens as they are called here. Nobody may see them: who knows a name can make a grammar write it.
    """
    description = _rewritten(json.loads(tokenizer_json), set(view.special_token_ids))
    if description is None:
        return None
    try:
        native = library.LLTokenizer(json.dumps(description), n_vocab=len(view.tokens), eos_token=list(end_token_ids))
        return native if _is_equal(native, view) else None
    except BaseException as error:  # also a panic, which is no Exception: of a kind that one of the two does not read
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None


def looks_special(spelling: str) -> bool:
    """To llguidance an added token such as `<tool_call>` is a special one, whatever its tokenizer says."""
    return spelling.startswith("<") and spelling.endswith(">")


def _rewritten(description: dict[str, Any], special_token_ids: Collection[int]) -> dict[str, Any] | None:
    """With names for special tokens that nobody can know: written out in a text they stay plain text.

    They cannot be left out: their ids would be beyond the vocabulary. What only looks special becomes an ordinary token, which is
    cut into pieces where it is written out.
    """
    model = description["model"]
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        return None
    unguessable = secrets.token_hex(16)
    for token in description["added_tokens"]:
        if token["id"] in special_token_ids:
            vocab.pop(token["content"], None)
            name = f"{unguessable}-{token['id']}"
            if model.get("unk_token") == token["content"]:
                model["unk_token"] = name
            token["content"] = name
        vocab[token["content"]] = token["id"]  # or those that follow one that is left out would be counted anew
    added = [token for token in description["added_tokens"] if not looks_special(token["content"])]
    normalizer = _without_changes(description["normalizer"])
    return description | {"added_tokens": added, "post_processor": None, "normalizer": normalizer}


def _without_changes(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] in CHANGING:
        return None
    if normalizer["type"] != "Sequence":
        return normalizer
    parts = [part for part in map(_without_changes, normalizer["normalizers"]) if part is not None]
    return {"type": "Sequence", "normalizers": parts} if parts else None


def _is_equal(native: Any, view: View) -> bool:
    special = set(view.special_token_ids)
    plain = [(token_id, text) for token_id, text in enumerate(view.tokens) if token_id not in special]
    return (
        all(map(native.is_special_token, special))
        and all(_is_same_token(native, token_id, text) for token_id, text in plain)
        and all(_is_cut_alike(native, view, text) for text in PROBES)
    )


def _is_same_token(native: Any, token_id: int, text: bytes) -> bool:
    """Special to llguidance alone may be what no tokenizer knows, and what is no text."""
    if native.is_special_token(token_id):
        return not text or text[0] == NO_TEXT
    return native.decode_bytes([token_id]) == text


def _is_cut_alike(native: Any, view: View, text: str) -> bool:
    """If ours can write it at all: some change texts before they cut them."""
    token_ids, ours = native.tokenize_str(text), view.encode(text)
    return view.writes(token_ids, text) and (token_ids == ours or not view.writes(ours, text))
