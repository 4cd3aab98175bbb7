"""Builds a tokenizer from the metadata of a GGUF file.

A GGUF file stores the vocabulary, not the tokenizer: how text is cut before merging is only named
(`tokenizer.ggml.pre`), and SentencePiece merges are implied by scores. Owns these names and rules. A name that is not
in `PRE_TOKENIZERS` is refused: a wrong pre-tokenizer gives wrong ids without any error. Where llama.cpp and the
model's own tokenizer.json differ, the latter is followed (Qwen's NFC normalisation is the one known case).
Returns `TokenizerParts`, as `tokenizer_files.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from nanovllm.errors import InvalidCheckpoint, UnsupportedTokenizer
from nanovllm.tokenizer_files import TokenizerParts, surround_with

PREFIX = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # token types of the GGUF specification
SPACE = "\u2581"  # SentencePiece writes a space as this

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level model cuts text into the words inside which it merges."""

    splits: tuple[str, ...]  # regular expressions, each cutting the pieces of the one before
    is_nfc: bool = False  # text is normalised first
    ignores_merges: bool = False  # a word that is a token needs no merges
    adds_bos: bool = False  # unless the file says otherwise


PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "starcoder": PreTokenizer((r"\p{N}", _GPT2)),
    "qwen2": PreTokenizer((_QWEN2,), is_nfc=True),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
    "llama3": PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
    "llama-v3": PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The token lists of the file, checked."""

    tokens: list[str]
    types: list[int]

    def of_type(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def read_metadata(metadata: Mapping[str, Any]) -> TokenizerParts:
    """`metadata` maps GGUF keys to Python values; arrays are lists or numpy arrays."""
    kind = _text(metadata, "model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.model={kind!r} is not implemented; supported: 'gpt2' (byte-level BPE), 'llama'"
        )
    vocabulary = _read_vocabulary(metadata)
    if kind == "gpt2":
        backend, adds_bos = _build_byte_level(metadata, vocabulary)
    else:
        backend, adds_bos = _build_sentencepiece(metadata, vocabulary), True
    _add_special_tokens(backend, vocabulary)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    special_ids = _special_ids(metadata, defaults, len(vocabulary.tokens))
    surround_with(
        backend,
        special_ids.get("bos") if metadata.get(PREFIX + "add_bos_token", adds_bos) else None,
        special_ids.get("eos") if metadata.get(PREFIX + "add_eos_token", False) else None,
    )
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return TokenizerParts(
        backend=backend,
        named_tokens={names[key]: vocabulary.tokens[index] for key, index in special_ids.items() if key in names},
        end_token_ids=frozenset(special_ids[key] for key in ("eos", "eot", "eom") if key in special_ids),
        chat_templates=_chat_templates(metadata),
    )


def _build_byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    name = _text(metadata, "pre")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedTokenizer(f"tokenizer.ggml.pre={name!r} is not implemented; supported: {', '.join(PRE_TOKENIZERS)}")
    rules = PRE_TOKENIZERS[name]
    merges = [_cut_merge(merge) for merge in _array(metadata, "merges")]
    backend = tokenizers.Tokenizer(_bpe(vocabulary, merges, ignore_merges=rules.ignores_merges))
    if rules.is_nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in rules.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend, rules.adds_bos


def _build_sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    scores = [float(score) for score in _array(metadata, "scores")]
    if len(scores) != len(vocabulary.tokens):
        raise InvalidCheckpoint(f"the GGUF file has {len(vocabulary.tokens)} tokens but {len(scores)} scores")
    unknown = vocabulary.of_type(UNKNOWN)
    backend = tokenizers.Tokenizer(
        _bpe(
            vocabulary,
            _merges_by_score(vocabulary, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = bool(metadata.get(PREFIX + "add_space_prefix", True))
    prepend = [normalizers.Prepend(SPACE)] if adds_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    return backend


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises plain Exception, for instance for a merge of unknown tokens
        raise InvalidCheckpoint(f"the merges of the GGUF file do not fit its tokens: {error}") from error


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union has the highest score; a merge list says the same in order.

    Worked example: tokens a, b, c, ab (-1), bc (-2), abc (-3) give (a, b), (b, c), (ab, c), (a, bc). Of the cuts of
    one token the one with the longer left part comes first, as SentencePiece works from the left.
    """
    score_of = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
    }
    merges = []
    for token, score in score_of.items():
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in score_of and token[cut:] in score_of:
                merges.append((-score, -cut, token[:cut], token[cut:]))
    merges.sort()
    return [(left, right) for _, _, left, right in merges]


def _add_special_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Both kinds stay whole in text; only control tokens vanish when special tokens are skipped."""
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in vocabulary.of_type(USER_DEFINED)])
    control = vocabulary.of_type(CONTROL, UNKNOWN)
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = [str(token) for token in _array(metadata, "tokens")]
    types = [int(kind) for kind in metadata.get(PREFIX + "token_type", [1] * len(tokens))]
    if len(types) != len(tokens):
        raise InvalidCheckpoint(f"the GGUF file has {len(tokens)} tokens but {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        repeated = next(token for token in tokens if token in seen or seen.add(token))
        raise InvalidCheckpoint(f"token {repeated!r} stands twice in the vocabulary of the GGUF file")
    return _Vocabulary(tokens, types)


def _special_ids(metadata: Mapping[str, Any], defaults: dict[str, int], num_tokens: int) -> dict[str, int]:
    token_ids = dict(defaults)
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"{PREFIX}{name}_token_id")
        if value is not None:
            token_ids[name] = int(value)
    for name, token_id in token_ids.items():
        if not 0 <= token_id < num_tokens:
            raise InvalidCheckpoint(f"tokenizer.ggml.{name}_token_id={token_id} is outside the vocabulary of {num_tokens} tokens")
    return token_ids


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    templates = {key[len(prefix) :]: str(value) for key, value in metadata.items() if key.startswith(prefix)}
    if "tokenizer.chat_template" in metadata:
        templates["default"] = str(metadata["tokenizer.chat_template"])
    return templates


def _cut_merge(merge: str) -> tuple[str, str]:
    """Cut at the first space that is not the first character."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise InvalidCheckpoint(f"merge {merge!r} of the GGUF file is not two tokens with a space between them")
    return merge[:cut], merge[cut + 1 :]


def _text(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(PREFIX + name)
    if not isinstance(value, str) or not value:
        raise UnsupportedTokenizer(f"the GGUF file does not say tokenizer.ggml.{name}; convert the model anew")
    return value


def _array(metadata: Mapping[str, Any], name: str) -> Any:
    if PREFIX + name not in metadata:
        raise InvalidCheckpoint(f"the GGUF file has no tokenizer.ggml.{name}")
    return metadata[PREFIX + name]
