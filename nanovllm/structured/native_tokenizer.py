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
PROBES = (
    '{"name": "',
    '","age":',
    "\n  ],\n\t}\r\n",
    "2026-11-29T23:59:07.125Z +0100",
    "  indented twice,  and   thrice ",
    "The quick brown fox's DON'T isn't <b>bold</b>",
    "Grüße, naïve café, Ελλάδα, Привет, 你好，世界, こんにちは, 안녕, नमस्ते",
    "🙂👩‍🚀 e\u0301 \u212b \ufb01 \u00a0|\u3000|",
    "a",
    " ",
)


class View(Protocol):
    """What our tokenizer says of a vocabulary."""

    tokens: list[bytes]
    special_token_ids: list[int]

    def __call__(self, text: bytes | str) -> list[int]: ...


def native_tokenizer(library: Any, tokenizer_json: str, view: View, end_token_ids: Sequence[int]) -> Any | None:
    """An `LLTokenizer` that equals `view`; None if there is none. Takes a second for 150,000 tokens."""
    description = _without_spellings(json.loads(tokenizer_json), set(view.special_token_ids))
    if description is None:
        return None
    try:
        native = library.LLTokenizer(json.dumps(description), n_vocab=len(view.tokens), eos_token=list(end_token_ids))
    except BaseException as error:  # also a panic, which is no Exception: of a kind that llguidance does not read
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None
    return native if _is_equal(native, view) else None


def _without_spellings(description: dict[str, Any], special_token_ids: Collection[int]) -> dict[str, Any] | None:
    """With names for special tokens that nobody can know: written out in a text they stay plain text.

    They cannot be left out: their ids would be beyond the vocabulary.
    """
    model = description["model"]
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        return None
    unguessable = secrets.token_hex(16)
    for token in description["added_tokens"]:
        if token["id"] in special_token_ids:
            name = f"{unguessable}-{token['id']}"
            if token["content"] in vocab:
                vocab[name] = vocab.pop(token["content"])
            if model.get("unk_token") == token["content"]:
                model["unk_token"] = name
            token["content"] = name
    description["post_processor"] = None
    return description


def _is_equal(native: Any, view: View) -> bool:
    special = set(view.special_token_ids)
    plain = [i for i, text in enumerate(view.tokens) if text and text[0] != NO_TEXT and i not in special]
    return (
        all(native.decode_bytes([token_id]) == view.tokens[token_id] for token_id in plain)
        and not any(map(native.is_special_token, plain))
        and all(map(native.is_special_token, special))
        and all(native.tokenize_str(text) == view(text) for text in PROBES)
    )
