"""A real server with the real model is killed under load, and started again with the same checkpoint.

The reference is `LLM` in this process, one request at a time: float32, so that batches of other shapes draw the same tokens.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, started_server, write_tiny_model

from nanovllm import LLM, SamplingParams
from nanovllm.loaders.checkpoint import DEMO_PACKAGE
from nanovllm.sampling_params import StructuredOutput

KEYS = {"NANOVLLM_API_KEYS": "key-of-alice,key-of-bob"}
ENGINE = ("--dtype", "float32", "--num-threads", "1", "--num-kv-blocks", "400", "--max-num-seqs", "12", "--log-level", "INFO")
TEXT = "The licensor grants you a perpetual licence to use and change the work in any way you like. "


REGEX = "([a-z]{2,8} ){30,60}"  # the text of one call


def is_installed() -> bool:
    try:
        return bool(importlib.metadata.version(DEMO_PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_model = pytest.mark.skipif(not is_installed() and not os.environ.get("CI"), reason=f"{DEMO_PACKAGE} is not installed")


@dataclass
class Call:
    """One client. `tokens`: what arrived, by choice."""

    name: str
    body: dict[str, Any]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    is_whole: bool = False

    def run(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        headers = {"Content-Type": "application/json", "x-request-id": self.name, "Authorization": "Bearer key-of-alice"}
        try:
            connection.request("POST", "/v1/completions", json.dumps(self.body), headers)
            response = connection.getresponse()
            if response.status != 200:
                return  # the engine was killed, and the server says so
            if not self.body["stream"]:
                self._take(json.loads(response.read()))
                self.is_whole = True
                return
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    self.is_whole = True
                elif line.startswith(b"data: "):
                    self._take(json.loads(line[6:]))  # an error, where the engine was killed
        except (OSError, http.client.HTTPException):
            pass  # the server was killed
        finally:
            connection.close()

    def _take(self, answer: dict[str, Any]) -> None:
        for choice in answer.get("choices", ()):
            self.tokens.setdefault(choice["index"], []).extend(choice["token_ids"])


def calls() -> list[Call]:
    """Twelve, of mixed lengths: greedy and seeded, two with n=2, one with two prompts, one with a stop string, one with a grammar."""
    found = []
    for number in range(12):
        prompt: Any = TEXT[number % 5 :] * (1 + number % 3) + f"{number}"
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": 20 + 6 * number,
            "stream": number % 2 == 0,
            "return_token_ids": True,
        }
        body |= {"temperature": 0} if number % 3 else {"temperature": 0.8, "seed": number, "top_p": 0.9}
        if number in (3, 8):
            body["n"] = 2
        if number == 5:
            body["prompt"] = [prompt, "Once upon a time"]
        if number == 7:
            body |= {"stop": ["."], "presence_penalty": 0.5, "ignore_eos": True, "min_tokens": 25}
        if number == 10:
            body |= {"guided_regex": REGEX}
        found.append(Call(f"call-{number}", body))
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """Tokens of each choice of each call, undisturbed."""
    names = ("max_tokens", "temperature", "seed", "top_p", "n", "stop", "presence_penalty", "ignore_eos", "min_tokens")
    answers = {}
    with LLM(dtype="float32", num_threads=1, num_kv_blocks=400, max_num_seqs=12) as llm:
        for call in calls():
            params = SamplingParams(**{name: call.body[name] for name in names if name in call.body})
            if "guided_regex" in call.body:
                params = replace(params, structured=StructuredOutput("regex", call.body["guided_regex"]))
            prompts = call.body["prompt"] if isinstance(call.body["prompt"], list) else [call.body["prompt"]]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers[call.name] = [completion.token_ids for output in outputs for completion in output.completions]
    return answers


def send(server: LiveServer) -> tuple[list[Call], list[threading.Thread]]:
    sent = calls()
    threads = [threading.Thread(target=call.run, args=(server.url,)) for call in sent]
    for thread in threads:
        thread.start()
    return sent, threads


def wait_until_tokens_flow(sent: list[Call], count: int) -> None:
    end = time.monotonic() + 90
    while sum(len(tokens) for call in sent for tokens in call.tokens.values()) < count:
        assert time.monotonic() < end, "no tokens came"
        time.sleep(0.01)


def wait_until_all_are_accepted(sent: list[Call]) -> None:
    """Those that stream have a token; and the others, sent between them, the time in which a token comes."""
    end = time.monotonic() + 90
    while not all(any(call.tokens.values()) for call in sent if call.body["stream"]):
        assert time.monotonic() < end, "no tokens came"
        time.sleep(0.01)
    time.sleep(0.2)


def get(server: LiveServer, path: str, key: str = "key-of-alice") -> tuple[int, Any]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def restored(server: LiveServer, name: str) -> list[dict[str, Any]]:
    """The parts of a call that its client has lost, when they have ended; whom a front end left may not be known at once."""
    end = time.monotonic() + 120
    while True:
        status, answer = get(server, f"/v1/restored/{name}")
        if status == 200 and all(part["status"] != "running" for part in answer["data"]):
            return answer["data"]
        assert time.monotonic() < end, f"{name}: {answer}"
        time.sleep(0.1)


def check_answers(server: LiveServer, sent: list[Call], expected: dict[str, list[list[int]]]) -> int:
    """Every call has its whole answer, at its client or at the server. Returns how many are at the server alone."""
    num_restored = 0
    for call in sent:
        wanted = expected[call.name]
        for index, tokens in call.tokens.items():
            assert tokens == wanted[index][: len(tokens)], f"{call.name}: its client saw other tokens"
        if call.is_whole:
            assert [call.tokens[index] for index in range(len(wanted))] == wanted
            continue
        num_restored += 1
        parts = restored(server, call.name)
        assert [part["status"] for part in parts] == ["finished"] * len(parts), parts
        assert [choice["token_ids"] for part in parts for choice in part["choices"]] == wanted, call.name
    return num_restored


def engine_pid(server: LiveServer) -> int:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(600)
class TestKilledUnderLoad:
    def test_the_whole_server_twice(self, tmp_path, expected):
        journal = str(tmp_path / "journal")
        with started_server("--checkpoint", journal, *ENGINE, **KEYS) as server:
            sent, threads = send(server)
            wait_until_tokens_flow(sent, 60)
            os.killpg(server.process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join()
        assert sum(not call.is_whole for call in sent) >= 6, "it was killed too late"
        with started_server("--checkpoint", journal, *ENGINE, **KEYS) as server:
            assert any("requests go on" in line for line in server.log)
            time.sleep(1.0)
            engine = engine_pid(server)
            os.kill(server.process.pid, signal.SIGKILL)  # without its engine, which notices
            end = time.monotonic() + 10
            while Path(f"/proc/{engine}").exists():
                assert time.monotonic() < end, "the engine outlives its server"
                time.sleep(0.05)
        with started_server("--checkpoint", journal, *ENGINE, **KEYS) as server:
            assert check_answers(server, sent, expected) >= 6
            left = next(call for call in sent if not call.is_whole)
            assert get(server, f"/v1/restored/{left.name}", "key-of-bob")[0] == 404
            assert get(server, f"/v1/restored/{left.name}", "key-of-nobody")[0] == 401
            assert get(server, "/v1/restored", "key-of-bob") == (200, {"object": "list", "data": []})
            fresh = Call("again", left.body)
            fresh.run(server.url)
            assert fresh.is_whole, "the server does not serve"

    def test_the_engine_process_alone_and_a_torn_journal(self, tmp_path, expected):
        journal = tmp_path / "journal"
        with started_server("--checkpoint", str(journal), *ENGINE, **KEYS) as server:
            sent, threads = send(server)
            wait_until_tokens_flow(sent, 60)
            os.kill(engine_pid(server), signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert server.process.wait(30) == 1
        content = journal.read_bytes()
        journal.write_bytes(content[:-7] + b"\xff\xff\xff")
        with started_server("--checkpoint", str(journal), *ENGINE, **KEYS) as server:
            assert any("torn or damaged" in line for line in server.log)
            assert check_answers(server, sent, expected) >= 6

    def test_one_of_two_front_ends_and_the_others_go_on(self, tmp_path, expected):
        journal = str(tmp_path / "journal")
        with started_server("--checkpoint", journal, "--num-frontends", "2", *ENGINE, **KEYS) as server:
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            front = [int(pid) for pid in children if b"server.frontend" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            assert len(front) == 2
            time.sleep(max(0.0, 5.5 - time.monotonic() + server.started))  # younger ones are not replaced
            sent, threads = send(server)
            wait_until_all_are_accepted(sent)
            os.kill(front[0], signal.SIGKILL)
            for thread in threads:
                thread.join()
            while Path(f"/proc/{front[0]}").exists() and Path(f"/proc/{front[0]}/cmdline").read_bytes():
                time.sleep(0.01)  # until it is gone, its socket takes connections that nobody will answer
            assert check_answers(server, sent, expected) >= 1


def test_the_journal_of_another_model_is_refused_at_the_start(tmp_path):
    first, second = write_tiny_model(tmp_path / "first"), write_tiny_model(tmp_path / "second")
    journal = str(tmp_path / "journal")
    options = ("--checkpoint", journal, "--num-kv-blocks", "64")
    with started_server("--model", str(first), *options) as server:
        assert get(server, "/v1/restored") == (200, {"object": "list", "data": []})
        assert get(server, "/v1/restored/unknown")[0] == 404
    with pytest.raises(AssertionError) as refusal, started_server("--model", str(second), *options):
        pass
    assert "ConfigError: checkpoint=" in str(refusal.value) and "is the journal of another model" in str(refusal.value)
    assert f"model='{first}'" in str(refusal.value) and f"model='{second}'" in str(refusal.value)


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    with started_server("--model", str(write_tiny_model(tmp_path / "tiny")), "--num-kv-blocks", "64") as server:
        status, answer = get(server, "/v1/restored")
        assert (status, answer["error"]["code"]) == (404, "no_checkpoint")
