"""Tokenizers read from folders behave like Transformers' fast tokenizers; what cannot be read is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanovllm.errors import InvalidChatTemplate, InvalidCheckpoint, InvalidPrompt, ModelNotFound, UnsupportedTokenizer
from nanovllm.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "def add(a, b):\n    return a + b  # sums 1234 and 56789\n",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "Größe, naïve café, Ελληνικά, русский язык",
    "🎉🚀 emoji 👩‍👩‍👧‍👦 family",
] * 4
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "天地 玄黄",
    "🎉👩‍👩‍👧‍👦",
    "a  b   c\t\td\n\n\ne",
    "def f(x):\n\treturn x['a'] + 0x1F\n",
    "1 12 123 1234567",
    "<s>fox</s> <|user|>the<|user|>",
    "don't I'll THEY'RE",
    "e\u0301 é \u00a0 \u3000",
    "\u0000\u007f\ufffd",
]


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|user|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """Like Llama 2: BPE on text with signs for spaces, byte tokens for what is not in the vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False)
    backend.train_from_iterator(CORPUS[:2], trainer)
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    data["added_tokens"] = [token for token in data["added_tokens"] if token["special"]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    bos = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    backend.post_processor = bos
    return backend


def unigram_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BACKENDS = {"byte_level": byte_level_backend, "sentencepiece": sentencepiece_backend, "unigram": unigram_backend}


def write_folder(folder, backend, config=None, **files):
    """A checkpoint folder; files are given as name=object with __ for the dot."""
    folder.mkdir(exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def pair(folder):
    from transformers import PreTrainedTokenizerFast

    return Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)


CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 512}


@pytest.mark.parametrize("kind", BACKENDS)
def test_encodes_and_decodes_like_transformers(tmp_path, kind):
    ours, theirs = pair(write_folder(tmp_path / kind, BACKENDS[kind](), CONFIG))
    for text in TEXTS:
        for special in (True, False):
            token_ids = ours.encode(text, add_special_tokens=special)
            assert token_ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(token_ids, skip) == theirs.decode(token_ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize(
    "flags",
    [
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"add_bos_token": None},
        {"add_bos_token": True, "bos_token": None},
    ],
)
def test_tokenizer_json_decides_about_bos_and_eos_as_in_transformers(tmp_path, kind, flags):
    ours, theirs = pair(write_folder(tmp_path / kind, BACKENDS[kind](), {**CONFIG, **flags}))
    for text in ("", "the fox", " fox"):
        assert ours.encode(text) == theirs.encode(text)


def test_a_flag_that_contradicts_tokenizer_json_is_reported(tmp_path, caplog):
    backend = sentencepiece_backend()
    Tokenizer.from_folder(write_folder(tmp_path / "m", backend, {**CONFIG, "add_bos_token": True, "add_eos_token": False}))
    assert not caplog.records
    Tokenizer.from_folder(write_folder(tmp_path / "m", backend, {**CONFIG, "add_bos_token": False}))
    assert "says add_bos_token=False, but by tokenizer.json '<s>' is added" in caplog.text


def test_special_tokens_of_the_config_join_those_of_tokenizer_json(tmp_path):
    backend = byte_level_backend()
    size = backend.get_vocab_size()
    listed = {str(size): {"content": "<tool>", "special": False}, str(size + 1): {"content": "<end>", "special": True}}
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": "<end>",
        "added_tokens_decoder": listed,
        "additional_special_tokens": ["<|user|>", "fox"],
    }
    ours, theirs = pair(write_folder(tmp_path / "m", backend, config))
    text = "<s>a <tool>b<end> fox <|user|>"
    token_ids = ours.encode(text)
    assert token_ids == theirs.encode(text)
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.eos_token_id == size + 1
    assert ours.special_token_ids == {index for index, token in theirs.added_tokens_decoder.items() if token.special}


def test_an_added_token_with_another_id_than_announced_is_refused(tmp_path):
    config = {"added_tokens_decoder": {"9000": {"content": "<tool>", "special": False}}}
    with pytest.raises(InvalidCheckpoint, match=r"'<tool>' the id 9000"):
        Tokenizer.from_folder(write_folder(tmp_path / "m", byte_level_backend(), config))


def test_truncation_and_padding_of_the_training_run_are_ignored(tmp_path):
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    ours = Tokenizer.from_folder(write_folder(tmp_path / "m", backend))
    text = "the quick brown fox and more"
    assert ours.decode(ours.encode(text)) == text


def test_end_tokens_come_from_generation_config_and_the_eos_token(tmp_path):
    folder = write_folder(
        tmp_path / "m",
        byte_level_backend(),
        {"eos_token": "</s>"},
        generation_config__json={"eos_token_id": [2, 7]},
        config__json={"eos_token_id": 99, "bos_token_id": 0},
    )
    ours = Tokenizer.from_folder(folder)
    assert ours.end_token_ids == {1, 2, 7}
    assert (ours.eos_token_id, ours.bos_token_id) == (1, 0)


def test_a_tokenizer_without_special_tokens_has_none(tmp_path):
    ours = Tokenizer.from_folder(write_folder(tmp_path / "m", byte_level_backend()))
    assert (ours.eos_token_id, ours.bos_token_id, ours.end_token_ids) == (None, None, frozenset())
    assert ours.special_token_ids == {0, 1, 2}
    assert ours.token_to_id("<s>") == 0 and ours.id_to_token(0) == "<s>"
    assert ours.token_to_id("no such") is None and ours.id_to_token(10**6) is None and ours.id_to_token(-1) is None


def test_words_are_found_glued_and_after_a_space(tmp_path):
    byte_level = Tokenizer.from_folder(write_folder(tmp_path / "b", byte_level_backend()))
    spelled = [byte_level.decode(token_ids) for token_ids in byte_level.token_ids_of_word("fox")]
    assert spelled == ["fox", " fox"]
    assert [byte_level.decode(ids) for ids in byte_level.token_ids_of_word(" fox")] == [" fox"]
    pieces = Tokenizer.from_folder(write_folder(tmp_path / "s", sentencepiece_backend()))
    spelled = ["".join(map(pieces.id_to_token, ids)) for ids in pieces.token_ids_of_word("fox")]
    assert spelled == ["fox", "▁fox"]


@pytest.mark.parametrize("backend", [byte_level_backend, sentencepiece_backend])
def test_a_text_inside_of_another_keeps_its_spaces(tmp_path, backend):
    """Line breaks and spaces may be one piece, then a line break cannot stand before a text to show how it is cut."""
    ours = Tokenizer.from_folder(write_folder(tmp_path / "m", backend()))
    for text in ("fox", " fox", "  fox", "   fox", "\n  fox", "a<s>  b", " "):
        assert b"".join(map(ours.token_bytes, ours.encode_literally(text))) == text.encode()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("byte_level"), byte_level_backend()))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_byte_level_tokenizers_lose_nothing(byte_level, text):
    assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text


def test_bad_texts_are_the_fault_of_the_request(byte_level):
    with pytest.raises(InvalidPrompt, match="must be a string, got int"):
        byte_level.encode(3)
    with pytest.raises(InvalidPrompt, match="position 1"):
        byte_level.encode("a\ud800")
    with pytest.raises(InvalidPrompt, match="text 1"):
        byte_level.encode_batch(["a", None])


def test_a_folder_without_tokenizer_json_says_what_it_found(tmp_path):
    with pytest.raises(UnsupportedTokenizer, match=r"found merges.txt, vocab.json.*save_pretrained"):
        Tokenizer.from_folder(write_folder(tmp_path / "m", None, vocab__json={}, merges__txt=""))
    with pytest.raises(UnsupportedTokenizer, match="no other tokenizer file"):
        Tokenizer.from_folder(write_folder(tmp_path / "n", None))
    with pytest.raises(ModelNotFound, match="not a folder"):
        Tokenizer.from_folder(tmp_path / "missing")


@pytest.mark.parametrize(
    "name", ["tokenizer__json", "tokenizer_config__json", "special_tokens_map__json", "generation_config__json"]
)
@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_malformed_files_are_named(tmp_path, name, content):
    backend = None if name == "tokenizer__json" else byte_level_backend()
    folder = write_folder(tmp_path / "m", backend, **{name: content})
    with pytest.raises(InvalidCheckpoint, match=name.replace("__", ".")):
        Tokenizer.from_folder(folder)


def test_malformed_entries_are_named(tmp_path):
    for config in ({"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": [1]}, {"chat_template": [1]}):
        with pytest.raises(InvalidCheckpoint, match=next(iter(config))):
            Tokenizer.from_folder(write_folder(tmp_path / "m", byte_level_backend(), config))
    with pytest.raises(InvalidCheckpoint, match="eos_token_id"):
        Tokenizer.from_folder(write_folder(tmp_path / "n", byte_level_backend(), config__json={"eos_token_id": "</s>"}))


def test_unknown_kinds_of_tokenizers_are_refused(tmp_path):
    with pytest.raises(UnsupportedTokenizer, match="tokenizer.json cannot be loaded"):
        Tokenizer.from_folder(write_folder(tmp_path / "m", None, tokenizer__json={"model": {"type": "Magic"}}))
    backend = byte_level_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedTokenizer, match="decoder WordPiece"):
        Tokenizer.from_folder(write_folder(tmp_path / "n", backend))


def test_chat_templates_are_found_in_all_places(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    backend = byte_level_backend()

    def rendered(name, config, tools=None, **files):
        return Tokenizer.from_folder(write_folder(tmp_path / name, backend, config, **files)).apply_chat_template(
            chat, tools=tools
        )

    assert rendered("a", {"chat_template": "A{{ eos_token }}", "eos_token": "</s>"}) == "A</s>"
    assert rendered("b", {"chat_template": "A"}, chat_template__jinja="B") == "B"
    assert rendered("c", {}, chat_template__json={"chat_template": "C"}) == "C"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert rendered("d", {"chat_template": named}) == "D"
    assert rendered("d", {"chat_template": named}, tools=[{"type": "function"}]) == "T"
    with pytest.raises(InvalidChatTemplate, match="no chat template.*chat_template.jinja"):
        rendered("e", {})


def test_chat_equals_transformers(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}{{ extra }}"
    )
    ours, theirs = pair(write_folder(tmp_path / "m", byte_level_backend(), {**CONFIG, "chat_template": template}))
    chat = [{"role": "user", "content": " hi <é> "}, {"role": "assistant", "content": "well "}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for options in ({"extra": 1}, {"tools": tools}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        options = {"add_generation_prompt": False, **options}
        expected = theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours.apply_chat_template(chat, **options) == expected


def test_importing_the_tokenizer_stays_light():
    code = "import sys, nanovllm.tokenizer; print([m for m in ('torch', 'transformers', 'jinja2', 'numpy') if m in sys.modules])"
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    assert output.strip() == "[]"


def test_special_flags_follow_late_additions():
    """The library marks a token special when it is added again as such; the ids that we skip follow."""
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<x>", normalized=False)])
    from nanovllm.tokenizer_files import TokenizerParts

    assert backend.token_to_id("<x>") not in Tokenizer(TokenizerParts(backend)).special_token_ids
    backend.add_special_tokens([AddedToken("<x>", normalized=False, special=True)])
    assert backend.token_to_id("<x>") in Tokenizer(TokenizerParts(backend)).special_token_ids
