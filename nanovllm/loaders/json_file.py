"""Read the JSON files of a checkpoint as material from strangers: bounded in size, an object at the top, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidCheckpoint

MAX_JSON_BYTES = 64 << 20  # the largest index files are a few MB


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `InvalidCheckpoint` for anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InvalidCheckpoint(f"{path} has {size} bytes; JSON files of more than {MAX_JSON_BYTES} are refused")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidCheckpoint(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
