"""Calibration: the shares and latencies of a card, computed from benchmark records. Medians and ratios, no optimiser.

    records of kernels   bandwidth, matrix rates, latency of each kind of kernel, sampler
    record of steps      the gap between two kernels of a graph
    offline records      host time of a step (their `steps`), by batch size
    front end costs      what keeps the event loops of server and client busy, by request, token and event; what the
                         engine's thread does with a new request

By hand, not here: `idle_s` from one first token offline; the rate of long products and when it sets in; messages and eager
launches (docs/simulator.md has the sources). All else of whole runs is a prediction. Read next: `validate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from typing import Any

from nanovllm.simulation.cost import CostModel
from nanovllm.simulation.hardware import Calibration, Hardware
from nanovllm.simulation.shapes import SHAPES

HEAD_DIM, NUM_HEADS, VOCABULARY = 128, 16, 151_936  # of the kernels record
LARGE_BURST = 128  # requests


def calibrate(
    hardware: Hardware, kernels: dict[str, Any], steps: dict[str, Any], offline: Iterable[dict[str, Any]]
) -> Calibration:
    """The calibration of `hardware`; its front end is kept, and so is what was set by hand."""
    memory = kernels["ceilings"]["read_bytes_per_s"]
    burst = kernels["ceilings"]["bf16_burst_flop_per_s"]
    attention_rate, tile_keys = _prompt_attention(kernels)
    product_s, attention_s = (_latency(kernels, one, memory, burst) for one in (_is_library_product, _is_decode_attention))
    host_step_s, host_sequence_s = _host(offline)
    calibration = replace(
        hardware.calibration,
        memory=memory / hardware.bandwidth,
        burst_product=burst / hardware.flops,
        overlap=_overlap(kernels, memory, burst, product_s),
        attention=attention_rate / hardware.flops,
        tile_keys=tile_keys,
        elementwise=_elementwise_share(kernels, memory),
        elementwise_s=1e-6 * median(_times(kernels, _is_elementwise, "1 tokens")),
        product_s=product_s,
        one_token_product_s=_latency(kernels, lambda name: name.startswith("one token"), memory, burst),
        attention_s=attention_s,
        prompt_key_s=(1e-6 * _times(kernels, _is_prompt_attention, "1 x 512")[0] - attention_s) / 512,
        logit_s=_sampler(kernels, "sample, temperature"),
        greedy_logit_s=_sampler(kernels, "sample, greedy"),
        host_step_s=host_step_s,
        host_sequence_s=host_sequence_s,
    )
    return replace(calibration, gap_s=_gap(replace(hardware, calibration=calibration), steps))


def calibrate_front_end(calibration: Calibration, costs: dict[str, Any]) -> Calibration:
    """With the record `front-end-costs`: processor times; of events the pace in bursts; of a request alone what they leave.

    Tokenising runs beside the event loop, but Python before and after it holds the interpreter's lock: the part of a
    thread's time that does not grow with the prompt keeps the event loop waiting, and counts as its own.
    """
    loads = costs["loads"]

    def us(load: str, key: str) -> float:
        return loads[load][key]["median"]

    num_events = sum(sign * loads[one]["tokens"] * us(one, "events_per_token") for one, sign in (("paced", 1), ("saturated", -1)))
    client_event_us = (us("paced", "client_us") - us("saturated", "client_us")) / num_events
    num_short, num_words, num_more = (loads[one]["words"] for one in ("short", "words 512", "words 1024"))
    token_us = (us("words 1024", "loop_us") - us("short", "loop_us")) / (num_more - num_short)
    in_thread_us = (us("words 1024", "threads_us") - us("words 512", "threads_us")) / (num_more - num_words)
    locked_us = us("words 512", "threads_us") - us("short", "threads_us") - num_words * in_thread_us
    event_s, told_s = _events(costs["bursts"])
    found = replace(
        calibration,
        frontend_request_s=1e-6 * (us("short", "loop_us") - num_short * token_us + locked_us) - event_s,
        frontend_token_s=1e-6 * token_us,
        frontend_told_s=told_s,
        frontend_event_s=event_s,
        tokenize_token_s=1e-6 * in_thread_us,
        client_request_s=1e-6 * (us("words 512", "client_us") - client_event_us),
        client_event_s=1e-6 * client_event_us,
    )
    return replace(found, frontend_latency_s=_latency_each_way(found, costs))


def _events(bursts: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of an event, and before the first of a step for each of its streams, by the wall's clock, from four clients."""
    (alone,) = (row["times"]["step"] for row in bursts if row["size"] == row["clients"] == 1 and row["words"] == 512)
    large = [(row["size"], row["times"]["step"]) for row in bursts if row["size"] >= LARGE_BURST and row["clients"] == 4]
    event_ms = median((step["p90"] - step["p10"]) / (0.8 * size) for size, step in large)
    return 1e-3 * event_ms, 1e-3 * median((step["first"] - alone["first"]) / size for size, step in large)


def _latency_each_way(calibration: Calibration, costs: dict[str, Any]) -> float:
    """Half of what nobody's processor is busy with while a request is alone. Seconds."""
    num_words, engine = costs["alone"]["words"], costs["engine"][str(costs["alone"]["words"])]
    busy_s = 1e-6 * sum(engine[key]["median"] for key in ("intake_us", "admit_us"))
    busy_s += calibration.client_request_s + calibration.frontend_request_s
    busy_s += num_words * (calibration.frontend_token_s + calibration.tokenize_token_s)
    busy_s += calibration.frontend_message_s + calibration.frontend_told_s + calibration.frontend_event_s
    busy_s += calibration.client_message_s + calibration.client_event_s
    return (1e-6 * costs["alone"]["wall_us"]["median"] - busy_s) / 2


def calibrate_requests(calibration: Calibration, engine: dict[str, Any]) -> Calibration:
    """With the field `engine` of a record of front end costs: lines through prompts of 4 and of 1,024 tokens."""
    short, long = engine["4"], engine["1024"]
    intake_s, admit_s = ((long[key]["median"] - short[key]["median"]) / 1020e6 for key in ("intake_us", "admit_us"))
    return replace(
        calibration,
        host_request_s=1e-6 * short["intake_us"]["median"] - 4 * intake_s,
        host_token_s=intake_s,
        host_admit_token_s=admit_s,
    )


def _times(kernels: dict[str, Any], is_wanted: Callable[[str], bool], shape: str) -> list[float]:
    return [row["us"] for row in kernels["kernels"] if is_wanted(row["kernel"]) and row["shape"] == shape]


def _is_elementwise(name: str) -> bool:
    return name in ("add + RMSNorm", "SiLU x up", "QK-norm, rotary, KV write")


def _is_library_product(name: str) -> bool:
    return name.startswith("library") and name != "library: head"


def _is_decode_attention(name: str) -> bool:
    return name == "decode attention"


def _is_prompt_attention(name: str) -> bool:
    return name == "prompt attention"


def _overlap(kernels: dict[str, Any], bandwidth: float, matrix_rate: float, latency_s: float) -> float:
    """From the one product of the record whose two times are alike: the output head for 256 tokens."""
    (row,) = (row for row in kernels["kernels"] if row["kernel"] == "library: head" and row["shape"].startswith("256 x"))
    shorter, longer = sorted((row["megabytes"] * 1e6 / bandwidth, row["gigaflops"] * 1e9 / matrix_rate))
    return 1 - (row["us"] * 1e-6 - latency_s - longer) / shorter


def _elementwise_share(kernels: dict[str, Any], bandwidth: float) -> float:
    rows = [row for row in kernels["kernels"] if _is_elementwise(row["kernel"]) and row["shape"] == "8192 tokens"]
    return sum(row["megabytes"] for row in rows) * 1e6 / (sum(row["us"] for row in rows) * 1e-6) / bandwidth


def _latency(kernels: dict[str, Any], is_wanted: Callable[[str], bool], bandwidth: float, matrix_rate: float) -> float:
    """What is left of a kernel's time after its bytes or operations; the median over shapes. Seconds."""
    rows = [row for row in kernels["kernels"] if is_wanted(row["kernel"])]
    floors = [max(row["megabytes"] * 1e6 / bandwidth, row["gigaflops"] * 1e9 / matrix_rate) for row in rows]
    return median(row["us"] * 1e-6 - floor for row, floor in zip(rows, floors))


def _prompt_attention(kernels: dict[str, Any]) -> tuple[float, int]:
    """Rate, and keys computed in vain per query: two unknowns, two shapes with equally many queries."""
    (short,) = _times(kernels, _is_prompt_attention, "4 x 2,048")
    (long,) = _times(kernels, _is_prompt_attention, "1 x 8,192")
    num_queries = 8192
    per_pair = 4.0 * NUM_HEADS * HEAD_DIM
    short_pairs, long_pairs = num_queries * 2048 / 2, num_queries * 8192 / 2
    rate = per_pair * (long_pairs - short_pairs) / ((long - short) * 1e-6)
    wasted_pairs = long * 1e-6 * rate / per_pair - long_pairs
    return rate, round(wasted_pairs / num_queries)


def _sampler(kernels: dict[str, Any], name: str) -> float:
    small, large = (_times(kernels, lambda one: one == name, f"{rows} rows")[0] for rows in (64, 256))
    return (large - small) * 1e-6 / (192 * VOCABULARY)


def _host(offline: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of any step, and more for each sequence: a line through batches of 1 and 256, the mean of the models."""
    pairs = [(record["steps"]["1"]["host_us_per_step"], record["steps"]["256"]["host_us_per_step"]) for record in offline]
    slopes = [(large - small) / 255 for small, large in pairs]
    offsets = [small - slope for (small, _), slope in zip(pairs, slopes)]
    return 1e-6 * sum(offsets) / len(offsets), 1e-6 * sum(slopes) / len(slopes)


def _gap(hardware: Hardware, steps: dict[str, Any]) -> float:
    """What a replayed step takes beyond its kernels, per kernel; the median over batches of two and more. Seconds."""
    without = replace(hardware, calibration=replace(hardware.calibration, gap_s=0.0))
    cost = CostModel(SHAPES[steps["model"]], without, is_greedy=False)
    left = []
    for row in steps["steps"]:
        if row["batch"] > 1:
            predicted = cost.decode(row["batch"], row["batch"] * (row["context"] + 1)).device_s
            left.append((row["us"] * 1e-6 - predicted) / cost.num_kernels(row["batch"]))
    return median(left)
