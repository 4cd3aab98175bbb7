"""A client for `nanovllm chat --url`: one streamed answer from an OpenAI-compatible server, with the standard library.

Knows the chat completions protocol and nothing else of nanovllm. Every failure, of the network or told by the server,
is a `RemoteError` whose message can be shown. Closing the iterator closes the connection, which makes the server stop.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from nanovllm.errors import ConfigError, NanoVllmError
from nanovllm.log import logger
from nanovllm.retry import STATUSES, Retrier, RetryPolicy, retry_after_s

TIMEOUT_S = 600.0  # without a single byte from the server
MAX_LINE = 2**24  # bytes of one event
MAX_ANSWER = 2**24  # bytes of an answer that is not streamed
DEFAULT_RETRIES = RetryPolicy(max_retries=3)


class RemoteError(NanoVllmError):
    """The server cannot be reached, refused the request, or broke the answer off."""

    def __init__(self, message: str, may_retry: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.may_retry, self.retry_after_s = may_retry, retry_after_s


class RemoteDelta(NamedTuple):
    text: str
    is_reasoning: bool
    num_tokens: int  # of the whole answer so far


class RemoteChat:
    """One server and one of its models. Raises `ConfigError` for a malformed URL, `RemoteError` for the rest."""

    def __init__(
        self, url: str, api_key: str | None = None, model: str | None = None, retries: RetryPolicy = DEFAULT_RETRIES
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise ConfigError(f"url={url!r} is not the address of a server, such as http://127.0.0.1:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that no HTTP header can carry")
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect = lambda: connection(parts.hostname or "", port, timeout=TIMEOUT_S)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        self._retrier = Retrier(retries)
        self.model = model if model is not None else self._first_model()

    def _first_model(self) -> str:
        connection, response = self._call("GET", "/models")  # once: a wrong address is told without delay
        try:
            return json.loads(response.read(MAX_ANSWER))["data"][0]["id"]
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise RemoteError(f"the server did not name its model: {error!r}") from error
        finally:
            connection.close()

    def stream(self, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> Generator[RemoteDelta, None, None]:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"model": self.model, "messages": list(messages), "stream": True, "stream_options": options, **params}
        connection, response = self._call_patiently("POST", "/chat/completions", json.dumps(body).encode())
        num_tokens = 0
        try:
            for event in _events(response):
                usage, choices = event.get("usage"), event.get("choices") or [{}]
                delta = choices[0].get("delta") or {}
                for key, is_reasoning in (("reasoning", True), ("content", False)):
                    if delta.get(key):
                        num_tokens = usage["completion_tokens"] if usage else num_tokens + 1
                        yield RemoteDelta(delta[key], is_reasoning, num_tokens)
                if usage:
                    num_tokens = usage["completion_tokens"]
            yield RemoteDelta("", False, num_tokens)
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(f"the answer broke off: {error!r}") from error
        except (LookupError, TypeError, AttributeError) as error:
            raise RemoteError(f"the server sent something that is not a chat completion: {error!r}") from error
        finally:
            connection.close()

    def _call_patiently(self, *call: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """`_call`, again after a wait where that may help."""
        self._retrier.begin()
        for num_retries in count():
            try:
                return self._call(*call)
            except RemoteError as error:
                wait = self._retrier.wait_s(num_retries, error.retry_after_s) if error.may_retry else None
                if wait is None:
                    raise
                logger.warning("%s; again in %.1f s", error, wait)
                time.sleep(wait)
        raise AssertionError("count() has no end")

    def _call(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """The caller closes the connection."""
        connection = self._connect()
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response
            answer = response.read(MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise RemoteError(f"no answer from {connection.host}:{connection.port}: {error}", may_retry=True) from error
        except BaseException:
            connection.close()
            raise
        connection.close()
        hint = "; give one with --api-key or NANOVLLM_API_KEY" if response.status == 401 else ""
        message = f"the server answered {response.status}: {_reason(answer) or response.reason}{hint}"
        raise RemoteError(message, response.status in STATUSES, retry_after_s(dict(response.headers)))


def _reason(answer: bytes) -> str | None:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return None


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line. A stream without its [DONE] has broken off."""
    while line := response.readline(MAX_LINE):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise RemoteError(f"the server sent an event that is not JSON: {error}") from error
        if not isinstance(event, dict):
            raise RemoteError("the server sent an event that is not an object")
        if event.get("error"):
            raise RemoteError(_reason(data) or "the server sent an error without a message")
        yield event
    raise RemoteError("the answer broke off: the stream ended early")
