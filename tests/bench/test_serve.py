"""The client against real servers, with a fake executor that keeps a known pace, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from nanovllm.bench.check import check_record, rows_of
from nanovllm.bench.clients import deal, send
from nanovllm.bench.http_client import Endpoint, get_json, stream
from nanovllm.bench.load import Row, Target, send_workload
from nanovllm.bench.record import read_record
from nanovllm.bench.results import percentile
from nanovllm.bench.server_metrics import TTFT, read_totals, told_between
from nanovllm.cli import main
from nanovllm.errors import ConfigError, NanoVllmError
from nanovllm.workloads import make_workload

SHORT = {"num_input": 8, "vocabulary": 40}


def bench(*options: str) -> int:
    common = ["--precision", "float32", "--warmup-repeats", "1", "--warmup-requests", "1"]
    return main(["bench", "serve", *common, *options])


def test_ttft_and_tpot_are_what_the_server_paced(two_servers):
    server = two_servers[0]
    pace_ms = server.step_s * 1e3
    # One after the other: a prompt is one step. The first request of a fresh server is slower, the fastest is not.
    alone = make_workload("fixed", num_requests=5, num_output=2, **SHORT)
    rows, _ = asyncio.run(send_workload(Target(server.url, "fake", max_concurrency=1), alone))
    assert pace_ms - 0.5 <= min(row.ttft_ms for row in rows) == pytest.approx(pace_ms, rel=0.08)
    # Several at once: a prompt waits for the steps in flight, two at most; what follows keeps the pace.
    together = make_workload("fixed", num_requests=5, rate=4.0, num_output=8, **SHORT)
    rows, seconds = asyncio.run(send_workload(Target(server.url, "fake"), together))
    assert not [row.error for row in rows if row.error]
    assert all(pace_ms - 0.5 <= row.ttft_ms <= 3.5 * pace_ms for row in rows)
    assert percentile([row.tpot_ms for row in rows], 50) == pytest.approx(pace_ms, rel=0.03)
    gaps = [gap for row in rows for gap in row.itl_ms]
    assert len(gaps) == 5 * 7 and percentile(gaps, 50) == pytest.approx(pace_ms, rel=0.03)
    assert seconds == pytest.approx(max(row.sent_ms + row.latency_ms for row in rows) / 1e3, rel=0.02)
    assert [row.num_input for row in rows] == [8] * 5 and [row.num_output for row in rows] == [8] * 5


def test_arrivals_are_kept_and_their_lag_is_told(two_servers):
    workload = make_workload("poisson", num_requests=12, rate=20.0, num_output=2, **SHORT)
    rows, _ = asyncio.run(send_workload(Target(two_servers[0].url, "fake"), workload))
    for row, request in zip(rows, workload.requests):
        assert row.sent_ms == pytest.approx(request.arrival_s * 1e3 + row.lag_ms, abs=0.01)
    assert percentile([row.lag_ms for row in rows], 50) < 30


def test_a_turn_waits_for_the_answer_before_it(two_servers):
    workload = make_workload(
        "multi-turn", num_sessions=2, rate=50.0, num_turns=2, system=4, message=4, num_output=2, vocabulary=40
    )
    rows, _ = asyncio.run(send_workload(Target(two_servers[0].url, "fake"), workload))
    for row, request in zip(rows, workload.requests):
        if request.after is not None:
            before = rows[request.after]
            assert row.sent_ms >= before.sent_ms + before.latency_ms + request.arrival_s * 1e3 - 1


def test_max_concurrency_closes_the_loop(two_servers):
    workload = make_workload("fixed", num_requests=3, num_output=2, **SHORT)
    rows, _ = asyncio.run(send_workload(Target(two_servers[0].url, "fake", max_concurrency=1), workload))
    ordered = sorted(rows, key=lambda row: row.sent_ms)
    assert all(later.sent_ms >= row.sent_ms + row.latency_ms for row, later in pairwise(ordered))
    assert ordered[-1].lag_ms > 100


def test_several_processes_send_what_one_would_from_one_moment_on(two_servers):
    server = two_servers[0]
    workload = make_workload("fixed", num_requests=5, rate=10.0, num_output=3, **SHORT)
    rows, seconds = asyncio.run(send(Target(server.url, "fake", client_processes=3), workload, repeat=2))
    assert [(row.repeat, row.index, row.error, row.num_output) for row in rows] == [(2, i, "", 3) for i in range(5)]
    for row, request in zip(rows, workload.requests):  # each left at its time by the one clock
        assert row.sent_ms == pytest.approx(request.arrival_s * 1e3 + row.lag_ms, abs=0.01) and 0 <= row.lag_ms < 100
    assert seconds == pytest.approx(max(row.sent_ms + row.latency_ms for row in rows) / 1e3, abs=0.1)


def test_a_name_is_looked_up_once_and_not_in_a_request(two_servers, monkeypatch):
    names: list[object] = []
    look_up = socket.getaddrinfo

    def noted(host, *arguments, **options):
        names.append(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    url = two_servers[0].url.replace("127.0.0.1", "localhost")
    assert "localhost" in url
    workload = make_workload("fixed", num_requests=3, num_output=2, **SHORT)
    rows, _ = asyncio.run(send_workload(Target(url, "fake"), workload))
    assert [row.error for row in rows] == [""] * 3 and names == ["localhost"]


def test_turns_stay_together_and_places_in_flight_are_dealt_out():
    workload = make_workload("multi-turn", num_sessions=5, num_turns=2, system=4, message=4, num_output=2)
    parts = deal(Target("x", "m", max_concurrency=7, client_processes=3), workload)
    assert [part.target.max_concurrency for part in parts] == [2, 2, 3]
    assert sorted(index for part in parts for index in part.indices) == list(range(10))
    for part in parts:
        for request, index in zip(part.requests, part.indices):
            whole = workload.requests[index]
            assert request.prompt == whole.prompt
            assert (None if request.after is None else part.indices[request.after]) == whole.after
    assert len(deal(Target("x", "m", client_processes=9), workload)) == 5  # none without work
    with pytest.raises(ConfigError, match="max_concurrency=2 cannot be shared by 3"):
        Target("x", "m", max_concurrency=2, client_processes=3)


def test_a_client_process_that_dies_ends_the_run(capfd):
    workload = make_workload("fixed", num_requests=2, num_output=2, **SHORT)
    with pytest.raises(NanoVllmError, match="a client process ended with status 1"):
        asyncio.run(send(Target("not a url:x", "fake", client_processes=2), workload))
    assert "is not the address of a server" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["words", "chat"])
def test_other_forms_reach_the_server(two_servers, form):
    workload = make_workload("fixed", num_requests=2, num_output=3, **SHORT)
    rows, _ = asyncio.run(send_workload(Target(two_servers[0].url, "fake", form=form), workload))
    assert [row.error for row in rows] == ["", ""] and rows[0].num_output == 3 and len(rows[0].itl_ms) == 2


def test_the_command_writes_a_complete_record(two_servers, tmp_path, capsys):
    options = ["--url", two_servers[0].url, "--workload", "fixed", "--set", "num_requests=3", "--set", "num_output=4"]
    options += ["--set", "vocabulary=40", "--set", "num_input=8", "--slo", "ttft=5s,tpot=1s", "--price-per-hour", "3.6"]
    options += ["--print-effective-config"]
    assert bench(*options, "--client-processes", "2", "--api-key", "hush", "--record", "mine", "--folder", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert json.JSONDecoder().raw_decode(out)[0]["target"]["timeout_s"] == 600 and "hush" not in out
    path = Path(out.splitlines()[-1])
    assert check_record(path) == []
    record = read_record(path)
    assert record["settings"]["client_processes"] == 2
    assert record["model"] == "fake" and record["max_model_len"] == 16384 and record["status"] == "ok"
    table = record["result_table"]
    assert table["slo_attainment"]["repeats"] == [1.0] * 3
    tokens, seconds = 12, record["seconds"][0]
    assert table["cost_per_million_output_tok"]["repeats"][0] == pytest.approx(3.6 / 3600 * seconds / tokens * 1e6, rel=1e-3)
    assert len(rows_of(path, record)) == 9
    assert "hush" not in path.read_text()


def test_client_and_server_tell_the_same_and_what_lies_between_is_http(two_servers, tmp_path, capsys):
    server = two_servers[0]
    options = ["--workload", "fixed", "--set", "num_requests=4", "--set", "num_output=6", "--set", "vocabulary=40"]
    options += ["--set", "num_input=8", "--repeats", "2", "--folder", str(tmp_path)]
    assert bench("--url", server.url, "--record", "told", *options) == 0
    record = read_record(next(tmp_path.glob("*.json")))
    for repeat, told in enumerate(record["server"]):
        client = {name: record["result_table"][f"{name}.mean"]["repeats"][repeat] for name in ("ttft_ms", "tpot_ms")}
        assert sum(told["ttft_parts_ms"].values()) == pytest.approx(told["ttft_ms"], rel=0.01)
        assert told["tpot_ms"] == pytest.approx(client["tpot_ms"], rel=0.01)
        assert told["ttft_ms"] + told["http_ms"] == pytest.approx(client["ttft_ms"], abs=0.01)
        assert 0 < told["http_ms"] < 0.5 * told["ttft_ms"]  # milliseconds, of a step of 100
    assert main(["bench", "report", *map(str, tmp_path.glob("*.json")), "--out", str(tmp_path / "report")]) == 0
    assert "Where the mean TTFT went" in (tmp_path / "report" / "report.md").read_text()


def test_what_a_server_does_not_tell_is_missing_with_a_reason():
    row = Row(0, 0, "", 0.0, 0.0, 0.1, 50.0, 90.0, 8, 5, [10.0] * 4)
    before = {TTFT: (1.0, 10.0)}
    assert told_between(before, {TTFT: (1.048, 11.0)}, [row]) == {"ttft_ms": 48.0, "http_ms": 2.0}
    assert "counted 2 first tokens, the client 1" in told_between(before, {TTFT: (1.1, 12.0)}, [row])["missing"]
    assert "counted 0 first tokens, the client 0" in told_between(before, before, [replace(row, error="refused")])["missing"]
    assert told_between({}, {}, [row]) == {"missing": f"its /metrics has no {TTFT}"}


def test_sums_are_read_whatever_the_labels():
    text = f"""# HELP {TTFT} x
{TTFT}_bucket{{engine="0",le="0.1",model_name="a"}} 5.0
{TTFT}_sum{{engine="0",model_name="a {{b}}"}} 1.5
{TTFT}_sum{{engine="1",model_name="a"}} 2.5e-1
{TTFT}_count{{engine="0",model_name="a"}} 5.0
other_sum 7
"""
    assert read_totals(text) == {TTFT: (1.75, 5.0)}


def test_servers_10_percent_apart_are_found_in_abba_order(two_servers, tmp_path, capsys):
    a, b = two_servers
    options = ["--workload", "fixed", "--set", "num_requests=2", "--set", "num_output=5", "--set", "vocabulary=40"]
    options += ["--set", "num_input=8", "--repeats", "5", "--folder", str(tmp_path)]

    def judge(name: str, other: str) -> dict[str, str]:
        for _ in range(3):  # on a busy machine a verdict may be "unclear", which is right; the wrong word never is
            assert bench("--url", a.url, "--abba", other, "--record", name, *options) == 0
            lines = [line.split() for line in capsys.readouterr().out.splitlines() if " B/A " in line]
            verdicts = {words[0]: words[-1] for words in lines}
            if verdicts["tpot_ms.p50"] != "unclear":
                break
        return verdicts

    verdicts = judge("planted", b.url)
    assert verdicts["tpot_ms.p50"] == "slower" and verdicts["output_tok_s"] in ("slower", "unclear")
    records = [read_record(path) for path in sorted(tmp_path.glob("*planted-?.json"))]
    assert [record["order"] for record in records] == [[0, 3, 4, 7, 8], [1, 2, 5, 6, 9]]
    verdicts = judge("same", a.url)
    assert verdicts["tpot_ms.p50"] == "equal" and not {"faster", "slower"} & {verdicts["output_tok_s"], verdicts["e2e_ms.p50"]}


def test_a_refused_request_is_a_failed_row_and_a_failed_run(two_servers, tmp_path, capsys):
    options = ["--url", two_servers[0].url, "--workload", "fixed", "--set", "num_requests=2", "--repeats", "1"]
    options += ["--model", "another", "--max-model-len", "10", "--record", "bad", "--folder", str(tmp_path)]
    assert bench(*options) == 1
    captured = capsys.readouterr()
    assert "404" in captured.err
    path = Path(captured.out.splitlines()[-1])
    assert read_record(path)["status"].startswith("failed: 2 of 2 requests") and check_record(path) == []


# --- servers that misbehave


async def exchange_with(answer: bytes, timeout_s: float = 5.0, then: Callable[[], Awaitable[None]] | None = None):
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"}")
            for start in range(0, len(answer), 7):  # in small pieces: nothing may depend on where reads end
                writer.write(answer[start : start + 7])
                await writer.drain()
            if then is not None:
                await then()
        except ConnectionError:
            pass
        finally:
            writer.close()
            ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        return await stream(Endpoint(f"http://127.0.0.1:{port}", "/v1/completions"), b"{}", timeout_s, keep_text=True)
    finally:
        await ended.wait()
        server.close()
        await server.wait_closed()


def events(*data: object) -> bytes:
    return b"".join(b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n\n" for one in data)


def chunked(body: bytes, size: int = 11) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts)
        + b"0\r\n\r\n"
    )


TOKEN = {"choices": [{"text": "é"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_stream_is_read_in_whatever_pieces_it_comes(is_chunked):
    body = events(TOKEN, TOKEN, USAGE, b"[DONE]")
    exchange = asyncio.run(exchange_with(chunked(body) if is_chunked else b"HTTP/1.1 200 OK\r\n\r\n" + body))
    assert (exchange.error, exchange.text) == ("", ["é", "é"])
    assert (exchange.num_input, exchange.num_output, len(exchange.token_times)) == (3, 2, 2)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"", "closed the connection"),
        (b"hello\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy", "status 429: busy"),
        (chunked(events(TOKEN)), "ended early"),
        (chunked(events(TOKEN))[:-9], "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "not HTTP"),
        (chunked(events({"error": {"message": "out of memory"}}, b"[DONE]")), "out of memory"),
        (chunked(events(b"{", b"[DONE]")), "not a completion"),
        (chunked(events([1], b"[DONE]")), "not a completion"),
    ],
)
def test_what_a_server_does_wrong_is_the_error_of_the_exchange(answer, problem):
    assert problem in asyncio.run(exchange_with(answer)).error


def test_a_server_that_never_ends_is_given_up():
    exchange = asyncio.run(exchange_with(b"HTTP/1.1 200 OK\r\n\r\n", timeout_s=0.2, then=lambda: asyncio.sleep(0.5)))
    assert exchange.error == "no end within 0.2 s"


def test_no_server_and_no_url_are_told():
    with pytest.raises(ConfigError, match="no answer from 127.0.0.1:9"):
        asyncio.run(get_json(Endpoint("http://127.0.0.1:9", "/v1/models")))
    for url in ("ftp://x", "http://", "http://a:b", "http://a?b=c"):
        with pytest.raises(ConfigError, match="not the address of a server"):
            Endpoint(url, "/")
    with pytest.raises(ConfigError, match="API key"):
        Endpoint("http://a", "/", "a\r\nb: c")
