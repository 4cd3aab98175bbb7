"""A tiny server that speaks the API as far as the chat page needs it; the last message says how it behaves.

    python tests/server/page_server.py 8001

Real sockets and real SSE, but answers that a test can foresee. The same page runs against the real server in
`test_page_real.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nanovllm.server import page

MARKDOWN = """# Sorting

Two ways, **both** *short*, with `sorted`:

1. the function
   - returns a list
   - keeps the order of equals
2. the method

```python
def first(items: list[int]) -> int:
    return sorted(items)[0]  # <b>not bold</b>
```

> quoted <script>document.title = "hacked"</script>

<img src=x onerror="document.title='hacked'"> and [a link](javascript:document.title='hacked')

Done.
"""


class PageServer:
    """Runs in a thread of its own; `requests` are the bodies that came in."""

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.requests: list[dict] = []
        self.num_aborted = 0
        routes = [
            *page.routes,
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self) -> PageServer:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()

    def refuse(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "invalid API key"}}, 401)
        return None

    async def models(self, request: Request) -> Response:
        return self.refuse(request) or JSONResponse({"object": "list", "data": [{"id": "test-model", "max_model_len": 2048}]})

    async def chat(self, request: Request) -> Response:
        if (refusal := self.refuse(request)) is not None:
            return refusal
        body = await request.json()
        self.requests.append(body)
        text = body["messages"][-1]["content"]
        if text == "busy":
            return JSONResponse({"error": {"message": "the queue is full <b>now</b>"}}, 429)
        return StreamingResponse(self.answer(text), media_type="text/event-stream")

    async def answer(self, text: str) -> AsyncIterator[str]:
        yield event({"role": "assistant", "content": ""})
        count = 0
        try:
            for count, (kind, piece) in enumerate(pieces(text), 1):
                if piece is None:
                    yield "data: " + json.dumps({"error": {"message": "the engine died"}}) + "\n\n"
                    return
                await asyncio.sleep(0.05 if text == "slow" else 0.001)
                yield event({kind: piece}, usage={"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count})
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        if text == "cut":
            return
        yield event({}, finish_reason="length" if text == "long" else "stop")
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": count,
            "total_tokens": 7 + count,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        yield "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\n"
        yield "data: [DONE]\n\n"


def event(delta: dict, finish_reason: str | None = None, usage: dict | None = None) -> str:
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": usage}
    return "data: " + json.dumps(chunk) + "\n\n"


def pieces(text: str) -> list[tuple[str, str | None]]:
    if text == "markdown":
        return [("content", MARKDOWN[i : i + 4]) for i in range(0, len(MARKDOWN), 4)]
    if text == "slow":
        return [("content", f"word{i} ") for i in range(400)]
    if text == "think":
        return [("reasoning", "Let me "), ("reasoning", "think."), ("content", "So "), ("content", "be it.")]
    if text == "break":
        return [("content", "Half an "), ("content", None)]
    if text == "stars":
        return [("content", "*" + "`*a" * 30_000)]
    return [("content", f"You said: {text}")]


if __name__ == "__main__":
    with PageServer(key=sys.argv[1] if len(sys.argv) > 1 else "") as running, contextlib.suppress(KeyboardInterrupt):
        print(running.url, flush=True)
        running.thread.join()
