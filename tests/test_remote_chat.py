"""`nanovllm chat --url` against a small server over real sockets; and what it says when something is wrong."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from page_server import PageServer

from nanovllm.cli import main
from nanovllm.errors import ConfigError
from nanovllm.remote_chat import RemoteChat, RemoteError


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer() as running:
        yield running


@pytest.fixture
def chat(server, monkeypatch, capsys):
    def run(lines: str, *arguments: str, url: str = server.url) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        server.requests.clear()
        status = main(["chat", "--url", url, *arguments])
        return status, *capsys.readouterr()

    return run


def test_answers_stream_and_the_conversation_goes_on(chat, server):
    status, out, err = chat("one\ntwo\n/exit\n", "--system", "Be short.", "--temperature", "0", "--max-tokens", "9")
    assert (status, out) == (0, "You said: one\nYou said: two\n")
    assert "test-model at http" in err and "tokens/s" in err
    (_, body) = server.requests
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("test-model", 0.0, 9)
    assert "top_p" not in body


def test_reset_starts_over(chat, server):
    chat("one\n/reset\ntwo\n")
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["two"]


def test_reasoning_goes_to_standard_error(chat):
    _, out, err = chat("think\n")
    assert out == "So be it.\n" and "Let me think." in err


@pytest.mark.parametrize(
    ("line", "message"), [("busy", "answered 429: the queue is full"), ("break", "the engine died"), ("cut", "ended early")]
)
def test_a_failed_turn_is_explained_and_forgotten(chat, server, line, message):
    status, out, err = chat(f"{line}\nagain\n")
    assert status == 0 and message in err and "Traceback" not in err
    assert out.endswith("You said: again\n")
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["again"]


def test_a_script_learns_from_the_status_that_its_last_turn_failed(chat):
    assert chat("hello\nbusy\n")[0] == 1
    assert chat("busy\nhello\n")[0] == 0


def test_an_unknown_command_is_refused_here(chat, server):
    status, out, err = chat("/rest\n")
    assert status == 1 and out == "" and "unknown command /rest; did you mean '/reset'?" in err
    assert not server.requests


def test_a_key_is_sent(monkeypatch, capsys):
    with PageServer(key="sesame") as locked:
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        assert main(["chat", "--url", locked.url]) == 1
        assert "answered 401: invalid API key" in capsys.readouterr().err
        assert main(["chat", "--url", locked.url.rstrip("/") + "/v1", "--api-key", "sesame"]) == 0
        assert capsys.readouterr().out == "You said: hi\n"
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        monkeypatch.setenv("NANOVLLM_API_KEY", "sesame")
        assert main(["chat", "--url", locked.url, "--model", "other"]) == 0
        assert locked.requests[-1]["model"] == "other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "ftp://x"], "is not the address of a server"),
        (["--url", "http://"], "is not the address of a server"),
        (["--url", "http://x:99999"], "is not the address of a server"),
        (["--url", "http://127.0.0.1:9", "--block-size", "16"], "block_size: options of an engine"),
        (["--url", "http://127.0.0.1:9", "--temperature", "-1"], "temperature=-1.0"),
        (["--url", "http://127.0.0.1:9", "--api-key", "a\nb"], "no HTTP header can carry"),
        (["--url", "http://127.0.0.1:9"], "no answer from 127.0.0.1:9"),
        (["--api-key", "x"], "goes with --url"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, arguments, message):
    assert main(["chat", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(server):
    before = server.num_aborted
    command = [sys.executable, "-m", "nanovllm", "chat", "--url", server.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell's background job ignores the signal, and so would its children.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, text=True, **pipes, **listen) as process:
        process.stdin.write("slow\n")
        process.stdin.flush()
        assert process.stdout.read(6) == "word0 "
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate("and now\n", timeout=60)
    assert process.returncode == 0 and out.endswith("You said: and now\n")
    deadline = time.monotonic() + 10  # the server notices that a client has gone when it looks
    while server.num_aborted == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.num_aborted == before + 1


def raw_server(answer: bytes) -> str:
    """Answers every request with these bytes. Its thread ends with the listening socket's second connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
        b"HTTP/1.1 500 Oh\r\nContent-Length: 1\r\n\r\nx",
    ],
)
def test_a_server_of_another_kind_is_an_error_and_not_a_traceback(answer):
    with pytest.raises(RemoteError):
        RemoteChat(raw_server(answer))


@pytest.mark.parametrize(
    "events",
    [b"data: nope\n\n", b"data: [1]\n\n", b'data: {"choices": [1]}\n\n', b'data: {"choices": 5}\n\n', b'data: {"error": 1}\n\n'],
)
def test_events_of_another_kind_are_errors(events):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    remote = RemoteChat(raw_server(head + events), model="m")
    with pytest.raises(RemoteError):
        list(remote.stream([{"role": "user", "content": "x"}], {}))


def test_an_address_may_have_a_path():
    with pytest.raises(ConfigError):
        RemoteChat("http://x/?a=b", model="m")
    assert RemoteChat("host:8000/proxy/", model="m")._path == "/proxy/v1"
