from __future__ import annotations

import pytest
from server_frame import read_all, serving

from nanovllm.server.auth import Key, Keyring, _digest

ADMIN = {"X-Api-Key": "sk-admin-12345"}


def keyring():
    return Keyring([Key(name="admin", digest=_digest("sk-admin-12345", ""), is_admin=True)])


@pytest.fixture(scope="module")
def frame():
    with serving(keyring(), num_blocks=256) as running:
        yield running


def test_limits_are_shown_and_changed_those_of_the_engine_and_those_of_the_server(frame):
    shown = frame.request("GET", "/admin/limits", headers=ADMIN).json
    assert shown["max_queued_requests"] == 1024 and shown["queue_timeout_s"] == 60
    changes = {"max_num_seqs": 3, "max_queued_requests": 5, "queue_timeout_s": 7.5, "max_prompt_chunk": None}
    changed = frame.request("POST", "/admin/limits", changes, ADMIN)
    assert changed.status == 200 and changes.items() <= changed.json.items()
    assert frame.server.admission.max_queued == 5 and frame.server.limits.queue_timeout_s == 7.5
    assert frame.server.admission.capacity == 3 + 4


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_num_seq": 3}, "max_num_seq"),
        ({"max_num_seqs": "3"}, "max_num_seqs"),
        ({"max_num_seqs": 0, "max_queued_requests": 1}, "max_num_seqs"),
        ({"max_queued_requests": -1, "max_num_seqs": 1}, "max_queued_requests"),
        ({"request_timeout_s": -1}, "request_timeout_s"),
    ],
)
def test_wrong_limits_change_nothing_and_are_named(frame, changes, param):
    before = frame.request("GET", "/admin/limits", headers=ADMIN).json
    reply = frame.request("POST", "/admin/limits", changes, ADMIN)
    assert reply.status == 400 and reply.error["param"] == param
    assert frame.request("GET", "/admin/limits", headers=ADMIN).json == before


def test_the_prefix_cache_is_forgotten_on_request(frame):
    prompt = [1, 2, 3, 4] * 5
    assert frame.run(prompt=prompt).json["cached"] == 0 and frame.run(prompt=prompt).json["cached"] == 16
    assert frame.request("POST", "/admin/reset_prefix_cache", headers=ADMIN).json == {"reset": True}
    assert frame.run(prompt=prompt).json["cached"] == 0


def test_inspect_shows_counts_and_no_text(frame):
    frame.call(lambda: setattr(frame.engine, "is_paused", True))
    connection = frame.start_run(prompt="a secret text")
    frame.wait_until(lambda: frame.engine.llm_engine._requests)
    reply = frame.request("GET", "/admin/inspect", headers=ADMIN)
    assert reply.json["frontend"]["running"] == 1 and reply.json["frontend"]["keys"]["anonymous"]["open"] == 1
    assert b"secret" not in reply.body
    connection.close()
    frame.call(lambda: setattr(frame.engine, "is_paused", False))
    frame.assert_nothing_is_held()


def test_a_profile_is_a_download_and_the_file_is_gone_afterwards(frame, tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text('{"traceEvents": []}')
    frame.engine.trace = str(trace)
    reply = frame.request("POST", "/admin/profile", {"seconds": 0.01}, ADMIN)
    assert reply.status == 200 and reply.json == {"traceEvents": []} and str(tmp_path) not in str(reply.headers)
    frame.wait_until(lambda: not trace.exists())
    for seconds in (0, -1, 61, 1e300):
        assert frame.request("POST", "/admin/profile", {"seconds": seconds}, ADMIN).error["param"] == "seconds"


def test_a_drain_by_the_admin_ends_the_process_with_status_0():
    with serving(keyring(), seconds_per_step=0.01, num_blocks=256) as frame:
        connection = frame.start_run(max_tokens=30, stream=True)
        frame.wait_until(lambda: frame.engine.num_steps > 1)
        reply = frame.request("POST", "/admin/drain", headers=ADMIN)
        assert reply.status == 202 and reply.json == {"status": "draining", "open": 1}
        assert frame.request("POST", "/admin/drain", headers=ADMIN).status == 202  # again changes nothing
        assert frame.run().status == 503
        assert read_all(connection).count(b"data: ") == 30
        assert frame.ended.result(10) == 0
