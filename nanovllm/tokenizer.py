"""One face for all tokenizers: text to token ids, token ids to text, chat messages to a prompt.

Owns what the engine and the server may ask of a tokenizer. Where it comes from is decided in `tokenizer_files.py` (a
folder with tokenizer.json) and `gguf_vocabulary.py` (the metadata of a GGUF file); encoding is done by the
`tokenizers` library. Knows nothing of models, requests or sampling. Decoding is in `text_stream.py`, chat templates in
`chat_template.py`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from nanovllm.errors import InvalidChatTemplate, InvalidPrompt
from nanovllm.text_stream import TextStream, TextStreams
from nanovllm.tokenizer_files import TokenizerParts, read_folder

if TYPE_CHECKING:
    from nanovllm.chat_template import ChatTemplate


class Tokenizer:
    """Thread-safe. Token ids are those of the checkpoint; special tokens written out in a text become their ids."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.parts = parts  # `Tokenizer(parts)` makes an equal one
        self._backend = parts.backend
        self._named_tokens = parts.named_tokens
        self._templates = parts.chat_templates
        self._compiled: dict[str, ChatTemplate] = {}
        self.end_token_ids = parts.end_token_ids
        self.bos_token_id = self._id_of_named("bos_token")
        self.eos_token_id = self._id_of_named("eos_token")
        self.special_token_ids = _special_token_ids(parts)
        self._streams = TextStreams(parts.backend, self.special_token_ids)
        self._spelled: dict[int, tuple[str, list[int]]] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """From the tokenizer.json of a checkpoint, and the files beside it."""
        return cls(read_folder(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata: key -> Python value, arrays as lists or numpy arrays."""
        from nanovllm.gguf_vocabulary import read_metadata  # only GGUF checkpoints need it

        return cls(read_metadata(metadata))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From what `to_json` wrote, in another process."""
        return cls(TokenizerParts(tokenizers.Tokenizer.from_str(text)))

    def to_json(self) -> str:
        """Enough to encode and decode; names of special tokens, end tokens and chat templates are left out."""
        return self._backend.to_str()

    # Text to ids and back.

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens` puts around the text what the model expects there (a bos token, say)."""
        _check_text(text, "the text")
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # lets other threads run;
        return batch[0].ids  # the library's `encode` does not

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The same for many texts, on all cores."""
        for index, text in enumerate(texts):
            _check_text(text, f"text {index}")
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids that the vocabulary does not know have no text."""
        stream = self.text_stream(skip_special_tokens)  # not the library: whole and streamed text must be the same
        ids = [*map(operator.index, token_ids)]  # elements of a tensor would each be a new key of the stream's table
        return stream.push(ids) + stream.finish()

    def text_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """`decode` for ids that arrive little by little."""
        return self._streams.open(skip_special_tokens)

    def token_ids_of_word(self, word: str) -> list[list[int]]:
        """The id sequences that write `word` inside a text: glued to what is before it, and after a space.

        Worked example: "fox" gives the ids of "fox" and of " fox"; " fox" gives only the latter.
        """
        spellings = [word] if word.startswith(" ") else [word, " " + word]
        found: list[list[int]] = []
        for spelling in spellings:
            token_ids = self._encode_in_text(spelling)
            if token_ids and token_ids not in found:
                found.append(token_ids)
        return found

    def _encode_in_text(self, text: str) -> list[int]:
        """Ids of `text` when it is not the beginning: some tokenizers write a space before the first word."""
        alone = self.encode(text, add_special_tokens=False)
        if self._writes(alone, text):
            return alone
        for before in ("\n", ".", "\x01"):  # one that does not grow together with the text
            anchor = self.encode(before, add_special_tokens=False)
            anchored = self.encode(before + text, add_special_tokens=False)
            if anchored[: len(anchor)] == anchor and self._writes(anchored[len(anchor) :], text):
                return anchored[len(anchor) :]
        return alone

    def _writes(self, token_ids: Sequence[int], text: str) -> bool:
        return b"".join(map(self.token_bytes, token_ids)) == text.encode()

    def encode_literally(self, text: str) -> list[int]:
        """Ids of `text` inside a longer one, in which special tokens that are written out stay plain text."""
        token_ids: list[int] = []
        start = 0
        for match in self._special_spellings.finditer(text):  # cut each after its first character
            token_ids += self._encode_in_text(text[start : match.start() + 1])
            start = match.start() + 1
        return token_ids + self._encode_in_text(text[start:])

    @cached_property
    def _special_spellings(self) -> re.Pattern[str]:
        spellings = [self._backend.id_to_token(token_id) for token_id in sorted(self.special_token_ids)]
        return re.compile("|".join(re.escape(spelling) for spelling in spellings if spelling) or r"(?!)")

    # The vocabulary.

    def token_bytes(self, token_id: int) -> bytes:
        """What a token writes inside a text, special tokens too; empty for ids that the vocabulary does not know."""
        return self._streams.bytes_of(token_id)

    def spelled(self, token_id: int) -> tuple[str, list[int]]:
        """Its text, in which part of a character is U+FFFD, and its bytes, not to be changed: both are kept."""
        if (known := self._spelled.get(token_id)) is None:
            content = self.token_bytes(token_id)
            known = self._spelled[token_id] = content.decode("utf-8", "replace"), list(content)
        return known

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model may have more rows in its embedding than this."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def max_token_length(self) -> int:
        """Characters of the longest token, as the vocabulary spells it: its text is not longer."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def token_to_id(self, text: str) -> int | None:
        return self._backend.token_to_id(text)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, which is not its text: use `decode` for that."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def _id_of_named(self, name: str) -> int | None:
        text = self._named_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    # Chat.

    @property
    def chat_template(self) -> str | None:
        """The source of the default template."""
        return self._templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt of a chat. Encode it with `add_special_tokens=False`: templates write the special tokens.

        `add_generation_prompt` opens the assistant's turn; left out, it does unless the last message is continued.
        """
        template = self._compiled_template("tool_use" if tools and "tool_use" in self._templates else "default")
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables={**self._named_tokens, **template_kwargs},
        )

    def _compiled_template(self, name: str) -> ChatTemplate:
        from nanovllm.chat_template import ChatTemplate  # Jinja takes 30 ms to import, and only chats need it

        if name not in self._templates:
            raise InvalidChatTemplate(
                "this model has no chat template, so it cannot take messages; send a plain prompt, "
                "or put a chat_template.jinja into the model's folder"
            )
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self._templates[name])
        return self._compiled[name]


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise InvalidPrompt(f"{where} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidPrompt(f"{where} has half of a surrogate pair at position {error.start}: it is not valid Unicode") from None


def _special_token_ids(parts: TokenizerParts) -> frozenset[int]:
    """Ids that `decode` leaves out when it skips special tokens."""
    added = parts.backend.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)
