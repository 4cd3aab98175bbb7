"""Retries: the arithmetic of waits and budgets, and both clients against a server that is down, busy or cut off."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanovllm.bench.check import check_record
from nanovllm.bench.load import Target, send_workload
from nanovllm.bench.record import read_record
from nanovllm.cli import main
from nanovllm.errors import ConfigError
from nanovllm.remote_chat import RemoteChat, RemoteError
from nanovllm.retry import RESERVE, Retrier, RetryPolicy, retry_after_s
from nanovllm.workloads import make_workload

QUICK = RetryPolicy(max_retries=4, base_s=0.01, budget=1.0)


class FlakyServer(ThreadingHTTPServer):
    """Answers POST as the script says, one entry per request, then well. `at`: when requests came."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FlakyHandler)
        self.script: list[str] = []
        self.at: list[float] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()

    def next(self) -> str:
        with self.lock:
            self.at.append(time.monotonic())
            return self.script.pop(0) if self.script else "good"


class FlakyHandler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"data": [{"id": "flaky", "max_model_len": 100}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = self.server.next()
        if what == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif what == "cut late":
            self.stream(body, num_tokens=1, is_whole=False)
        elif what == "good":
            self.stream(body, num_tokens=body.get("max_tokens", 2), is_whole=True)
        else:
            status, _, seconds = what.partition(" ")
            self.answer(int(status), b'{"error": {"message": "not now"}}', {"Retry-After": seconds} if seconds else {})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, body: dict, num_tokens: int, is_whole: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(num_tokens):
            choice = {"delta": {"content": "word "}} if "messages" in body else {"text": "word "}
            self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        if is_whole:
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with FlakyServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def workload(num_requests: int = 1):
    return make_workload("fixed", num_requests=num_requests, num_input=4, num_output=3, vocabulary=40)


def send(server: FlakyServer, retries: RetryPolicy, num_requests: int = 1):
    target = Target(server.url, "flaky", retries=retries, max_concurrency=1)
    return asyncio.run(send_workload(target, workload(num_requests)))[0]


class TestPolicy:
    def test_waits_grow_up_to_the_limit_and_are_spread_from_zero_on(self):
        policy = RetryPolicy(max_retries=8, base_s=0.5, max_s=4.0, budget=1000)
        retrier = Retrier(policy, random.Random(0))
        retrier.begin()
        for number, limit in enumerate((0.5, 1, 2, 4, 4, 4, 4, 4)):
            waits = [retrier.wait_s(number) or 0.0 for _ in range(100)]
            assert max(waits) <= limit and max(waits) > 0.9 * limit and min(waits) < 0.1 * limit
        assert retrier.wait_s(8) is None

    def test_what_the_server_asks_for_is_the_least(self):
        retrier = Retrier(RetryPolicy(max_retries=3, base_s=0.5, max_s=30, budget=1000))
        retrier.begin()
        assert all(7 <= (retrier.wait_s(0, 7.0) or 0) <= 7.5 for _ in range(50))
        assert retrier.wait_s(0, 31.0) is None, "sooner than asked would be wrong, later than max_s too"

    def test_the_budget_is_a_share_of_all_requests(self):
        retrier = Retrier(RetryPolicy(max_retries=1, budget=0.1))
        for _ in range(1000):
            retrier.begin()
            retrier.wait_s(0)
        assert retrier.num_retries == RESERVE + 100

    @pytest.mark.parametrize("options", [{"max_retries": -1}, {"max_retries": True}, {"base_s": -0.1}, {"budget": float("nan")}])
    def test_wrong_values_are_refused_by_name(self, options):
        with pytest.raises(ConfigError, match=next(iter(options))):
            RetryPolicy(**options)

    def test_retry_after_in_both_forms(self):
        assert retry_after_s({"Retry-After": "12"}) == 12
        assert retry_after_s({"retry-after": formatdate(time.time() + 20, usegmt=True)}) == pytest.approx(20, abs=2)
        assert retry_after_s({"retry-after": formatdate(time.time() - 20, usegmt=True)}) == 0
        assert [retry_after_s(headers) for headers in ({}, {"retry-after": "soon"}, {"retry-after": "-3"})] == [None] * 3


class TestBench:
    def test_refusals_and_broken_connections_are_tried_again(self, server):
        server.script = ["503", "cut", "429", "502"]
        (row,) = send(server, QUICK)
        assert (row.error, row.num_retries, row.num_output) == ("", 4, 3)

    def test_times_begin_with_the_first_attempt_and_retry_after_is_obeyed(self, server):
        server.script = ["503 1"]
        (row,) = send(server, QUICK)
        assert row.error == "" and server.at[1] - server.at[0] >= 1.0
        assert row.ttft_ms >= 1000

    def test_without_the_option_nothing_is_tried_again(self, server):
        server.script = ["503"]
        (row,) = send(server, RetryPolicy())
        assert row.error.startswith("status 503") and row.num_retries == 0 and len(server.at) == 1

    @pytest.mark.parametrize("what", ["400", "500", "504", "cut late"])
    def test_what_would_not_help_or_has_begun_is_not_tried_again(self, server, what):
        server.script = [what]
        (row,) = send(server, QUICK)
        assert row.error and row.num_retries == 0 and len(server.at) == 1

    def test_a_server_that_stays_down_gets_no_more_than_the_budget(self, server):
        server.script = ["503"] * 1000
        rows = send(server, RetryPolicy(max_retries=5, base_s=0.001, budget=0.2), num_requests=40)
        assert all(row.error for row in rows)
        assert sum(row.num_retries for row in rows) <= RESERVE + 0.2 * 40
        assert len(server.at) == 40 + sum(row.num_retries for row in rows)

    def test_nobody_listening_is_tried_again_too(self):
        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        rows = asyncio.run(send_workload(Target(f"http://127.0.0.1:{port}", "flaky", retries=QUICK), workload()))[0]
        assert rows[0].num_retries == 4 and "Error" in rows[0].error

    def test_the_record_tells_of_retries(self, server, tmp_path, capsys):
        common = ["bench", "serve", "--url", server.url, "--precision", "float32", "--workload", "fixed", "--warmup-repeats", "0"]
        common += ["--set", "num_requests=3", "--set", "num_input=4", "--set", "num_output=3", "--set", "vocabulary=40"]
        common += ["--repeats", "1", "--folder", str(tmp_path)]
        server.script = ["503", "503"]
        assert main([*common, "--record", "on", "--retries", "5", "--retry-budget", "1"]) == 0
        assert main([*common, "--record", "off"]) == 0
        on, off = (next(tmp_path.glob(f"*-{name}.json")) for name in ("on", "off"))
        assert not check_record(on) and not check_record(off)
        assert read_record(on)["num_retries"] == 2
        assert read_record(on)["settings"]["retries"] == {"max_retries": 5, "base_s": 0.5, "max_s": 30.0, "budget": 1.0}
        assert "retries" not in read_record(off)["settings"] and "num_retries" not in read_record(off)


class TestChat:
    def answer(self, server: FlakyServer, retries: RetryPolicy = QUICK) -> str:
        chat = RemoteChat(server.url, retries=retries)
        return "".join(delta.text for delta in chat.stream([{"role": "user", "content": "hello"}], {}))

    def test_refusals_and_broken_connections_are_tried_again(self, server, caplog):
        server.script = ["503", "cut", "429 0"]
        assert self.answer(server) == "word word "
        assert "answered 503: not now; again in" in caplog.text

    def test_retry_after_is_obeyed(self, server):
        server.script = ["429 1"]
        self.answer(server)
        assert server.at[1] - server.at[0] >= 1.0

    def test_an_answer_that_has_begun_is_not_asked_for_again(self, server):
        server.script = ["cut late"]
        with pytest.raises(RemoteError, match="ended early"):
            self.answer(server)
        assert len(server.at) == 1

    def test_it_gives_up(self, server):
        server.script = ["503"] * 10
        with pytest.raises(RemoteError, match="answered 503: not now"):
            self.answer(server, RetryPolicy(max_retries=2, base_s=0.01))
        assert len(server.at) == 3
