"""`nanovllm serve` as processes: what its start says, what signals and deaths do, and several front ends on one port."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanovllm.cli import build_parser, main
from nanovllm.server.serve import YOUNG_S

TESTS = Path(__file__).parent.parent
PROGRAM = """
import sys
sys.path[:0] = {path!r}
from nanovllm.log import configure_logging
from nanovllm.server.options import ServerOptions
from nanovllm.server.serve import serve
configure_logging()
sys.exit(serve(ServerOptions(**{options!r}), {{"builder": {builder!r}, "max_num_seqs": 8}}))
"""


class Process:
    """A server with a fake model; `port` is the one that its start-up line says."""

    def __init__(self, builder: str, options: dict, environment: dict[str, str]) -> None:
        program = PROGRAM.format(path=[str(TESTS.parent), str(TESTS)], options={"port": 0, **options}, builder=builder)
        environment = {**os.environ, **environment}
        self.process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self.port = 0
        self.ready_at = 0.0
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r" serving fake at http://127.0.0.1:(\d+) ", line):
                self.port = int(found[1])
                break
            if " serving fake at unix:" in line:
                break
        self.ready_at = time.monotonic()

    def request(self, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stream(self, max_tokens: int) -> socket.socket:
        """A streamed completion that has begun."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        body = json.dumps({"model": "fake", "prompt": "w1 w2", "max_tokens": max_tokens, "stream": True}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        return connection

    def children(self, name: str) -> list[int]:
        listed = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        ).stdout
        return [int(line.split()[0]) for line in listed.splitlines() if name in line]

    def wait(self, seconds: float = 15) -> int:
        self.lines += self.process.communicate(timeout=seconds)[1].splitlines()
        return self.process.returncode


@contextmanager
def server(builder: str = "served:slow", environment: dict[str, str] | None = None, **options):
    running = Process(builder, options, environment or {})
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
        if received.endswith(b"0\r\n\r\n"):
            break
    connection.close()
    return received


def test_sigterm_lets_a_stream_finish_and_the_status_is_0():
    with server() as running:
        assert "context of 16384 tokens" in running.lines[-1] and "without keys" in running.lines[-1]
        connection = running.stream(max_tokens=60)
        running.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while running.request("GET", "/ready")[0] == 200 and time.monotonic() < end:
            time.sleep(0.01)
        status, body = running.request("POST", "/v1/completions", {"model": "fake", "prompt": "w1"})
        assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
        answer = read_all(connection)
        assert b'"finish_reason":"length"' in answer and b"data: [DONE]" in answer
        assert running.wait() == 0


def test_a_second_signal_does_not_wait():
    with server() as running:
        connection = running.stream(max_tokens=10_000)
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGINT)
        assert b"shutting_down" in read_all(connection)
        assert running.wait() == 0


def test_kill_9_of_the_engine_is_told_to_streams_and_probes_and_ends_with_status_1():
    with server() as running:
        connection = running.stream(max_tokens=10_000)
        (engine,) = running.children("engine_main")
        os.kill(engine, signal.SIGKILL)
        answer = read_all(connection)
        assert b'"code":"engine_dead"' in answer and b"Traceback" not in answer and b".py" not in answer
        assert running.request("GET", "/health")[0] == 503
        assert running.wait() == 1
        assert any("the engine has died" in line for line in running.lines)


@pytest.mark.parametrize("num_frontends", [1, 2])
def test_an_engine_that_hangs_is_told_to_streams_and_probes_and_ends_with_status_1(num_frontends):
    with server(engine_timeout_s=3.0, num_frontends=num_frontends) as running:
        time.sleep(4)  # an idle engine gives signs of life, too
        assert running.request("GET", "/health")[0] == 200
        connection = running.stream(max_tokens=10_000)
        (engine,) = running.children("engine_main")
        os.kill(engine, signal.SIGSTOP)
        stopped = time.monotonic()
        answer = read_all(connection)
        assert 1.5 < time.monotonic() - stopped < 6
        assert b'"code":"engine_dead"' in answer
        while (status := running.request("GET", "/health")[0]) == 200 and time.monotonic() - stopped < 8:
            time.sleep(0.05)  # the other front end, which has noticed nothing yet
        assert status == 503
        assert running.wait() == 1
        assert any("no sign of life for 3 seconds" in line for line in running.lines)
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)


def test_without_a_limit_a_hung_engine_is_waited_for():
    with server(engine_timeout_s=0.0) as running:
        connection = running.stream(max_tokens=500)
        (engine,) = running.children("engine_main")
        os.kill(engine, signal.SIGSTOP)
        time.sleep(5)
        assert running.request("GET", "/health")[0] == 200
        os.kill(engine, signal.SIGCONT)
        assert b"data: [DONE]" in read_all(connection)


def test_an_engine_that_breaks_in_a_step_ends_the_server_the_same_way():
    with server("served:failing") as running:
        status, body = running.request("POST", "/v1/completions", {"model": "fake", "prompt": "w1", "max_tokens": 50})
        assert status == 503 and b"caught fire" not in body
        assert running.wait() == 1


@pytest.fixture(scope="class")
def family():
    with server(
        num_frontends=2, environment={"NANOVLLM_ADMIN_KEYS": "sk-admin-123", "NANOVLLM_API_KEYS": "sk-user-123"}
    ) as running:
        yield running


class TestTwoFrontEnds:
    """One after the other, on one server."""

    KEY = {"X-Api-Key": "sk-user-123"}  # noqa: RUF012
    ADMIN = {"X-Api-Key": "sk-admin-123"}  # noqa: RUF012

    def counted(self, family, name: str) -> float:
        text = family.request("GET", "/metrics", headers=self.KEY)[1].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def test_both_answer_on_one_port_and_metrics_are_those_of_both(self, family):
        assert len(family.children("nanovllm.server.frontend")) == 2
        for _ in range(24):
            status, _ = family.request("POST", "/v1/completions", {"model": "fake", "prompt": "w1", "max_tokens": 2}, self.KEY)
            assert status == 200
        time.sleep(1.2)  # counts of the other are at most a second old
        for _ in range(6):
            assert self.counted(family, "vllm:generation_tokens_total") == 48
        inspected = json.loads(family.request("GET", "/admin/inspect", headers=self.ADMIN)[1])
        assert sorted(inspected["engine"]["frontends"]) == ["0", "1", "2"]  # and the parent, which sends nothing

    def test_limits_reach_both(self, family):
        changes = {"max_queued_requests": 6, "max_num_seqs": 4}
        assert family.request("POST", "/admin/limits", changes, self.ADMIN)[0] == 200
        time.sleep(1.2)
        for _ in range(8):
            shown = json.loads(family.request("GET", "/admin/limits", headers=self.ADMIN)[1])
            assert changes.items() <= shown.items()

    def test_one_that_dies_is_replaced_and_its_counts_are_kept(self, family):
        time.sleep(max(0.0, family.ready_at + YOUNG_S + 0.5 - time.monotonic()))  # older than one that cannot stay up
        victim = family.children("nanovllm.server.frontend")[0]
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 10
        while (family.children("nanovllm.server.frontend") or [victim])[0] == victim or len(family.children("frontend")) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(2)
        assert self.counted(family, "vllm:generation_tokens_total") == 48

    def test_a_drain_asked_of_one_ends_all_with_status_0(self, family):
        assert family.request("POST", "/admin/drain", {}, self.ADMIN)[0] == 202
        assert family.wait() == 0


def test_a_unix_socket_is_for_its_user_alone_and_goes_away(tmp_path):
    path = tmp_path / "server.sock"
    with server(uds=str(path)) as running:
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0 and not path.exists()


def test_the_unix_socket_of_a_killed_server_is_taken_over_and_that_of_a_living_one_is_not(tmp_path, capsys):
    path = tmp_path / "server.sock"
    with server(uds=str(path)) as running:
        assert main(["serve", "--uds", str(path)]) == 1 and "cannot listen on" in capsys.readouterr().err
        running.process.kill()
        running.process.wait()
        assert path.exists()
        with server(uds=str(path)) as successor:
            assert " serving fake at unix:" in successor.lines[-1]


def test_a_sigterm_while_the_model_is_loading_ends_in_good_order():
    program = PROGRAM.format(path=[str(TESTS.parent), str(TESTS)], options={"port": 0}, builder="served:never_ready")
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "loading for ever" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "stopped while it was starting" in rest and "Traceback" not in rest


def test_a_taken_port_is_said_before_the_model_is_loaded(capsys):
    for more in ([], ["--num-frontends", "2"]):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            assert main(["serve", "--port", str(taken.getsockname()[1]), *more]) == 1
            err = capsys.readouterr().err
            assert "cannot listen on 127.0.0.1" in err and "memory plan" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there are no API keys"),
        (["--port", "99999"], "port=99999"),
        (["--num-frontends", "0"], "num_frontends=0"),
        (["--api-key-file", "/no/such/file"], "cannot be read"),
        (["--queue-timeout-s", "-1"], "queue_timeout_s=-1"),
        (["--queue-timeout-s", "nan"], "queue_timeout_s=nan"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("NANOVLLM_API_KEYS", raising=False)
    assert main(["serve", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_every_option_of_the_server_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "completions that wait for the engine; more get 429" in out and "tokens per KV block" in out
    assert not re.findall(r"--[a-z-]+ [A-Z_]+ \(default", out)
