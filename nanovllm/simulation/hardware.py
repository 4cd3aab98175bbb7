"""Hardware profiles: what a card can do, and which share of it the engine reaches.

A profile is two groups of numbers. The *data sheet* (memory, bandwidth, matrix rate) is what the vendor prints. The
*calibration* is what this engine reached on one NVIDIA H200; `calibrate.py` computes most of it from the records in
`benchmarks/records`, a test holds the two together, and docs/simulator.md says where the rest is from. Only "h200" was
measured. The other cards borrow its shares and latencies, so their predictions are extrapolations, and every report says
so. "cpu" is a rough guess for two cores.

Data only. Read next: `cost.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.roofline import DATA_SHEETS
from nanovllm.errors import ConfigError, did_you_mean

GB = 1 << 30  # what data sheets call a GB of a card is one of these, nearly


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one engine reaches of a data sheet. Shares are of the data sheet; times are seconds."""

    memory: float  # share of the bandwidth that a kernel which streams reaches
    product: float  # share of the matrix rate in large products, one after another: then power limits the clock
    burst_product: float  # the same while the clock is not limited
    burst_s: float  # matrix work of so long a step is over before it is
    overlap: float  # share of the shorter of a product's two times, memory's and the matrix units', that hides behind the longer
    attention: float  # share of the matrix rate in attention of prompts
    elementwise: float  # share of the *reached* bandwidth in norms, rotary and SiLU
    product_s: float  # what a product takes beyond its bytes or operations
    one_token_product_s: float  # the same of the kernels for a single token
    attention_s: float  # what attention takes beyond its bytes or operations
    elementwise_s: float  # what a norm, rotary or SiLU takes beyond its bytes
    gap_s: float  # between two kernels of a graph
    tile_keys: int  # keys that attention of prompts computes in vain for each query, because it works on tiles
    prompt_key_s: float  # attention of prompts: a program goes through its keys one after another, each takes so long
    logit_s: float  # sampler, temperature: per logit
    greedy_logit_s: float  # sampler, argmax: per logit
    idle_s: float  # what a step takes more when it finds the device idle: launch, copies and the way back, otherwise hidden
    host_step_s: float  # host: schedule, prepare, launch and apply, of any step
    host_sequence_s: float  # host: the same, for each sequence of the step
    host_request_s: float  # host: message and door of a new request, before a step
    host_token_s: float  # the same, for each token of its prompt
    host_admit_token_s: float  # host: hashes and blocks of a prompt, in its step, for each token
    eager_launch_s: float  # host: one kernel without a graph; an assumption, not measured
    frontend_latency_s: float  # of a request's way in, and again of a token's way out, that keeps no event loop busy
    frontend_request_s: float  # of the server's event loop, for a request
    frontend_token_s: float  # the same, for each token of its prompt
    frontend_message_s: float  # and for the engine's message of a step
    frontend_told_s: float  # for each stream in it
    frontend_event_s: float  # and for an event: the tokens of one stream that are written together
    tokenize_token_s: float  # in a thread of the server, for each token of a prompt
    client_request_s: float  # of the client's event loop: connect and send
    client_message_s: float  # and for the events of a step
    client_event_s: float  # and read an event


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `is_calibrated`: the calibration was measured on this very kind."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes per second, data sheet
    flops: float  # dense bf16 operations per second, data sheet
    calibration: Calibration
    is_calibrated: bool = False
    has_graphs: bool = True  # steps are replayed as CUDA graphs
    num_steps_ahead: int = 1
    block_size: int = 64  # tokens
    max_num_batched_tokens: int = 8192


H200_CALIBRATION = Calibration(
    memory=0.9109,
    product=0.6960,
    burst_product=0.7906,
    burst_s=50e-3,
    overlap=0.7534,
    attention=0.5377,
    elementwise=0.8521,
    product_s=4.176e-6,
    one_token_product_s=2.156e-6,
    attention_s=7.840e-6,
    elementwise_s=1.05e-6,
    gap_s=0.5911e-6,
    tile_keys=448,
    prompt_key_s=27.07e-9,
    logit_s=3.114e-12,
    greedy_logit_s=7.007e-13,
    idle_s=0.3e-3,
    host_step_s=247.4e-6,
    host_sequence_s=5.101e-6,
    host_request_s=24.82e-6,
    host_token_s=80.01e-9,
    host_admit_token_s=91.79e-9,
    eager_launch_s=6e-6,
    frontend_latency_s=0.6309e-3,
    frontend_request_s=590.8e-6,
    frontend_token_s=315.9e-9,
    frontend_message_s=165e-6,
    frontend_told_s=6.079e-6,
    frontend_event_s=28.73e-6,
    tokenize_token_s=632.2e-9,
    client_request_s=244.9e-6,
    client_message_s=100e-6,
    client_event_s=15.92e-6,
)

# A rough guess beside 2026-11-20-cpu-torch.json (SmolLM2-135M, two cores): one stream is right, batches come out 20 to 40 %
# too fast, because the model knows no cost for each sequence, and prompts 30 % too slow.
CPU_CALIBRATION = Calibration(
    memory=1.0,
    product=1.0,
    burst_product=1.0,
    burst_s=0.0,
    overlap=1.0,
    attention=0.5,
    elementwise=0.5,
    product_s=40e-6,
    one_token_product_s=40e-6,
    attention_s=60e-6,
    elementwise_s=12e-6,
    gap_s=0.0,
    tile_keys=64,
    prompt_key_s=0.0,
    logit_s=4e-9,
    greedy_logit_s=5e-10,
    idle_s=0.0,
    host_step_s=60e-6,
    host_sequence_s=2e-6,
    host_request_s=28.13e-6,
    host_token_s=104.3e-9,
    host_admit_token_s=96.46e-9,
    eager_launch_s=0.0,
    frontend_latency_s=0.6e-3,
    frontend_request_s=333.5e-6,
    frontend_token_s=139.3e-9,
    frontend_message_s=165e-6,
    frontend_told_s=0.0,
    frontend_event_s=25.14e-6,
    tokenize_token_s=242.5e-9,
    client_request_s=162.1e-6,
    client_message_s=100e-6,
    client_event_s=14.94e-6,
)


def _card(name: str, gigabytes: float, is_calibrated: bool = False) -> Hardware:
    return Hardware(name, int(gigabytes * GB), *DATA_SHEETS[name], H200_CALIBRATION, is_calibrated)


PROFILES: dict[str, Hardware] = {
    profile.name: profile
    for profile in (
        _card("a10g", 24),
        _card("l4", 24),
        _card("a100", 80),
        _card("h100", 80),
        _card("h200", 141, is_calibrated=True),
        _card("rtx4090", 24),
        # Two cores of an AMD EPYC; the two rates are measured, as no data sheet speaks of two cores.
        Hardware("cpu", 16 * GB, 35e9, 500e9, CPU_CALIBRATION, False, False, 0, 16, 2048),
    )
}


def find_hardware(name: str) -> Hardware:
    if name not in PROFILES:
        raise ConfigError(f"gpu={name!r} is not one of {', '.join(PROFILES)}{did_you_mean(name, PROFILES)}")
    return PROFILES[name]
