"""Bytes and operations of a step beside what a hand computes, and cards by their drivers' names."""

from __future__ import annotations

import pytest

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.engine_process import Counters
from nanovllm.engine.events import StepCollected, StepDispatched
from nanovllm.engine.roofline import Peak, StepWork, WorkCounter, find_peak
from nanovllm.model_spec import ModelSpec, RopeSpec
from nanovllm.simulation.cost import CostModel
from nanovllm.simulation.hardware import PROFILES

# Two layers: q 2 heads of 4, k and v 1 head of 4. Weights of a layer: 8 x 16 + 8 x 8 + 8 x 24 + 12 x 8 = 480; head 10 x 8.
TINY = ModelSpec("LlamaForCausalLM", 10, 8, 12, 2, 2, 1, 4, 1e-5, RopeSpec(1e4), 64, True)


def batch(*chunks: tuple[int, int], sampled: list[int]) -> ScheduledBatch:
    starts, lengths = map(list, zip(*chunks))
    return ScheduledBatch(0, list(range(len(chunks))), starts, lengths, sampled)


def test_single_tokens_as_a_hand_counts_them():
    work = WorkCounter(TINY, weight_bytes=2, value_bytes=2).count(batch((5, 1), (8, 1), sampled=[0, 1]))
    num_keys = 6 + 9
    assert work.num_bytes == 2 * (2 * 480 + 80) + num_keys * (2 * 2 * 4) * 2  # weights; K and V, 2 layers, 4 numbers
    assert work.num_operations == 2 * 2 * (2 * 480 + 80) + 2 * num_keys * 4 * 2 * 4  # layers x keys x 4 x heads x head_dim


def test_a_prompt_beside_a_single_token_as_a_hand_counts_them():
    # The chunk [2, 5) of a prompt that goes on, and one token at 7: three tokens and one, of which one draws.
    work = WorkCounter(TINY, weight_bytes=1.25, value_bytes=4).count(batch((2, 3), (7, 1), sampled=[1]))
    pairs = (3 + 4 + 5) + 8
    last_layer = 2 * (4 * 128 + 1 * (64 + 192 + 96))  # keys and values of all four, the rest for the one that draws
    assert work.num_bytes == 1.25 * (2 * 480 + 80) + (5 + 8) * 2 * 2 * 4 * 4
    assert work.num_operations == 2 * 4 * 480 + last_layer + 2 * 80 + 4 * 2 * 4 * (pairs + 8)


def test_a_step_without_a_draw_leaves_out_the_weights_that_nobody_needs():
    work = WorkCounter(TINY, weight_bytes=2, value_bytes=2).count(batch((0, 4), sampled=[]))
    assert work.num_bytes == 2 * (480 + 128) + 4 * 16 * 2
    assert work.num_operations == 2 * 4 * (480 + 128) + 4 * 2 * 4 * (1 + 2 + 3 + 4)


def test_the_simulator_counts_the_same_weights_and_keys():
    """It adds activations, which are small here, and no operations for the attention of single tokens."""
    from nanovllm.simulation.shapes import SHAPES

    spec, step = SHAPES["qwen3-8b"], batch((999, 1), (1999, 1), sampled=[0, 1])
    cost = CostModel(spec, PROFILES["h200"], use_graphs=False).step(step)
    work = WorkCounter(spec, weight_bytes=2, value_bytes=2).count(step)
    assert work.num_bytes == pytest.approx(cost.num_bytes, rel=0.002)
    assert work.num_operations == pytest.approx(cost.num_operations + spec.num_layers * 3000 * 4 * 32 * 128)


def test_the_roof_is_the_slower_of_the_two():
    peak = Peak(100.0, 1000.0, "by hand")
    assert peak.roof_s(StepWork(200.0, 1000.0)) == 2.0
    assert peak.roof_s(StepWork(50.0, 4000.0)) == 4.0


def test_the_counters_add_up_steps_and_tell_the_shares_of_the_last():
    counters = Counters(WorkCounter(TINY, weight_bytes=2, value_bytes=2), Peak(1e6, 1e9, "by hand"))
    first, second = batch((5, 1), (8, 1), sampled=[0, 1]), batch((0, 4), sampled=[])
    for step, one in enumerate((first, second)):  # with one step ahead, the second leaves before the first is back
        counters.on_event(StepDispatched(0.0, step, 1, 1, 1, 0, 1, 9, 1000, one))
    assert counters.totals()["model_bytes"] == 0 and "bandwidth_share" not in counters.totals()
    counters.on_event(StepCollected(0.0, 0, 2, 4_000_000, 10))
    totals = counters.totals()
    num_bytes, num_operations = 2 * 1040 + 15 * 32, 4 * 1040 + 2 * 15 * 32
    assert (totals["model_bytes"], totals["model_operations"]) == (num_bytes, num_operations)
    assert totals["roof_ns"] == num_bytes * 1000  # at a byte per microsecond; the operations need less
    assert totals["bandwidth_share"] == pytest.approx(num_bytes / 1e6 / 0.004)
    assert totals["operations_share"] == pytest.approx(num_operations / 1e9 / 0.004)
    counters.on_event(StepCollected(0.0, 1, 0, 4_000_000, 10))
    assert counters.totals()["model_bytes"] == num_bytes + 2 * (480 + 128) + 4 * 32
    assert not counters._works


def test_what_nobody_knows_is_not_told():
    no_model, no_peak = Counters().totals(), Counters(WorkCounter(TINY, 2, 2)).totals()
    names = {"model_bytes", "roof_ns", "bandwidth_share", "peak_bytes_per_s"}
    assert names.isdisjoint(no_model) and names & set(no_peak) == {"model_bytes"}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
        ("CPU, 2 threads", None),
    ],
)
def test_a_card_is_found_by_its_name(device, name):
    peak = find_peak(device)
    if name is None:
        assert peak is None
    else:
        assert peak is not None and peak.source == f"data sheet of {name}"
        assert (peak.bytes_per_s, peak.operations_per_s) == (PROFILES[name].bandwidth, PROFILES[name].flops)


def test_a_cpus_roof_is_measured():
    from nanovllm.platforms.cpu import CpuPlatform

    peak = CpuPlatform().peak("float32")
    assert peak.source == "measured"
    assert 1e8 < peak.bytes_per_s < 1e13 and 1e8 < peak.operations_per_s < 1e15
