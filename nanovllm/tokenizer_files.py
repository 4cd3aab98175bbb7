"""Reads the tokenizer of a checkpoint folder in the format of Hugging Face.

Owns which file says what: `tokenizer.json` is the tokenizer; `tokenizer_config.json`, `special_tokens_map.json` and
`generation_config.json` name its special tokens; the chat template may be in three places. Where files disagree, the
result is that of Transformers' fast tokenizers. Returns `TokenizerParts`, as `gguf_vocabulary.py` does for GGUF files;
`tokenizer.py` puts a face on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from nanovllm.errors import InvalidCheckpoint, ModelNotFound, UnsupportedTokenizer
from nanovllm.log import logger

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What every source of a tokenizer has to deliver."""

    backend: tokenizers.Tokenizer
    named_tokens: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>"; chat templates see them
    end_token_ids: frozenset[int] = frozenset()  # all that end a generation, by the checkpoint's own words
    chat_templates: dict[str, str] = field(default_factory=dict)  # "default" and named ones, such as "tool_use"


def read_folder(folder: str | Path) -> TokenizerParts:
    """`UnsupportedTokenizer` when there is no tokenizer.json, `InvalidCheckpoint` when a file is malformed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is not a folder; expected a folder that holds tokenizer.json")
    backend = _read_backend(folder)
    config = read_json(folder / "tokenizer_config.json")
    named_tokens, extra_tokens = _special_tokens(folder, config, backend)
    _add_tokens(backend, config, named_tokens, extra_tokens)
    _compare_flags(backend, config, named_tokens)
    return TokenizerParts(
        backend=backend,
        named_tokens=named_tokens,
        end_token_ids=_end_token_ids(folder, backend, named_tokens),
        chat_templates=_chat_templates(folder, config),
    )


def surround_with(backend: tokenizers.Tokenizer, bos_token_id: int | None, eos_token_id: int | None) -> None:
    """Make `backend` put these tokens around every text that it encodes with special tokens."""
    template, special_tokens = ["$A:0"], []
    if bos_token_id is not None:
        template.insert(0, "bos:0")
        special_tokens.append(("bos", bos_token_id))
    if eos_token_id is not None:
        template.append("eos:0")
        special_tokens.append(("eos", eos_token_id))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, pair=None, special_tokens=special_tokens)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise InvalidCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = sorted(file.name for pattern in TOKENIZER_FILES for file in folder.glob(pattern))
        raise UnsupportedTokenizer(
            f"{folder} has no tokenizer.json (found {', '.join(found) or 'no other tokenizer file'}); convert it once with "
            f"Transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for everything
        read_json(path)
        raise UnsupportedTokenizer(f"{path} cannot be loaded by tokenizers {tokenizers.__version__}: {error}") from error
    backend.no_truncation()  # the file may hold the settings of its training run
    backend.no_padding()
    return backend


def _special_tokens(folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> tuple[dict[str, str], list[str]]:
    """Named special tokens, and those that only have to stay whole."""
    older = read_json(folder / "special_tokens_map.json")
    named = {}
    for name in NAMED_TOKENS:
        text = _token_text(config.get(name)) or _token_text(older.get(name))
        if text:
            named[name] = text
    for name, token_ids in (("eos_token", _generation_ids(folder, "eos")), ("bos_token", _generation_ids(folder, "bos"))):
        text = backend.id_to_token(token_ids[0]) if token_ids and name not in named else None
        if text is not None:
            named[name] = text
    extra: list[str] = []
    for source in (config, older):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(name) or ()
            extra += filter(None, map(_token_text, values.values() if isinstance(values, Mapping) else values))
    return named, extra


def _token_text(value: Any) -> str | None:
    """A token is written as a string or as an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named_tokens: Mapping[str, str], extra_tokens: Iterable[str]
) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not, and the special mark of the named ones."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in _listed_tokens(config):
        if token.content not in known:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise InvalidCheckpoint(
                    f"tokenizer_config.json gives token {token.content!r} the id {token_id}, "
                    f"but by tokenizer.json it is {backend.token_to_id(token.content)}"
                )
    special = [*named_tokens.values(), *extra_tokens]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in special])


def _listed_tokens(config: Mapping[str, Any]) -> list[tuple[int, tokenizers.AddedToken]]:
    """`added_tokens_decoder` by rising id."""
    listed = []
    try:
        for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
            flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
            normalized = bool(entry.get("normalized", not flags["special"]))
            listed.append((int(token_id), tokenizers.AddedToken(entry["content"], normalized=normalized, **flags)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"added_tokens_decoder of tokenizer_config.json is malformed: {error!r}") from error
    return sorted(listed, key=lambda pair: pair[0])


def _compare_flags(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named_tokens: Mapping[str, str]) -> None:
    """tokenizer.json decides which tokens surround a text, as in Transformers 5; a flag that says otherwise is reported."""
    surrounding = backend.encode("").ids
    for name in ("bos_token", "eos_token"):
        wanted = config.get(f"add_{name}")
        if wanted is None or name not in named_tokens:
            continue
        does_add = backend.token_to_id(named_tokens[name]) in surrounding
        if does_add != bool(wanted):
            logger.warning(
                "tokenizer_config.json says add_%s=%s, but by tokenizer.json %r is %s; tokenizer.json is followed, "
                "as in Transformers 5",
                *(name, wanted, named_tokens[name], "added" if does_add else "not added"),
            )


def _end_token_ids(folder: Path, backend: tokenizers.Tokenizer, named_tokens: Mapping[str, str]) -> frozenset[int]:
    token_ids = set(_generation_ids(folder, "eos"))
    eos_token_id = backend.token_to_id(named_tokens.get("eos_token", ""))
    if eos_token_id is not None:
        token_ids.add(eos_token_id)
    return frozenset(token_ids)


def _generation_ids(folder: Path, name: str) -> list[int]:
    """bos or eos ids of generation_config.json, or, for older checkpoints, of config.json."""
    for file in ("generation_config.json", "config.json"):
        value = read_json(folder / file).get(f"{name}_token_id")
        if value is None:
            continue
        token_ids = value if isinstance(value, list) else [value]
        if any(type(token_id) is not int or token_id < 0 for token_id in token_ids):
            raise InvalidCheckpoint(f"{folder / file}: {name}_token_id must be a token id or a list of them, got {value!r}")
        return token_ids
    return []


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A file of its own counts more than an entry of the config, as in Transformers."""
    templates = _named_templates(read_json(folder / "chat_template.json").get("chat_template"), "chat_template.json")
    templates |= _named_templates(config.get("chat_template"), "tokenizer_config.json")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(folder / "chat_template.jinja")
    return templates


def _named_templates(value: Any, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError) as error:
        raise InvalidCheckpoint(f"chat_template of {file} must be a string or a list of names and templates") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise InvalidCheckpoint(f"{path} is not UTF-8 text: {error}") from error
