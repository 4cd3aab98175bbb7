"""The chat page at `/` and the inspector at `/inspector`: small files, served from memory. No build step, no other hosts.

The chat page talks to `/v1/chat/completions` like any client, the inspector to `/admin/inspector`; each keeps its key in the
tab's session storage, and without one the files tell nothing of the server. Their content security policy allows our own
scripts and style sheets and nothing else: no inline script, no frames, and no HTML made from strings (`trusted-types`), so
that what a model or a client writes can only become text.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {  # path -> (file, content type)
    "/": ("chat.html", "text/html; charset=utf-8"),
    "/page/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/page/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/inspector": ("inspector.html", "text/html; charset=utf-8"),
    "/page/inspector.css": ("inspector.css", "text/css; charset=utf-8"),
    "/page/inspector.js": ("inspector.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asks every time, and gets 304
}


def _file_route(path: str, name: str, content_type: str) -> Route:
    content = resources.files(__name__).joinpath(name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=content_type)

    return Route(path, answer, methods=["GET"], name=f"page: {name}")


routes = [_file_route(path, *file) for path, file in FILES.items()]
open_paths = tuple(FILES)  # need no API key: they hold nothing but the page itself
