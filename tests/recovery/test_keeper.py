"""Journal and restoration, on engines with a fake model whose next token depends on every token before it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import stat
from pathlib import Path

import msgspec
import pytest
from served import make_tokenizer
from support import VOCAB_SIZE, drain, greedy, make_engine, naive_generate

from nanovllm.config import EngineConfig
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.messages import AddRequest, Origin
from nanovllm.errors import ConfigError, EngineDead
from nanovllm.recovery import keeper as keeper_module
from nanovllm.recovery.journal import Ended, Entry, _framed
from nanovllm.recovery.keeper import Keeper, checkpointed, identity, keep
from nanovllm.sampling_params import SamplingParams

MODEL = {"model": "fake", "vocab_size": VOCAB_SIZE}
TOKENIZER = make_tokenizer()


def keeper_of(engine: LLMEngine, path: Path, model: dict = MODEL, keep_s: float = 3600.0) -> Keeper:
    return Keeper(engine, str(path), TOKENIZER, model, keep_s)


def crash(keeper: Keeper) -> None:
    """What the kernel does with a killed process: the file is closed, and nothing is said."""
    keeper._journal.close()


def restored(path: Path, **options) -> tuple[LLMEngine, Keeper]:
    engine = make_engine(**options)
    return engine, keeper_of(engine, path)


def token_ids(entry: Entry) -> list[list[int]]:
    return [completion.token_ids for completion in entry.output(TOKENIZER).completions]


def stop_at(tokens: list[int], place: int) -> str:
    """A string that the token at `place` completes, and none before."""
    return f"w{tokens[place - 1]} w{tokens[place]}"


class TestSameTokens:
    @pytest.mark.parametrize("seed", range(4))
    def test_wherever_the_engine_is_cut_off_every_request_ends_with_the_tokens_of_an_undisturbed_run(self, tmp_path, seed):
        """A tight cache, so that requests wait and are preempted, too. The journal is copied after each step."""
        rng = random.Random(seed)
        engine = make_engine(num_blocks=24, max_num_seqs=4, budget=16, num_steps_ahead=seed % 2)
        keeper = keeper_of(engine, tmp_path / "journal")
        wanted: dict[str, list[int]] = {}
        snapshots = []
        while engine.has_work or len(wanted) < 12:
            if len(wanted) < 12 and rng.random() < 0.5:
                prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
                params = greedy(rng.randint(1, 30), n=rng.choice((1, 1, 2)), stop_token_ids=[7, 8])
                name = engine.add_request(prompt, params)
                keeper.accept(name, AddRequest(0, name, prompt, params, [], 0, "", origin=Origin("me", name)))
                wanted[name] = naive_generate(prompt, params.max_tokens or 0, stop=(7, 8))
            if engine.has_work:
                engine.step()
                path = tmp_path / f"copy-{len(snapshots)}"
                shutil.copy(tmp_path / "journal", path)
                snapshots.append((path, set(engine._requests)))
        assert any(event for event in engine.executor.batches) and len(snapshots) > 30
        num_resumed = 0
        for path, unfinished in snapshots:
            again, second = restored(path, num_blocks=24, max_num_seqs=3, budget=16, num_steps_ahead=rng.randint(0, 2))
            drain(again)
            entries = {entry.request_id: entry for entry in second.entries("me")}
            assert unfinished <= set(entries), "a request was lost"
            num_resumed += len(unfinished)
            for name, entry in entries.items():
                assert token_ids(entry) == [wanted[name]] * len(entry.completions)
                assert entry.error is None and entry.ended is not None
            crash(second)
        assert num_resumed > 50

    def test_a_crash_while_restoring_and_another_while_going_on_lose_nothing(self, tmp_path):
        path = tmp_path / "journal"
        engine, keeper = restored(path)
        for first in range(5):
            engine.add_request([first, 2, 3], greedy(20))
        for _ in range(6):
            engine.step()
        crash(keeper)
        for _ in range(3):
            engine, keeper = restored(path)
            for _ in range(3):
                engine.step()
            crash(keeper)
        engine, keeper = restored(path)
        drain(engine)
        assert [token_ids(entry) for entry in keeper.entries()] == [[naive_generate([i, 2, 3], 20)] for i in range(5)]

    def test_seeds_and_positions_stay(self, tmp_path):
        """What a row draws depends on logits, parameters, seed and position: these are what must come back."""
        engine, keeper = restored(tmp_path / "journal")
        engine.add_request([1, 2], SamplingParams(n=3, max_tokens=9, min_tokens=4, temperature=0.7, presence_penalty=1.0))
        engine.add_request([1, 2], SamplingParams(max_tokens=9, seed=-5, logit_bias={3: 2.0}), bad_words=[[4, 5]])
        for _ in range(4):
            engine.step()
        before = [one for request in engine._requests.values() for one in request.sequences]
        crash(keeper)
        again, _ = restored(tmp_path / "journal")
        after = [one for request in again._requests.values() for one in request.sequences]
        assert [one.sampling.seed for one in after] == [one.sampling.seed for one in before]
        assert len({one.sampling.seed for one in after}) == 4
        for old, new in zip(before, after):
            assert new.token_ids == old.token_ids and new.num_prompt_tokens == 2 and new.num_generated_tokens > 0
            assert new.max_num_tokens == old.max_num_tokens == 11
            assert new.sampling.bad_words == old.sampling.bad_words
            assert new.params.logit_bias == old.params.logit_bias and new.params.min_tokens == old.params.min_tokens
        drain(again)

    def test_a_stop_string_that_begins_before_the_crash_and_ends_after_it(self, tmp_path):
        prompt = [3, 1]
        tokens = naive_generate(prompt, 12)
        stop = stop_at(tokens, 5)
        engine, keeper = restored(tmp_path / "journal")
        name = engine.add_request(prompt, greedy(12))
        keeper.accept(name, AddRequest(0, name, prompt, greedy(12), [], 0, "", stop=(stop,)))
        while engine._requests[name].sequences[0].num_generated_tokens < 5:
            engine.step()
        crash(keeper)
        again, second = restored(tmp_path / "journal")
        drain(again)
        (entry,) = second.entries()
        (completion,) = entry.output(TOKENIZER).completions
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == tokens[:6]
        assert completion.text.split() == [f"w{token}" for token in tokens[:4]]

    def test_an_engine_with_a_tokenizer_of_its_own(self, tmp_path):
        def make() -> LLMEngine:
            engine = make_engine()
            engine.tokenizer = engine._door._tokenizer = TOKENIZER
            return engine

        engine = make()
        tokens = naive_generate([3, 1], 12)
        with keep(engine, str(tmp_path / "journal"), EngineConfig()) as keeper:
            engine.add_request("w3 w1", greedy(12, stop=stop_at(tokens, 6), bad_words=["w2"]))
            for _ in range(4):
                engine.step()
            crash(keeper)
        engine = make()
        with keep(engine, str(tmp_path / "journal"), EngineConfig()) as keeper:
            drain(engine)
            (entry,) = keeper.entries()
            assert entry.output(TOKENIZER).token_ids == tokens[:7]
            assert entry.bad_words == [[2]]


class TestWhoIsRestored:
    def test_what_its_client_gave_up_does_not_come_back(self, tmp_path):
        engine, keeper = restored(tmp_path / "journal")
        kept, dropped = (engine.add_request([1, 2, 3], greedy(20), request_id=name) for name in ("kept", "dropped"))
        for _ in range(3):
            engine.step()
        engine.abort(dropped)
        crash(keeper)
        _, second = restored(tmp_path / "journal")
        assert [entry.request_id for entry in second.entries()] == [kept]

    def test_a_completion_that_a_front_end_stopped_at_its_string_is_whole_and_its_sibling_goes_on(self, tmp_path):
        prompt = [5]
        tokens = naive_generate(prompt, 12)
        engine, keeper = restored(tmp_path / "journal")
        name = engine.add_request(prompt, greedy(12, n=2))
        keeper.accept(name, AddRequest(0, name, prompt, greedy(12, n=2), [], 0, "", stop=(stop_at(tokens, 3),)))
        while engine._requests[name].sequences[0].num_generated_tokens < 5:
            engine.step()
        engine.abort(name, 0)  # it was told late: a token more is there
        crash(keeper)
        again, second = restored(tmp_path / "journal")
        drain(again)
        (entry,) = second.entries()
        assert token_ids(entry) == [tokens[:4], tokens[:4]]
        assert {one.finish_reason for one in entry.output(TOKENIZER).completions} == {"stop"}

    def test_a_request_whose_front_end_has_died_goes_on_and_its_answer_is_kept(self, tmp_path):
        engine, keeper = restored(tmp_path / "journal")
        tokens = naive_generate([6, 6], 15)
        name = engine.add_request([6, 6], greedy(15))
        message = AddRequest(0, name, [6, 6], greedy(15), [], 0, "", stop=(stop_at(tokens, 9),), origin=Origin("me", "mine"))
        keeper.accept(name, message)
        for _ in range(4):
            engine.step()
        assert not keeper.entries("me"), "its client still waits"
        assert keeper.adopt(0, [name]) == [name]
        drain(engine)
        assert [token_ids(entry) for entry in keeper.entries("me", "mine")] == [[tokens[:10]]]
        crash(keeper)
        _, second = restored(tmp_path / "journal")
        assert [token_ids(entry) for entry in second.entries("me", "mine")] == [[tokens[:10]]]
        assert not second.entries("you") and not second.entries("me", "other") and not second.entries()

    def test_what_a_dead_front_end_had_not_passed_on_is_kept_too(self, tmp_path, monkeypatch):
        engine, keeper = restored(tmp_path / "journal")
        for frontend, number, length in ((0, 0, 2), (0, 1, 40), (1, 0, 2)):
            name = f"{frontend}/call-{number}"
            engine.add_request([frontend, number], greedy(length), request_id=name)
            origin = Origin("me", f"call of {frontend}", number=number)
            keeper.accept(name, AddRequest(0, name, [], greedy(length), [], 0, "", origin=origin))
        for _ in range(5):
            engine.step()
        assert keeper.adopt(0, ["0/call-1"]) == ["0/call-1"]
        now = keeper_module.time.time()
        monkeypatch.setattr(keeper_module.time, "time", lambda: now + 60)
        drain(engine)
        answers = {(entry.origin.name, entry.origin.number): token_ids(entry) for entry in keeper.entries("me")}
        wanted = [naive_generate([0, 0], 2)], [naive_generate([0, 1], 40)]
        assert answers == {("call of 0", 0): wanted[0], ("call of 0", 1): wanted[1]}
        crash(keeper)
        _, second = restored(tmp_path / "journal")
        assert {entry.origin.number: token_ids(entry) for entry in second.entries("me", "call of 0")} == dict(enumerate(wanted))

    def test_what_ended_long_before_the_crash_has_reached_its_client(self, tmp_path, monkeypatch):
        engine, keeper = restored(tmp_path / "journal")
        engine.add_request([1], greedy(3), request_id="early")
        drain(engine)
        now = keeper_module.time.time()
        monkeypatch.setattr(keeper_module.time, "time", lambda: now + 60)
        engine.add_request([2], greedy(3), request_id="late")
        drain(engine)
        crash(keeper)
        os.utime(tmp_path / "journal", (now + 60, now + 60))
        _, second = restored(tmp_path / "journal")
        assert [entry.request_id for entry in second.entries()] == ["late"]

    def test_a_prompt_of_a_call_stays_as_long_as_its_others_run(self, tmp_path, monkeypatch):
        engine, keeper = restored(tmp_path / "journal")
        for number, length in enumerate((2, 200)):
            name = engine.add_request([number], greedy(length), request_id=f"call-{number}")
            origin = Origin("me", "call", number=number)
            keeper.accept(name, AddRequest(0, name, [number], greedy(length), [], 0, "", origin=origin))
        for _ in range(5):
            engine.step()
        now = keeper_module.time.time()
        monkeypatch.setattr(keeper_module.time, "time", lambda: now + 60)
        engine.add_request([2], greedy(1))  # its end would clear away what is old
        for _ in range(5):
            engine.step()
        crash(keeper)
        os.utime(tmp_path / "journal", (now + 60, now + 60))
        again, second = restored(tmp_path / "journal")
        drain(again)
        answers = {entry.origin.number: token_ids(entry) for entry in second.entries("me", "call")}
        assert answers == {0: [naive_generate([0], 2)], 1: [naive_generate([1], 200)]}

    def test_an_end_in_good_order_leaves_only_what_is_unfinished(self, tmp_path):
        engine, keeper = restored(tmp_path / "journal")
        engine.add_request([1], greedy(2), request_id="done")
        engine.add_request([1, 2], greedy(30), request_id="open")
        for _ in range(6):
            engine.step()
        keeper.close()
        keeper.close()
        _, second = restored(tmp_path / "journal")
        assert [entry.request_id for entry in second.entries()] == ["open"]

    def test_answers_are_forgotten_after_a_while_and_are_not_too_many(self, tmp_path, monkeypatch):
        monkeypatch.setattr(keeper_module, "MAX_KEPT", 3)
        engine, keeper = restored(tmp_path / "journal")
        for number in range(5):
            engine.add_request([number], greedy(4), request_id=f"r{number}")
        engine.step()
        crash(keeper)
        again, second = restored(tmp_path / "journal")
        drain(again)
        assert [entry.request_id for entry in second.entries()] == ["r2", "r3", "r4"]
        now = keeper_module.time.time()
        monkeypatch.setattr(keeper_module.time, "time", lambda: now + 3599)
        assert len(second.entries()) == 3
        monkeypatch.setattr(keeper_module.time, "time", lambda: now + 3601)
        assert not second.entries()


class TestEngineProcess:
    def test_an_engine_that_fails_leaves_its_requests_to_the_next_one(self, tmp_path):
        """Real engine processes; the first one's device fails in its fifth step."""
        prompts = [[first, 4] for first in range(3)]

        async def run() -> list[Entry]:
            options = checkpointed(str(tmp_path / "journal"), engine_options={"builder": "served:failing"})
            async with await AsyncEngine.start(**options) as engine:
                assert engine.facts.has_checkpoint
                ended = await asyncio.gather(*(read(engine, prompt) for prompt in prompts), return_exceptions=True)
                assert all(isinstance(one, EngineDead) for one in ended), ended
            options = checkpointed(str(tmp_path / "journal"), engine_options={"builder": "served:fake"})
            async with await AsyncEngine.start(**options) as engine:
                while True:
                    entries = msgspec.convert(await engine.call("restored", owner="me"), list[Entry])
                    if all(entry.ended is not None for entry in entries):
                        calls = [engine.call("restored", owner="me", of_call=entry.origin.name) for entry in entries]
                        return [msgspec.convert(one, list[Entry])[0] for one in await asyncio.gather(*calls)]
                    await asyncio.sleep(0.01)

        async def read(engine: AsyncEngine, prompt: list[int]) -> None:
            async for _ in engine.generate(prompt, greedy(15), origin=Origin("me", str(prompt[0]))):
                pass

        entries = asyncio.run(run())
        assert entries[0].origin.name == "0"  # the others may have come after the failure
        for entry in entries:
            assert token_ids(entry) == [naive_generate([int(entry.origin.name), 4], 15)]

    def test_a_front_end_that_leaves_in_good_order_takes_its_requests_with_it(self, tmp_path):
        async def run() -> list[Entry]:
            options = checkpointed(str(tmp_path / "journal"), engine_options={"builder": "served:slow"})
            async with await AsyncEngine.start(**options) as engine:
                other = await AsyncEngine.connect(engine.address)
                stream = other.generate([1, 2], greedy(500), origin=Origin("me", "mine"))
                await anext(stream)
                await other.close()
                while (await engine.stats())["num_running"]:
                    await asyncio.sleep(0.01)
                return msgspec.convert(await engine.call("restored", owner="me"), list[Entry])

        assert asyncio.run(run()) == []


class TestRefusals:
    def test_embeddings_and_what_no_longer_fits_are_refused_by_name(self, tmp_path):
        engine, keeper = restored(tmp_path / "journal", num_blocks=64)
        engine.add_request([1, 2], pooling="mean", request_id="vector")
        engine.add_request([1] * 30, greedy(150), request_id="long")
        engine.add_request([3], greedy(5, logprobs=2), request_id="fine")
        crash_before_a_step(engine, keeper)
        again, second = restored(tmp_path / "journal", num_blocks=16)
        drain(again)
        entries = {entry.request_id: entry for entry in second.entries()}
        assert "embeddings are not restored" in (entries["vector"].error or "")
        assert "180 tokens" in (entries["long"].error or "") and "64" in (entries["long"].error or "")
        assert entries["fine"].error is None and entries["fine"].lost == ["logprobs"]
        assert token_ids(entries["fine"]) == [naive_generate([3], 5)]

    def test_a_request_that_kills_the_engine_each_time_is_given_up(self, tmp_path):
        engine, keeper = restored(tmp_path / "journal")
        engine.add_request([1, 2], greedy(5))
        crash_before_a_step(engine, keeper)
        for _ in range(keeper_module.MAX_ATTEMPTS):
            engine, keeper = restored(tmp_path / "journal")
            assert engine.has_work
            crash(keeper)
        engine, keeper = restored(tmp_path / "journal")
        assert not engine.has_work
        assert "restored 3 times" in (keeper.entries()[0].error or "")

    def test_the_journal_of_another_model_is_refused_and_left_as_it_is(self, tmp_path):
        path = tmp_path / "journal"
        engine, keeper = restored(path)
        engine.add_request([1, 2], greedy(5))
        crash_before_a_step(engine, keeper)
        content = path.read_bytes()
        with pytest.raises(ConfigError, match=r"another model: it has model='fake', this engine has model='larger'"):
            keeper_of(make_engine(), path, {**MODEL, "model": "larger"})
        assert path.read_bytes() == content
        assert keeper_of(make_engine(), path).entries()

    def test_files_that_are_no_journal_are_refused(self, tmp_path):
        (tmp_path / "text").write_text("something that somebody needs\n" * 5)
        with pytest.raises(ConfigError, match="not a journal"):
            keeper_of(make_engine(), tmp_path / "text")
        assert "somebody" in (tmp_path / "text").read_text()
        with pytest.raises(ConfigError, match="cannot be used"):
            keeper_of(make_engine(), tmp_path)
        with pytest.raises(ConfigError, match="cannot be used"):
            keeper_of(make_engine(), tmp_path / "no" / "journal")

    def test_two_engines_do_not_share_a_journal(self, tmp_path, monkeypatch):
        monkeypatch.setattr("nanovllm.recovery.journal.LOCK_SECONDS", 0.1)
        _, keeper = restored(tmp_path / "journal")
        with pytest.raises(ConfigError, match="in use"):
            restored(tmp_path / "journal")
        keeper.close()
        restored(tmp_path / "journal")


def crash_before_a_step(engine: LLMEngine, keeper: Keeper) -> None:
    """Accepted, written with the first dispatch, and no result has come."""
    engine.step(may_collect=False)
    crash(keeper)


class TestFile:
    def test_a_torn_or_damaged_tail_costs_only_what_was_in_it(self, tmp_path, caplog):
        path = tmp_path / "journal"
        engine, keeper = restored(path)
        for first in range(4):
            engine.add_request([first, 9], greedy(20))
        for _ in range(8):
            engine.step()
        crash(keeper)
        whole = path.read_bytes()
        for cut in (1, 5, 30, 100):
            for damaged in (whole[:-cut], whole[:-cut] + b"\xff" * cut, whole + b"\0" * cut):
                path.write_bytes(damaged)
                caplog.clear()
                again, second = restored(path)
                assert "torn or damaged" in caplog.text
                drain(again)
                answers = [token_ids(entry) for entry in second.entries()]
                assert answers == [[naive_generate([first, 9], 20)] for first in range(4)]
                crash(second)

    def test_a_record_that_this_version_cannot_read_costs_only_itself(self, tmp_path, caplog):
        path = tmp_path / "journal"
        engine, keeper = restored(path)
        engine.add_request([1, 9], greedy(20))
        engine.step()
        with path.open("ab") as file:
            file.write(_framed(Ended(0, 7, None, 0.0)))  # type: ignore[arg-type]  # a reason that is no text
        engine.add_request([2, 9], greedy(20))
        for _ in range(3):
            engine.step()
        crash(keeper)
        again, second = restored(path)
        assert "a record is left out" in caplog.text
        drain(again)
        assert [token_ids(entry) for entry in second.entries()] == [[naive_generate([first, 9], 20)] for first in (1, 2)]

    def test_it_is_private_whatever_was_there(self, tmp_path):
        path = tmp_path / "journal"
        path.touch(mode=0o644)
        engine, keeper = restored(path)
        engine.add_request([1], greedy(3))
        drain(engine)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        keeper.close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_it_does_not_grow_for_ever(self, tmp_path, monkeypatch):
        monkeypatch.setattr("nanovllm.recovery.journal.MIN_REWRITE_BYTES", 4_000)
        monkeypatch.setattr(keeper_module, "LINGER_SECONDS", 0.0)
        path = tmp_path / "journal"
        engine, keeper = restored(path)
        largest = 0
        engine.add_request([9, 9], greedy(100), request_id="long")
        for number in range(90):
            engine.add_request([number % 50, 1, 2, 3], greedy(3))  # together more than 20,000 bytes
            engine.step()
            largest = max(largest, path.stat().st_size)
        assert largest < 8_000
        crash(keeper)
        again, second = restored(path)
        drain(again)
        assert token_ids(next(one for one in second.entries() if one.request_id == "long")) == [naive_generate([9, 9], 100)]

    def test_a_full_disk_ends_the_journal_and_not_the_engine(self, tmp_path, caplog):
        engine, keeper = restored(tmp_path / "journal")
        os.close(keeper._journal._fd)  # type: ignore[arg-type]
        keeper._journal._fd = os.open("/dev/full", os.O_WRONLY)
        engine.add_request([1, 2], greedy(5))
        drain(engine)
        assert "degraded, checkpoint" in caplog.text and "No space left" in caplog.text

    def test_what_must_be_the_same(self):
        facts = identity({"model": None, "dtype": "float32", "max_num_seqs": 4}, make_engine())
        assert facts == {"model": None, "revision": None, "dtype": "float32", "cpu_compute": None, "vocab_size": VOCAB_SIZE}
