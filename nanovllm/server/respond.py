"""JSON answers, encoded by msgspec. Sibling of `errors.py`: what a handler returns when all is well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

_encode = msgspec.json.Encoder().encode


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content`: a struct, or anything that msgspec turns into JSON."""
    return Response(_encode(content), status, headers, media_type="application/json")
