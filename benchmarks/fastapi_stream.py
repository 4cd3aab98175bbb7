"""The least that a front end of FastAPI and pydantic costs: streamed completions of a fixed text, without an engine.

    python benchmarks/fastapi_stream.py PORT        # needs fastapi; see front_end_peer.py

vLLM's and SGLang's HTTP servers are made of these parts: a pydantic model for the request, one for each chunk, and a
StreamingResponse. Here nothing is tokenised, detokenised or asked of another process, so a real server of this kind costs
more. Every tick of a common clock is one token for each stream, as a step of an engine is.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

TICK_S = 0.02  # seconds between two tokens of a stream, if the process keeps up


class CompletionRequest(BaseModel):
    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    stream: bool = False
    ignore_eos: bool = False


class Choice(BaseModel):
    index: int
    text: str
    logprobs: list[float] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Chunk(BaseModel):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int] | None = None


class Clock:
    def __init__(self) -> None:
        self.tick = asyncio.Event()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.tick, tick = asyncio.Event(), self.tick
            tick.set()


clock = Clock()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    task = asyncio.ensure_future(clock.run())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/completions")
async def completions(request: Request) -> StreamingResponse:
    body = CompletionRequest.model_validate_json(await request.body())  # the client of front_end.py names no content type

    async def chunks() -> AsyncIterator[str]:
        name, created = f"cmpl-{uuid4().hex}", int(time.time())
        for number in range(body.max_tokens):
            await clock.tick.wait()
            reason = "length" if number + 1 == body.max_tokens else None
            choice = Choice(index=0, text=" word", finish_reason=reason)
            chunk = Chunk(id=name, created=created, model=body.model, choices=[choice])
            yield f"data: {chunk.model_dump_json(exclude_unset=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
