"""`--log-format json`: every line of every process is an object."""

from __future__ import annotations

import json

from live_server import live_server, write_tiny_model


def test_every_line_of_a_server_is_an_object(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    options = ("--num-threads", "1", "--num-kv-blocks", "64", "--num-frontends", "2", "--log-format", "json")
    with live_server("--model", str(model), *options) as server:
        assert server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2}).status == 200
        assert server.get("/nothing/here").status == 404
    lines = [json.loads(line) for line in server.log if line.strip()]
    assert all(line["level"] in ("INFO", "WARNING") and line["time"] > 1.7e9 for line in lines)
    requests = {line["path"]: line for line in lines if "path" in line}
    assert requests["/v1/completions"]["status"] == 200 and requests["/v1/completions"]["completions"]
    assert requests["/nothing/here"]["status"] == 404
    assert any("memory plan" in line.get("message", "") for line in lines)  # of the engine's process
