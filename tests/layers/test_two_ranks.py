"""Layers and whole toy models on two processes over gloo give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from layers.ranks import MODELS, run_everything
from torch import Tensor

from nanovllm.parallel.group import ParallelGroup

SCRIPT = Path(__file__).with_name("ranks.py")
SECONDS = 90


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes saw. They are started once, and killed if they hang."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(SCRIPT.parents[2]), str(SCRIPT.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(folder)], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + SECONDS
    try:
        codes = [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = ["hangs"]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        texts = [log.seek(0) or log.read() for log in logs]
        for log in logs:
            log.close()
    if codes != [0, 0]:
        pytest.fail(f"ranks ended with {codes}:\n" + "\n".join(texts))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return run_everything(ParallelGroup())


def check(one_rank: dict[str, Tensor], two_ranks: list[dict[str, Tensor]], name: str) -> None:
    for rank in two_ranks:
        torch.testing.assert_close(rank[name], one_rank[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", ["column", "column then row"])
def test_linear_layers(one_rank, two_ranks, layer, bias):
    check(one_rank, two_ranks, f"{layer}, bias={bias}")


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_query_key_and_value_heads(one_rank, two_ranks, num_kv_heads):
    check(one_rank, two_ranks, f"qkv, {num_kv_heads} KV heads")
    assert two_ranks[0]["copies of the one key head differ by"] == 0


@pytest.mark.parametrize("name", ["embedding", "tied head", "own head"])
def test_embedding_and_heads(one_rank, two_ranks, name):
    check(one_rank, two_ranks, name)


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_hidden_states_and_logits(self, one_rank, two_ranks, name):
        check(one_rank, two_ranks, f"{name}: hidden")
        check(one_rank, two_ranks, f"{name}: logits")
        assert one_rank[f"{name}: logits"].std() > 0.3, "a toy whose logits are all alike would prove nothing"

    def test_drawn_tokens(self, one_rank, two_ranks, name):
        for rank in two_ranks:
            assert torch.equal(rank[f"{name}: tokens"], one_rank[f"{name}: tokens"])


def test_everything_that_ran_on_one_rank_ran_on_two(one_rank, two_ranks):
    for rank in two_ranks:
        assert set(rank) - {"copies of the one key head differ by"} == set(one_rank)
