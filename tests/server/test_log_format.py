"""`--log-format json`: every line of every process is an object."""

from __future__ import annotations

import json
import logging
import socket

from live_server import live_server, write_tiny_model

from nanovllm.log import Fields, JsonLines


def test_every_line_of_a_server_is_an_object(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    options = ("--num-threads", "1", "--num-kv-blocks", "64", "--num-frontends", "2", "--log-format", "json")
    with live_server("--model", str(model), *options) as server:
        assert server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2}).status == 200
        assert server.get("/nothing/here").status == 404
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(b"NONSENSE\r\n\r\n")
            assert b" 400 " in connection.recv(1000)
    lines = [json.loads(line) for line in server.log if line.strip()]
    assert all(line["level"] in ("INFO", "WARNING") and line["time"] > 1.7e9 for line in lines)
    requests = {line["path"]: line for line in lines if "path" in line}
    assert requests["/v1/completions"]["status"] == 200 and requests["/v1/completions"]["completions"]
    assert requests["/nothing/here"]["status"] == 404
    assert not [line for line in lines if "message" in line and '"path"' in line["message"]]  # not a second time as a text
    assert any("Invalid HTTP request" in line.get("message", "") for line in lines)  # a library's word
    assert any("memory plan" in line.get("message", "") for line in lines)  # of the engine's process


def test_an_access_line_is_encoded_once_in_either_form(monkeypatch):
    line = Fields(path="/é", status=200)
    record = logging.LogRecord("nanovllm.access", logging.INFO, "", 0, line, None, None)
    encoded = []
    monkeypatch.setattr(
        json, "dumps", lambda value, dumps=json.dumps, **options: encoded.append(value) or dumps(value, **options)
    )
    text = logging.Formatter("%(levelname)s %(message)s").format(record)
    assert text.startswith("INFO {") and json.loads(text.removeprefix("INFO ")) == line and len(encoded) == 1
    assert json.loads(JsonLines().format(record)) == {"level": "INFO", "path": "/é", "status": 200} and len(encoded) == 2
