"""SafetensorsFiles: the weights of a model folder, one file or sharded, without a line of pickle.

Opening reads headers only. An index may lie, so it is held against the files: every shard must lie in the folder
itself, and every tensor in the shard that the index says. All tensors of the shards are visible, also those that the
index forgets, so that `load.py` can account for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nanovllm.errors import InvalidCheckpoint, ModelNotFound
from nanovllm.loaders.json_file import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class SafetensorsFiles:
    """The tensors of a folder's safetensors files under their own names (a `WeightSource`)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        shards, weight_map = find_shards(self.folder)
        self._files: dict[str, Any] = {}  # by tensor name: the open shard that has it
        self._file_names: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for shard in shards:
            self._add_shard(shard)
        self._check_index(weight_map)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._known(name)]

    def load(self, name: str) -> Tensor:
        """The tensor in its stored dtype. Its memory is the file's map: copy it, do not write to it."""
        try:
            return self._files[self._known(name)].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise InvalidCheckpoint(f"{self.folder / self._file_names[name]}: {name!r} cannot be read: {error}") from error

    def _known(self, name: str) -> str:
        if name not in self._shapes:
            raise InvalidCheckpoint(f"{self.folder} has no tensor {name!r}")
        return name

    def _add_shard(self, file_name: str) -> None:
        path = self.folder / file_name
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118  (the handle is no mapping)
            if name in self._shapes:
                raise InvalidCheckpoint(f"{self.folder}: {name!r} is in both {self._file_names[name]} and {file_name}")
            view = file.get_slice(name)
            if view.get_dtype() not in FLOAT_DTYPES:
                supported = ", ".join(FLOAT_DTYPES)
                raise InvalidCheckpoint(
                    f"{path} stores {name!r} as {view.get_dtype()}, which is not supported (only {supported} are)"
                )
            self._files[name], self._file_names[name] = file, file_name
            self._shapes[name] = tuple(view.get_shape())

    def _check_index(self, weight_map: dict[str, str]) -> None:
        lies = [name for name, file_name in weight_map.items() if self._file_names.get(name) != file_name]
        if lies:
            name = lies[0]
            raise InvalidCheckpoint(
                f"{self.folder / INDEX_FILE} says that {name!r} is in {weight_map[name]}, but it is not "
                f"({len(lies)} of {len(weight_map)} entries are wrong)"
            )


def open_safetensors(path: Path) -> Any:
    """The open file; its header has been checked against its size."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}") from error


def find_shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names to open, and the index's claims about them (empty without an index)."""
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE], {}
    if (folder / INDEX_FILE).is_file():
        return read_index(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise InvalidCheckpoint(
            f"{folder} has {len(found)} safetensors files but no {INDEX_FILE} that says which belong together"
        )
    raise no_safetensors(folder)


def read_index(folder: Path) -> tuple[list[str], dict[str, str]]:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{index} has no weight_map from tensor names to files")
    shards: list[str] = []
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not is_plain_file_name(file_name):
            raise InvalidCheckpoint(f"{index} places {name!r} in {file_name!r}; a .safetensors file of the same folder is needed")
        if file_name not in shards:
            shards.append(file_name)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InvalidCheckpoint(
            f"{folder} lacks {len(missing)} of {len(shards)} shards that {INDEX_FILE} names: {', '.join(missing)}"
        )
    return shards, weight_map


def is_plain_file_name(file_name: str) -> bool:
    """No separators: the shard cannot leave the folder. Links inside it are the owner's (the hub cache is made of them)."""
    return file_name.endswith(".safetensors") and not set(file_name) & set("/\\\0")


def no_safetensors(folder: Path) -> ModelNotFound:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return ModelNotFound(f"{folder} has no .safetensors file")
    return ModelNotFound(
        f"{folder} has its weights only in pickle files ({', '.join(pickles[:4])}), which are never loaded because reading them "
        "can execute code; convert the model to safetensors"
    )
