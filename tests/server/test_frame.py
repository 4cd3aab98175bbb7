from __future__ import annotations

import gc
import json
import logging
import time

import pytest
from server_frame import read_all, serving

from nanovllm.server.auth import Key, Keyring, _digest
from nanovllm.server.http import BoundedHttp

MEBI = 2**20


@pytest.fixture(scope="module")
def frame():
    with serving() as running:
        yield running


def test_an_answer_as_a_whole_and_as_a_stream(frame):
    whole = frame.run(max_tokens=6)
    stream = frame.run(max_tokens=6, stream=True)
    assert whole.status == stream.status == 200
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "".join(stream.events) == whole.json["text"] and len(stream.events) == 6


def test_errors_of_the_door_come_before_the_status_of_a_stream(frame):
    reply = frame.run(prompt=[], stream=True)
    assert reply.status == 400 and "no tokens" in reply.error["message"]
    assert reply.headers["content-type"] == "application/json"


def test_a_later_error_becomes_the_last_event_of_the_stream(frame):
    reply = frame.get("/crash_later", x_request_id="my-id")
    assert reply.status == 200 and reply.events[0] == "1"
    error = json.loads(reply.events[1])["error"]
    assert error["message"] == "internal error (request my-id)" and error["type"] == "api_error"


def test_request_ids_are_the_clients_own_when_harmless(frame):
    assert frame.get("/health", x_request_id="abc-1.2_3").headers["x-request-id"] == "abc-1.2_3"
    for strange in ("a b", "x" * 65, "ä", '"'):
        reply = frame.request("GET", "/health", headers={"X-Request-Id": strange.encode("latin-1").decode("latin-1")})
        assert reply.headers["x-request-id"].startswith("req-")


def test_unknown_routes_and_methods_are_errors_of_ours(frame):
    missing, wrong = frame.get("/nowhere"), frame.get("/run")
    assert missing.status == 404 and missing.error["type"] == "not_found_error"
    assert wrong.status == 405 and wrong.headers["allow"] == "POST" and "GET /run" in wrong.error["message"]


def test_embeddings_go_through_admission(frame):
    reply = frame.post("/embed", {})
    assert reply.status == 200 and reply.json == [1.0, 0.0]
    frame.assert_nothing_is_held()


# --- clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_request_along(frame, stream):
    connection = frame.start_run(max_tokens=200, stream=stream)
    frame.call(lambda: setattr(frame.engine, "is_paused", True))
    frame.wait_until(lambda: frame.engine.llm_engine.scheduler.has_work)
    connection.close()
    frame.wait_until(lambda: not frame.engine.llm_engine._requests)
    frame.call(lambda: setattr(frame.engine, "is_paused", False))
    frame.assert_nothing_is_held()


def test_who_leaves_before_the_first_token_pays_for_the_prompt():
    key = Key(name="k", digest=_digest("sk-user-12345", "test"), tokens_per_minute=10_000)
    with serving(Keyring([key])) as frame:
        frame.call(lambda: setattr(frame.engine, "is_paused", True))
        connection = frame.connect()
        body = json.dumps({"prompt": [1] * 100}).encode()
        head = b"POST /run HTTP/1.1\r\nHost: x\r\nX-Api-Key: sk-user-12345\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        frame.wait_until(lambda: frame.server.admission.num_running == 1)
        connection.close()
        frame.wait_until(lambda: frame.server.admission.num_running == 0)
        assert 9_850 < frame.call(lambda: frame.server.admission._account(key).balance) < 9_950


def test_a_client_that_leaves_the_queue_gives_its_place_back():
    with serving(max_num_seqs=1) as frame:
        frame.call(lambda: setattr(frame.engine, "is_paused", True))
        connections = [frame.start_run(max_tokens=5) for _ in range(12)]
        frame.wait_until(lambda: frame.server.admission.num_waiting == 12 - frame.server.admission.capacity)
        for connection in connections:
            connection.close()
        frame.wait_until(lambda: not frame.server.admission.num_waiting)
        frame.assert_nothing_is_held()


def test_a_half_sent_body_leaves_nothing_behind(frame):
    with frame.connect() as connection:
        connection.sendall(b'POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"prompt"')
        frame.wait_until(lambda: frame.server.num_open == 1)
    frame.assert_nothing_is_held()


# --- clients that do not read


def test_a_reader_that_stalls_is_bounded_does_not_slow_others_and_is_cut_off():
    options = {"stalled_client_timeout_s": 1.0, "max_stream_buffer": 65536}
    with serving(options=options, num_blocks=1024) as frame:
        connection = frame.connect()
        connection.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF: the kernel takes little for us
        body = json.dumps({"prompt": "hello", "stream": True, "max_tokens": 3000, "pad": 20000}).encode()
        connection.sendall(b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        frame.wait_until(lambda: max(_waiting_bytes(), default=0) > 0)
        started = time.monotonic()
        assert frame.run(max_tokens=50, stream=True).status == 200
        assert time.monotonic() - started < 2
        assert 0 < max(frame.call(_waiting_bytes)) < 65536 + 2 * 20000
        frame.wait_until(lambda: frame.server.num_open == 0)  # cut off
        frame.assert_nothing_is_held()
        assert len(read_all(connection)) < MEBI  # of 60: what was not taken is gone


def test_a_reader_that_stalls_holds_nothing_beyond_its_deadline():
    options = {"stalled_client_timeout_s": 60.0, "request_timeout_s": 3.0, "max_stream_buffer": 65536}
    with serving(options=options, num_blocks=1024) as frame:
        connection = frame.connect()
        connection.setsockopt(1, 8, 4096)
        body = json.dumps({"prompt": "hello", "stream": True, "max_tokens": 300, "pad": 200_000}).encode()
        connection.sendall(b"POST /run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        frame.wait_until(lambda: max(_waiting_bytes(), default=0) > 0)
        frame.wait_until(lambda: not frame.server.admission.num_running, seconds=20)


def _waiting_bytes():
    connections = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), BoundedHttp) and thing.transport is not None and not thing.transport.is_closing()
    ]
    return [connection.transport.get_write_buffer_size() for connection in connections]


# --- time


def test_a_request_beyond_its_deadline_is_ended():
    with serving(options={"request_timeout_s": 0.3}) as frame:
        frame.call(lambda: setattr(frame.engine, "is_paused", True))
        reply = frame.run()
        assert (
            reply.status == 504 and reply.error["code"] == "request_timeout" and "request_timeout_s=0.3" in reply.error["message"]
        )
        frame.call(lambda: setattr(frame.engine, "is_paused", False))
        frame.assert_nothing_is_held()


def test_a_stream_beyond_its_deadline_ends_with_an_error_event():
    with serving(options={"request_timeout_s": 0.5}, seconds_per_step=0.05, num_blocks=256) as frame:
        reply = frame.run(stream=True, max_tokens=500)
        assert reply.status == 200 and len(reply.events) > 2
        assert json.loads(reply.events[-1])["error"]["code"] == "request_timeout"
        frame.assert_nothing_is_held()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["queue", "engine"])
def test_without_a_first_token_in_time_a_request_gets_503(place, stream):
    with serving(options={"queue_timeout_s": 0.4}, max_num_seqs=1) as frame:
        frame.call(lambda: setattr(frame.engine, "is_paused", True))
        if place == "queue":
            frame.call(lambda: setattr(frame.server.admission, "num_running", 100))
        reply = frame.run(stream=stream)
        assert reply.status == 503 and reply.error["code"] == "queue_timeout" and int(reply.headers["retry-after"]) >= 1
        if place == "queue":
            frame.call(lambda: setattr(frame.server.admission, "num_running", 0))
        frame.assert_nothing_is_held()


@pytest.mark.parametrize("place", ["queue", "engine"])
def test_an_embedding_waits_no_longer_than_a_completion(place):
    with serving(options={"queue_timeout_s": 0.4}, max_num_seqs=1) as frame:
        if place == "queue":
            frame.call(lambda: setattr(frame.server.admission, "num_running", 100))
        else:
            frame.call(lambda: setattr(frame.engine, "is_paused", True))
        reply = frame.post("/embed")
        assert reply.status == 503 and reply.error["code"] == "queue_timeout"
        if place == "queue":
            frame.call(lambda: setattr(frame.server.admission, "num_running", 0))
        frame.assert_nothing_is_held()


def test_a_stream_that_has_ended_leaves_nothing_of_its_answer_to_the_garbage_collector(frame):
    frame.run(stream=True)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        frame.run(stream=True)
        frame.wait_until(lambda: frame.server.num_open == 0)
        gc.collect()
        kinds = {type(one).__name__ for one in gc.garbage}
        assert not kinds & {"RequestResponseCycle", "GenerationOutput", "RequestRecord", "Task"}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


# --- drain and death


def test_a_drain_lets_open_requests_finish_and_refuses_new_ones():
    with serving(seconds_per_step=0.02, num_blocks=256) as frame:
        connection = frame.start_run(max_tokens=40, stream=True)
        frame.wait_until(lambda: frame.engine.num_steps > 2)
        frame.call(frame.server.begin_drain)
        refused = frame.run()
        assert refused.status == 503 and refused.error["code"] == "shutting_down"
        assert refused.headers["retry-after"] == "30" and refused.headers["connection"] == "close"
        assert frame.get("/ready").status == 503 and frame.get("/health").status == 200
        answer = read_all(connection)
        assert answer.count(b"data: ") == 40 and answer.endswith(b"0\r\n\r\n")
        assert frame.ended.result(10) == 0


def test_a_drain_has_an_end_and_says_so_in_the_stream():
    with serving(options={"drain_timeout_s": 0.3}, seconds_per_step=0.02, num_blocks=1024) as frame:
        connection = frame.start_run(max_tokens=2000, stream=True)
        frame.wait_until(lambda: frame.engine.num_steps > 2)
        started = time.monotonic()
        frame.call(frame.server.begin_drain)
        assert frame.ended.result(10) == 0 and time.monotonic() - started < 5
        assert b'"code":"shutting_down"' in read_all(connection)


def test_the_death_of_the_engine_is_seen_by_probes_streams_and_the_exit_status():
    with serving(seconds_per_step=0.02, num_blocks=1024) as frame:
        stream, whole = frame.start_run(max_tokens=2000, stream=True), frame.start_run(max_tokens=2000)
        frame.wait_until(lambda: len(frame.engine.llm_engine._requests) == 2 and frame.engine.num_steps > 2)
        frame.call(frame.engine.die)
        assert frame.get("/health").status == 503 and frame.get("/ready").json == {"status": "engine dead"}
        end = read_all(stream)
        assert b'"code":"engine_dead"' in end and b"/secret" not in end
        assert b" 503 " in read_all(whole).split(b"\r\n")[0]
        assert frame.ended.result(10) == 1


# --- the log


def test_the_access_log_has_metadata_and_no_text(frame, caplog):
    with caplog.at_level(logging.INFO, "nanovllm.access"):
        caplog.set_level(logging.INFO, "nanovllm")
        logging.getLogger("nanovllm").propagate = True
        frame.post("/run?key=sk-hidden", {"prompt": "a very private prompt", "max_tokens": 3})
        frame.wait_until(lambda: frame.server.num_open == 0)
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "nanovllm.access"]
    assert line["path"] == "/run" and line["status"] == 200 and line["key"] == "anonymous"
    assert line["completions"] == [
        {"prompt_tokens": 21, "cached_tokens": 0, "tokens": 3, "ttft": line["completions"][0]["ttft"], "finish": ["length"]}
    ]
    assert "private" not in caplog.text and "hidden" not in caplog.text
