"""What goes wrong in one request is that request's, on a real server whose model computes NaN for one token."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import LiveServer, live_server, write_tiny_model

POISON = 1000
HEALTHY = {"prompt": [5, 6, 7, 8], "max_tokens": 60, "seed": 3, "logit_bias": {str(POISON): -100}}
POISONED = {**HEALTHY, "prompt": [5, 6, 7, POISON]}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "poisoned", poison=POISON)
    options = ("--max-model-len", "256", "--kv-cache-memory-bytes", str(2**22), "--num-threads", "1")
    options += ("--max-logprobs", "600", "--max-prompt-logprobs", "50", "--max-open-logprobs", "900")
    with live_server("--model", str(folder), *options) as server:
        yield server


def count(server: LiveServer) -> float:
    match = re.search(rb"^nanovllm:nonfinite_logits_total\{.*?\} (\S+)$", server.get("/metrics").body, re.MULTILINE)
    assert match
    return float(match[1])


def test_nan_ends_its_request_with_an_error_and_nobody_elses(poisoned):
    before = count(poisoned)
    alone = poisoned.post("/v1/completions", HEALTHY).json["choices"][0]["text"]
    with ThreadPoolExecutor(8) as threads:
        bodies = [POISONED if number % 2 else HEALTHY for number in range(8)]
        replies = list(threads.map(lambda body: poisoned.post("/v1/completions", body), bodies))
    for number, reply in enumerate(replies):
        if number % 2:
            assert reply.status == 500
            assert reply.error["code"] == "nonfinite_logits" and reply.error["type"] == "api_error"
            assert "not a finite number" in reply.error["message"]
        else:
            assert reply.json["choices"][0]["text"] == alone
    assert count(poisoned) == before + 4


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.5}, {"top_k": 5}, {"n": 3, "logprobs": 2}], ids=str)
def test_for_every_way_of_drawing(poisoned, options):
    assert poisoned.post("/v1/completions", {**POISONED, **options}).error["code"] == "nonfinite_logits"
    assert poisoned.post("/v1/completions", {**HEALTHY, **options}).status == 200


LATER = {"allowed_token_ids": [9, POISON], "logit_bias": {"9": 40}, "frequency_penalty": 2.0, "temperature": 0, "max_tokens": 100}


def test_in_the_middle_of_a_stream(poisoned):
    """Token 9 is drawn until it is penalised enough; then the poisoned one is, which is text; what follows it is an error."""
    reply = poisoned.post("/v1/completions", {**HEALTHY, **LATER, "stream": True})
    *chunks, last = reply.events
    assert reply.status == 200 and len(chunks) > 3
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert last["error"]["code"] == "nonfinite_logits"


def test_an_embedding_that_is_no_vector_is_an_error(poisoned):
    assert poisoned.post("/v1/embeddings", {"input": [5, POISON]}).error["code"] == "nonfinite_logits"
    vector = poisoned.post("/v1/embeddings", {"input": [5, 6]}).json["data"][0]["embedding"]
    assert all(isinstance(value, float) for value in vector)


def test_other_protocols_say_it_in_their_way(poisoned):
    chat = {"messages": [{"role": "user", "content": "the"}], **LATER}
    assert poisoned.post("/v1/chat/completions", {**chat, "stream": True}).events[-1]["error"]["code"] == "nonfinite_logits"
    assert poisoned.post("/v1/chat/completions", chat).error["code"] == "nonfinite_logits"
    assert poisoned.get("/health").status == 200


def test_log_probabilities_of_one_request_and_of_all_together_are_bounded(poisoned):
    body = {**HEALTHY, "max_tokens": 100, "n": 3, "logprobs": 1}
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda body: poisoned.post("/v1/completions", body), [body] * 6))
    statuses = {reply.status for reply in replies}
    assert statuses == {200, 429}, "two at once are more than max_open_logprobs"
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.error["code"] == "logprobs_full" and int(refused.headers["retry-after"]) >= 1
    assert poisoned.post("/v1/completions", body).status == 200, "what has ended is given back"
    for change, field in (({"n": 4}, "logprobs"), ({"n": 1, "prompt_logprobs": 19}, "prompt_logprobs")):
        error = poisoned.post("/v1/completions", {**body, **change}).error
        assert error["param"] == field and f"max_{field}=" in error["message"]


def test_the_priority_of_a_request_changes_the_order(tmp_path):
    """One place: a long request holds it, then an unhurried one comes, then an urgent one."""
    options = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**23), "--num-threads", "1", "--max-num-seqs", "1")
    with live_server("--model", str(write_tiny_model(tmp_path / "tiny")), *options, "--scheduling-policy", "priority") as server:
        ended: list[int] = []

        def ask(priority: int, max_tokens: int) -> None:
            body = {"prompt": [5, 6, 7], "max_tokens": max_tokens, "ignore_eos": True, "priority": priority}
            assert server.post("/v1/completions", body).status == 200
            ended.append(priority)

        with ThreadPoolExecutor(3) as threads:
            running = [threads.submit(ask, -100, 900)]
            for priority in (5, -5):
                time.sleep(0.15)
                running.append(threads.submit(ask, priority, 60))
            for one in running:
                one.result()
    assert ended == [-100, -5, 5]
