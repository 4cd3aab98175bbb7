"""What became worse than asked for: one line in the log, and one count at /metrics."""

from __future__ import annotations

import asyncio

import pytest

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.log import DEGRADATIONS, DegradationCounter, degraded, logger
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.metrics import Metrics, render


def test_a_line_and_a_count_of_its_reason(caplog):
    counter = DegradationCounter()
    try:
        logger.warning("nothing was degraded")
        degraded("graph_memory", "none for %d tokens", 512)
        with pytest.raises(KeyError, match="new_reason"):
            degraded("new_reason", "is not in the list, so no counter would begin at 0")
    finally:
        logger.removeHandler(counter)
    assert counter.counts == {**dict.fromkeys(DEGRADATIONS, 0), "graph_memory": 1}
    assert "degraded, graph_memory: none for 512 tokens" in caplog.text


def test_a_full_cache_is_told_once_a_minute_and_counted(capfd):
    """32 slots for three sequences that want 20 each: some are preempted, several times."""

    async def stats_after_preemptions() -> dict:
        async with await AsyncEngine.start(builder="served:fake", num_kv_blocks=8, max_num_seqs=4) as engine:

            async def run(first: int) -> None:
                async for _ in engine.generate([first, 2], SamplingParams(temperature=0, max_tokens=18)):
                    pass

            await asyncio.gather(*map(run, range(3)))
            return await engine.stats()

    stats = asyncio.run(stats_after_preemptions())
    assert stats["num_preemptions"] >= 1
    counts = {reason: stats[f"num_degraded_{reason}"] for reason in DEGRADATIONS}
    assert counts == {**dict.fromkeys(DEGRADATIONS, 0), "kv_cache_full": 1}
    assert capfd.readouterr().err.count("degraded, kv_cache_full") == 1
    text = render(Metrics(100).counts, stats, "m", {}).decode()
    assert 'nanovllm:degradations_total{engine="0",model_name="m",reason="kv_cache_full"} 1.0' in text
    assert 'nanovllm:degradations_total{engine="0",model_name="m",reason="cuda_graphs"} 0.0' in text
