from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nanovllm.errors import InvalidCheckpoint, ModelNotFound
from nanovllm.loaders.safetensors_files import SafetensorsFiles

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder: Path, weight_map: dict[str, Any] | None = None) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, folder / FIRST)
    save_file({"c": torch.zeros(1, dtype=torch.float16)}, folder / SECOND)
    write_index(folder, {"weight_map": weight_map or {"a": FIRST, "b": FIRST, "c": SECOND}})


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_single_file_gives_names_shapes_and_tensors(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor([1.5], dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    assert sorted(files.names()) == ["x", "y"]
    assert files.shape("x") == (2, 3)
    for name, tensor in tensors.items():
        assert torch.equal(files.load(name), tensor) and files.load(name).dtype == tensor.dtype


def test_a_single_file_may_have_another_name_but_must_be_the_only_one(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert SafetensorsFiles(tmp_path).names() == ["x"]
    save_file({"x": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(InvalidCheckpoint, match="2 safetensors files but no"):
        SafetensorsFiles(tmp_path)


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path)
    files = SafetensorsFiles(tmp_path)
    assert sorted(files.names()) == ["a", "b", "c"]
    assert files.load("a").tolist() == [[0, 1, 2], [3, 4, 5]] and files.load("c").dtype == torch.float16


def test_tensors_that_the_index_forgets_are_visible(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": FIRST, "c": SECOND})
    assert "b" in SafetensorsFiles(tmp_path).names()


@pytest.mark.parametrize("weight_map", [{"a": SECOND, "c": SECOND, "b": FIRST}, {"a": FIRST, "c": SECOND, "ghost": FIRST}])
def test_an_index_that_lies_is_refused(weight_map: dict[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(InvalidCheckpoint, match=r"index\.json says that .* but it is not"):
        SafetensorsFiles(tmp_path)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"lacks 1 of 2 shards .*{SECOND}"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize(
    "escape",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "..\\outside.safetensors",
        "sub/x.safetensors",
        "x.bin",
        "",
        7,
        None,
        ["x"],
    ],
)
def test_a_shard_outside_of_the_folder_is_refused(escape: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    write_index(folder, {"weight_map": {"a": escape}})
    with pytest.raises(InvalidCheckpoint, match="same folder"):
        SafetensorsFiles(folder)


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "blobs" / "4711")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "4711")
    assert SafetensorsFiles(tmp_path / "snapshot").names() == ["a"]


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_weight_map_is_refused(index: Any, tmp_path: Path) -> None:
    write_index(tmp_path, index)
    with pytest.raises(InvalidCheckpoint, match="index"):
        SafetensorsFiles(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / SECOND)
    with pytest.raises(InvalidCheckpoint, match="'a' is in both"):
        SafetensorsFiles(tmp_path)


def test_tensors_that_are_no_floats_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"qweight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="'qweight' as I32"):
        SafetensorsFiles(tmp_path)


def header_with_offsets(start: int, end: int) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [start, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{", struct.pack("<Q", 2) + b"{]", header_with_offsets(0, 4),
     header_with_offsets(0, 8)[:-1], header_with_offsets(0, 8) + b"more", header_with_offsets(8, 16)],
)  # fmt: skip
def test_malformed_files_are_refused_with_their_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors cannot be read"):
        SafetensorsFiles(tmp_path)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="no tensor 'y'"):
        SafetensorsFiles(tmp_path).load("y")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_checkpoints_are_refused_with_the_reason(pickle: str, tmp_path: Path) -> None:
    (tmp_path / pickle).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelNotFound, match="can execute code"):
        SafetensorsFiles(tmp_path)
