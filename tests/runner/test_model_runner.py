"""ModelRunner by hand: rows, projections, prompt log-probabilities."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models.toys import GREEDY, Driver, Toy, load_toy, make_toy

from nanovllm.engine import model_runner
from nanovllm.engine.batch import BlockCopy, BlockUpdate, RowSampling, ScheduledBatch, Seat
from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling_params import SamplingParams

PROMPT = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
OTHER = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@cache
def toy() -> Toy:
    return make_toy("qwen3")


def driver(**sizes: int) -> Driver:
    return Driver(load_toy(toy().folder), **sizes)


def naive(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(toy().logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class TestRows:
    def test_drawn_tokens_are_the_inputs_of_the_next_step_without_the_host(self):
        run = driver()
        run.seat(6, PROMPT[:5], [9, 1, 8])
        drawn = []
        for start, length in ((0, 5), (5, 1), (6, 1), (7, 1)):
            run.step((6, start, length), sampled=[0])
            drawn += run.result.token_ids
        assert drawn == [[token] for token in naive(PROMPT[:5], 4)]

    def test_a_row_that_is_seated_again_has_forgotten_everything(self):
        run = driver()
        run.seat(2, PROMPT, list(range(11)), SamplingParams(temperature=0, prompt_logprobs=1, logprobs=2, logit_bias={5: 100.0}))
        run.step((2, 0, 40), sampled=[0])
        assert run.result.token_ids == [[5]] and run.result.logprobs[0] is not None and len(run.result.prompt_logprobs[0]) == 39
        run.seat(2, OTHER[:7], [3, 0, 20])
        (logits,) = run.step((2, 0, 7), sampled=[0])
        torch.testing.assert_close(logits, toy().logits(OTHER[:7]), rtol=0, atol=1e-4)
        assert run.result.token_ids == [naive(OTHER[:7], 1)]
        assert not run.result.logprobs and not run.result.prompt_logprobs

    def test_a_longer_sequence_may_follow_a_shorter_one(self):
        run = driver()
        run.seat(0, OTHER[:3], [5])
        run.step((0, 0, 3), sampled=[0])
        run.seat(0, PROMPT, [*range(20, 31)])
        (logits,) = run.step((0, 0, 40))
        torch.testing.assert_close(logits, toy().logits(PROMPT), rtol=0, atol=1e-4)

    def test_the_last_row_and_the_last_position_are_usable(self):
        run = driver(max_num_seqs=2, max_model_len=40, num_blocks=10)
        run.seat(1, PROMPT, list(range(10)))
        run.step((1, 0, 39))
        run.step((1, 39, 1), sampled=[0])
        assert run.result.token_ids == [naive(PROMPT, 1)]

    def test_later_block_updates_of_one_step_win_and_copies_come_before_writes(self):
        """Copy-on-write, as the scheduler writes it: the shared block 3 is copied to 7, then written at position 6."""
        run = driver()
        first, second = PROMPT[:8], [*PROMPT[:6], 1, 2]
        run.seat(0, first, [2, 3])
        before = run.step((0, 0, 8))[0]
        seat = Seat(1, second, RowSampling(GREEDY, 0, (), (), 8))
        updates = [BlockUpdate(1, 0, [2, 3]), BlockUpdate(1, 1, [7])]
        batch = ScheduledBatch(1, [1, 0], [6, 7], [2, 1], [0, 1], [seat], updates, [BlockCopy(3, 7)])
        result = run.runner.run(batch).result()
        assert result.token_ids == [naive(second, 1), naive(first, 1)]
        torch.testing.assert_close(before[-1], toy().logits(first)[-1], rtol=0, atol=1e-4)


class TestProjection:
    def rows_projected(self, run: Driver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        seen: list[int] = []
        project = run.model.compute_logits
        monkeypatch.setattr(run.model, "compute_logits", lambda hidden: seen.append(len(hidden)) or project(hidden))
        return seen

    def test_only_positions_that_draw_are_projected(self, monkeypatch):
        run = driver()
        for row, tokens in enumerate((PROMPT[:9], PROMPT[:20], OTHER[:8], OTHER[:12])):
            run.seat(row, tokens, list(range(10 * row, 10 * row + 6)))
        seen = self.rows_projected(run, monkeypatch)
        chunks = [(0, 0, 9), (1, 0, 11), (2, 0, 8), (3, 0, 12)]
        run.step(*chunks, sampled=[0, 2, 3])
        assert seen == [3, 40], "three positions draw; the 40 are the test's own look at every position"
        assert run.result.token_ids == [naive(tokens, 1) for tokens in (PROMPT[:9], OTHER[:8], OTHER[:12])]

    def test_a_step_that_draws_nothing_projects_nothing(self, monkeypatch):
        run = driver()
        run.seat(0, PROMPT, list(range(10)))
        seen = self.rows_projected(run, monkeypatch)
        run.step((0, 0, 30))
        assert seen == [30] and run.result.token_ids == []

    def test_a_decoding_batch_projects_each_row_once(self, monkeypatch):
        run = driver()
        for row in range(3):
            run.seat(row, PROMPT[row : row + 5], [2 * row, 2 * row + 1])
        run.step((0, 0, 5), (1, 0, 5), (2, 0, 5), sampled=[0, 1, 2])
        seen = self.rows_projected(run, monkeypatch)
        run.step((2, 5, 1), (0, 5, 1), (1, 5, 1), sampled=[0, 1, 2])
        assert seen == [3, 3]
        assert run.result.token_ids == [naive(PROMPT[row : row + 5], 2)[1:] for row in (2, 0, 1)]


class TestPromptLogprobs:
    @pytest.mark.parametrize("rows_at_a_time", [256, 3])
    @pytest.mark.parametrize("chunk_size", [1, 7, 16, 39, 40])
    def test_are_those_of_transformers_at_every_position(self, monkeypatch, chunk_size, rows_at_a_time):
        monkeypatch.setattr(model_runner, "MAX_LOGIT_ROWS", rows_at_a_time)
        run = driver()
        run.seat(3, PROMPT, list(range(10)), SamplingParams(temperature=0, prompt_logprobs=4))
        run.seat(4, OTHER, list(range(10, 20)))  # a neighbour that does not ask
        got: list[PositionLogprobs] = []
        for start in range(0, 40, chunk_size):
            length = min(chunk_size, 40 - start)
            run.step((4, start, length), (3, start, length), sampled=[1] if start + length == 40 else [])
            assert set(run.result.prompt_logprobs) <= {1}
            got += run.result.prompt_logprobs.get(1, [])
        expected = toy().logits(PROMPT).log_softmax(-1)
        assert len(got) == 39
        for position, scores in enumerate(got):
            line, token = expected[position], PROMPT[position + 1]
            assert scores.chosen.token_id == token
            assert scores.chosen.logprob == pytest.approx(line[token].item(), abs=1e-4)
            assert scores.chosen.rank == 1 + int((line > line[token]).sum())
            assert [top.token_id for top in scores.top] == line.topk(4).indices.tolist()
            assert [top.logprob for top in scores.top] == pytest.approx(line.topk(4).values.tolist(), abs=1e-4)

    def test_stop_at_the_prompt_even_when_generated_tokens_are_recomputed(self):
        """After a preemption the seat brings generated tokens along; they are no part of the prompt."""
        run = driver()
        params = SamplingParams(temperature=0, prompt_logprobs=0)
        run.seat(0, [*PROMPT[:10], 3, 4], [0, 1, 2, 3], params, num_prompt_tokens=10)
        run.step((0, 0, 12), sampled=[0])
        assert [scores.chosen.token_id for scores in run.result.prompt_logprobs[0]] == PROMPT[1:10]
        run.step((0, 12, 1), sampled=[0])
        assert not run.result.prompt_logprobs.get(0)


def test_a_bfloat16_model_keeps_its_cache_in_bfloat16():
    run = Driver(load_toy(toy().folder, torch.bfloat16))
    run.seat(0, PROMPT, list(range(11)))
    run.step((0, 0, 39))
    run.step((0, 39, 1), sampled=[0])
    assert all(cache.dtype == torch.bfloat16 for cache in run.runner.kv_caches)
    assert run.result.token_ids[0][0] in toy().logits(PROMPT)[-1].topk(3).indices


class TestTheLastLayer:
    @pytest.mark.parametrize("sampled", [[], [0], [1], [0, 2], [0, 1, 2]], ids=str)
    def test_is_computed_only_for_tokens_that_draw_and_draws_the_same(self, sampled: list[int]):
        results = []
        for sees_all in (True, False):
            run = driver()
            run.seat(6, PROMPT, list(range(11)))
            run.seat(2, OTHER, list(range(20, 31)))
            run.seat(4, OTHER[:9], list(range(40, 43)))
            run.step((2, 0, 15))
            run.sees_all = sees_all
            run.step((6, 0, 40), (2, 15, 1 + 24 * (1 in sampled)), (4, 0, 9), sampled=sampled)
            assert len(run.hidden[-1]) == (50 + 24 * (1 in sampled) if sees_all else len(sampled))
            results.append(run.result.token_ids)
            run.sees_all = True
            (logits,) = run.step((6, 39, 1))  # the keys and values of every token were written
            torch.testing.assert_close(logits[0], toy().logits(PROMPT)[-1], rtol=0, atol=1e-4)
        assert results[0] == results[1] and len(results[0]) == len(sampled)
