"""LLM: the Python face. Builds an engine from options, and speaks prompts and messages.

from nanovllm import LLM, SamplingParams
llm = LLM()                                     # the embedded default model; or a folder, file or hub id
print(llm.generate(["Hello"], SamplingParams(max_tokens=20))[0].text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.attention.base import AttentionBackend, AttentionSpec
from nanovllm.attention.compiled import CompiledAttention
from nanovllm.attention.select import select_backend
from nanovllm.attention.triton_paged import TritonAttention
from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.door import Prompt
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.policy import make_policy
from nanovllm.engine.scheduler import Scheduler
from nanovllm.errors import NONFINITE_LOGITS, ConfigError, InvalidPrompt, NotFinite, RequestError
from nanovllm.executor.in_process import InProcessExecutor
from nanovllm.kernels.compiles import compile_ahead, watch_compiles
from nanovllm.kernels.cpu.build import best_instruction_set, load_step
from nanovllm.kernels.cpu.library import declare
from nanovllm.loaders.checkpoint import Checkpoint, open_checkpoint
from nanovllm.loaders.load import load_weights
from nanovllm.loaders.weight_source import BlockSource, WeightSource
from nanovllm.log import logger, show_log_unless_configured
from nanovllm.model_spec import ModelSpec
from nanovllm.models.compiled_decoder import CompiledDecoder, Stored, explain_refusal, loaded_bytes, natural_compute
from nanovllm.models.decoder import Decoder
from nanovllm.models.registry import find_family, read_model_spec
from nanovllm.outputs import EmbeddingOutput, GenerationOutput
from nanovllm.parallel.group import ParallelGroup
from nanovllm.platforms.base import DeviceMemory, Platform, select_platform
from nanovllm.platforms.cpu import own_cores, usable_cores
from nanovllm.runner.cuda_graphs import CudaGraphs
from nanovllm.runner.memory_plan import Measured, MemoryPlan, plan_memory
from nanovllm.runner.stopwatch import Stopwatch
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.base import Grammar
from nanovllm.structured.llguidance_backend import LLGuidanceGrammar
from nanovllm.tokenizer import Tokenizer

MAX_MASK_THREADS = 12  # that compute the masks of grammars beside a GPU
GRAPH_BYTES = 512 << 20  # what captured graphs and libraries take beside the pool, at most
Message = dict[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What one step added to one completion."""

    index: int  # which of the n completions
    text: str
    token_ids: list[int]
    finish_reason: str | None  # of the last delta of a completion


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine, and the facts that it was built from."""

    engine: LLMEngine
    config: EngineConfig  # every "auto" decided
    spec: ModelSpec
    memory_plan: MemoryPlan
    weight_bytes: float  # of one weight, mean over the model
    platform: Platform
    eos_token_ids: tuple[int, ...]
    grammar: Grammar | None
    startup: dict[str, float]  # where the seconds went


class LLM:
    """One model, ready to generate. Options: see `EngineConfig`. Errors: `ConfigError`, `ModelError`."""

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        show_log_unless_configured()
        config = EngineConfig.from_options(model=str(model) if isinstance(model, Path) else model, **options)
        built, self.tokenizer = open_engine(config)
        self.engine, self.config, self.spec, self.memory_plan = built.engine, built.config, built.spec, built.memory_plan

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[GenerationOutput]:
        """Complete one prompt or many (strings or token ids); outputs in the order of the prompts.

        `priority` and `cache_salt`: see `LLMEngine.add_request`.
        """
        prompts = _as_list(prompts)
        return self.engine.generate(prompts, sampling_params, priority=priority, cache_salt=cache_salt, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: str = "mean",
        use_tqdm: bool = False,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[EmbeddingOutput]:
        """The vectors of one prompt or many: the mean of the final hidden states of its tokens, or the last one."""
        prompts = _as_list(prompts)
        outputs = self.engine.generate(prompts, priority=priority, cache_salt=cache_salt, pooling=pooling, use_tqdm=use_tqdm)
        for output in outputs:
            if output.completions[0].finish_reason == "error":
                raise NotFinite(f"the vector of {output.request_id}: {NONFINITE_LOGITS}")
        return [EmbeddingOutput(output.embedding or [], len(output.prompt_token_ids)) for output in outputs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        priority: int = 0,
        cache_salt: str = "",
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[GenerationOutput]:
        """Answer one conversation or many, through the model's chat template (see `apply_chat_template`)."""
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise InvalidPrompt(f"messages must be a list of messages, or of conversations, got {type(messages).__name__}")
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [
            self.apply_chat_template(
                conversation,  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.engine.generate(prompts, sampling_params, priority=priority, cache_salt=cache_salt, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> DeltaStream:
        """Complete one prompt, piece by piece. Closing the stream early aborts the request."""
        request_id = self.engine.add_request(prompt, sampling_params, priority=priority, cache_salt=cache_salt)
        return DeltaStream(self.engine, request_id)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, ready to be answered. Raises `InvalidChatTemplate`.

        `add_generation_prompt`: open the answer; None: unless the last message is continued. `chat_template_kwargs`:
        variables that the model's template knows, such as {"enable_thinking": False}.
        """
        if not messages:
            raise RequestError("a conversation needs at least one message")
        text = self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself

    def close(self) -> None:
        """Release the model and its memory. Idempotent."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeltaStream:
    """Iterator over one request's deltas. It turns the engine's loop itself, and so serves other requests along the way."""

    def __init__(self, engine: LLMEngine, request_id: str) -> None:
        self._engine = engine
        self._output = engine.output_of(request_id)  # live: grows whoever turns the loop
        self._seen = [(0, 0, False)] * len(self._output.completions)  # characters, tokens, end: delivered so far
        self._ready: deque[CompletionDelta] = deque()
        self._is_closed = False

    def __iter__(self) -> DeltaStream:
        return self

    def __next__(self) -> CompletionDelta:
        while not self._is_closed:
            self._take_new_parts()
            if self._ready:
                return self._ready.popleft()
            if self._output.finished:
                break
            self._engine.step()
        raise StopIteration

    def _take_new_parts(self) -> None:
        for index, completion in enumerate(self._output.completions):
            num_characters, num_tokens, has_ended = self._seen[index]
            text, token_ids = completion.text[num_characters:], completion.token_ids[num_tokens:]
            reason = None if has_ended else completion.finish_reason
            if text or token_ids or reason:
                self._seen[index] = len(completion.text), len(completion.token_ids), has_ended or reason is not None
                self._ready.append(CompletionDelta(index, text, token_ids, reason))

    def close(self) -> None:
        """Abort what is not finished. Idempotent."""
        if not self._output.finished:
            self._engine.abort(self._output.request_id)
        self._is_closed = True

    def __del__(self) -> None:
        if hasattr(self, "_output") and not self._output.finished:
            self._engine.abort_later(self._output.request_id)  # the collector may strike in the middle of a step


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    is_one = isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int))
    return [prompts] if is_one else prompts  # type: ignore[list-item, return-value]


def open_engine(config: EngineConfig, speaks_text: bool = True) -> tuple[BuiltEngine, Tokenizer]:
    """Find the checkpoint, read it, build the engine. `speaks_text` False: prompts and outputs are token ids only."""
    platform = select_platform(config.device)
    checkpoint = open_checkpoint(config.model, revision=config.revision, hub=config.hub)
    spec = read_model_spec(checkpoint.config, checkpoint.name)
    tokenizer = load_tokenizer(checkpoint)
    eos_token_ids = known_token_ids((*checkpoint.eos_token_ids, *tokenizer.end_token_ids), spec.vocab_size)
    is_cpu = platform.device.type == "cpu"  # whose cores run the model
    threads = 1 if is_cpu else max(1, min(MAX_MASK_THREADS, usable_cores() * 3 // 4))
    grammar = LLGuidanceGrammar(tokenizer, spec.vocab_size, eos_token_ids, threads)
    text = tokenizer if speaks_text else None
    built = build_engine(config, platform, spec, checkpoint.weights, text, eos_token_ids, grammar)
    return built, tokenizer


def known_token_ids(token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Each once, without those that the model cannot produce: a checkpoint's files may disagree about the vocabulary."""
    unknown = [token_id for token_id in token_ids if token_id >= vocab_size]
    if unknown:
        logger.warning("end tokens %s are outside of the vocabulary of %d and are left out", unknown, vocab_size)
    return tuple(dict.fromkeys(token_id for token_id in token_ids if token_id < vocab_size))


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.gguf is not None:
        return Tokenizer.from_gguf(checkpoint.gguf.metadata)
    return Tokenizer.from_folder(checkpoint.path)


def build_engine(
    config: EngineConfig,
    platform: Platform,
    spec: ModelSpec,
    weights: WeightSource,
    tokenizer: Tokenizer | None = None,
    eos_token_ids: Sequence[int] = (),
    grammar: Grammar | None = None,
) -> BuiltEngine:
    """Decide every "auto", plan the memory, load the weights, wire the parts. In this order, so that errors come early."""
    watch = Stopwatch()
    platform.prepare(config.num_threads)
    policy = make_policy(config.scheduling_policy)
    config, plan, dtype = resolve(config, platform, spec, weights)
    watch.lap("plan")
    model = make_model(config, spec, dtype)
    load_weights(model, weights)
    model.finish_loading(platform.device, plan.max_model_len)
    watch.lap("weights")
    attention = AttentionSpec(model.num_heads, model.num_kv_heads, spec.head_dim, plan.block_size)
    is_compiled = isinstance(model, CompiledDecoder)
    backend = CompiledAttention(attention) if is_compiled else select_backend(attention, dtype, platform.device)
    limits = config.scheduler_limits
    runner = ModelRunner(
        model,  # type: ignore[arg-type]  # a CompiledDecoder stands where a Decoder does
        backend,
        [],
        block_size=plan.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=plan.max_model_len,
        device=platform.device,
    )
    runner.sampler.race = model.race if isinstance(model, CompiledDecoder) else None
    if isinstance(backend, TritonAttention):
        plan = warm_up_gpu(runner, backend, config, plan, platform, spec, dtype, watch)
    else:
        runner.kv_caches = make_kv_caches(platform, backend, plan, spec, dtype)
    logger.info("memory plan, %s on %s\n%s", config.dtype, platform.describe(), plan.describe())
    logger.info("ready: %s", watch.describe())
    scheduler = Scheduler(BlockManager(plan.num_blocks, plan.block_size, config.enable_prefix_caching), limits, policy)
    engine = LLMEngine(
        scheduler,
        InProcessExecutor(runner),
        vocab_size=spec.vocab_size,
        max_model_len=plan.max_model_len,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        grammar=grammar,
        num_steps_ahead=config.num_steps_ahead or 0,
        seed=config.seed,
    )
    weight_bytes = model.bytes_per_weight if is_compiled else dtype.itemsize
    return BuiltEngine(engine, config, spec, plan, weight_bytes, platform, tuple(eos_token_ids), grammar, watch.laps)


def make_model(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> Decoder | CompiledDecoder:
    """Of a resolved config."""
    library = None if config.cpu_compute == "torch" else load_step()
    if library is not None:
        num_threads = torch.get_num_threads()
        cores = own_cores(num_threads) if config.cpu_pin_threads else None
        pinned = f", threads on the cores {cores}" if cores else ""
        instructions = declare(library).nanovllm_instruction_set().decode()
        logger.info("compiled step: %s weights, %s instructions%s", config.cpu_compute, instructions, pinned)
        return CompiledDecoder(spec, config.cpu_compute, dtype, library, num_threads, cores)
    if config.cpu_pin_threads:
        raise ConfigError(
            "cpu_pin_threads=True needs the compiled step, and torch computes here: by cpu_compute='torch', or because the "
            "device, the dtype, the model or a missing compiler leaves nothing else (docs/cpu-step.md)"
        )
    return find_family(spec.architecture)(spec, ParallelGroup(), dtype)


def stored_tensors(weights: WeightSource) -> Stored:
    """Shape and type of each, without reading data."""
    blocks = weights if isinstance(weights, BlockSource) else None
    return {name: (weights.shape(name), blocks.type_name(name) if blocks else "") for name in weights.names()}


def resolve_cpu_compute(config: EngineConfig, platform: Platform, spec: ModelSpec, stored: Stored) -> str:
    """The form of the weights; "torch" also where the compiled step cannot be built here, which gets a log line.

    "auto" is the compiled step where this processor has its instructions, in the form of the file's weights; a dtype that
    is asked for is kept: float32 by torch, bfloat16 by weights in bfloat16. A refusal comes before anything is loaded.
    """
    compute, is_auto = config.cpu_compute, config.cpu_compute == "auto"
    if compute == "torch":
        return "torch"
    refusal = "the device is not a CPU" if platform.device.type != "cpu" else explain_refusal(spec)
    if refusal is not None and not is_auto:
        raise ConfigError(f"cpu_compute={compute!r} cannot run this model: {refusal}; use cpu_compute='torch'")
    if is_auto:
        if refusal is not None or config.dtype == "float32" or best_instruction_set() == "portable":
            return "torch"
        compute = natural_compute(stored) if config.dtype == "auto" else "bf16"
    return compute if load_step() is not None else "torch"


def make_kv_caches(
    platform: Platform, backend: AttentionBackend, plan: MemoryPlan, spec: ModelSpec, dtype: torch.dtype
) -> list[torch.Tensor]:
    return [platform.zeros(backend.kv_cache_shape(plan.num_blocks), dtype) for _ in range(spec.num_layers)]


@torch.inference_mode()
def warm_up_gpu(
    runner: ModelRunner,
    backend: TritonAttention,
    config: EngineConfig,
    plan: MemoryPlan,
    platform: Platform,
    spec: ModelSpec,
    dtype: torch.dtype,
    watch: Stopwatch,
) -> MemoryPlan:
    """Measure the largest step, size the KV cache by what is left, compile every kernel, capture the graphs."""
    limits = config.scheduler_limits
    graphs = CudaGraphs(
        runner.forward_step,
        backend,
        runner.state,
        max_num_seqs=limits.max_num_seqs,
        max_tokens=limits.max_num_batched_tokens,
        max_in_flight=(config.num_steps_ahead or 0) + 2,
        vocab_size=spec.vocab_size,
    )
    runner.kv_caches = [torch.zeros(backend.kv_cache_shape(1), dtype=dtype, device=platform.device)] * spec.num_layers

    def run_all_kernels() -> None:
        graphs.warm_up()
        runner.sampler.warm_up(dtype)

    compile_ahead(run_all_kernels)
    watch.lap("kernels")
    activations = graphs.peak_bytes()
    taken = plan.free - platform.memory().free
    # The largest step's temporaries are there twice: the allocator keeps one set, the graphs' pool another.
    measured = Measured(max(taken, 0), activations * (1 if config.enforce_eager else 2) + GRAPH_BYTES)
    plan = make_plan(config, spec, dtype, platform, DeviceMemory(plan.total, plan.free), measured)
    watch.lap("largest step")
    runner.kv_caches = make_kv_caches(platform, backend, plan, spec, dtype)
    run_all_kernels()
    watch.lap("first steps")
    if not config.enforce_eager:
        graphs.capture_all()
        runner.graphs = graphs
        watch.lap("graphs")
    runner.late_compiles = watch_compiles()
    return plan


def make_plan(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    platform: Platform,
    memory: DeviceMemory,
    measured: Measured | None = None,
    packed_weights: int | None = None,
) -> MemoryPlan:
    return plan_memory(
        spec,
        config,
        bytes_per_value=dtype.itemsize,
        total=memory.total,
        free=memory.free,
        max_default_kv=platform.max_default_kv_bytes(),
        measured=measured,
        packed_weights=packed_weights,
    )


def resolve(
    config: EngineConfig, platform: Platform, spec: ModelSpec, weights: WeightSource
) -> tuple[EngineConfig, MemoryPlan, torch.dtype]:
    """A new config with nothing left to decide, the memory plan, and the dtype as torch has it."""
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise ConfigError(f"max_model_len={config.max_model_len} is more than the model's context of {spec.max_position} tokens")
    dtype = platform.default_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.dtype == "float16" and platform.device.type == "cpu":
        raise ConfigError("dtype='float16' is not supported on a CPU; use 'bfloat16', 'float32' or 'auto'")
    token_budget = config.max_num_batched_tokens or platform.default_token_budget
    steps_ahead = platform.default_steps_ahead if config.num_steps_ahead is None else config.num_steps_ahead
    share = config.gpu_memory_utilization or platform.default_memory_share
    stored = stored_tensors(weights)
    compute = resolve_cpu_compute(config, platform, spec, stored)
    packed_weights = None if compute == "torch" else loaded_bytes(spec, compute, stored)
    config = config.with_changes(
        dtype=str(dtype).removeprefix("torch."),
        device=platform.device.type,
        block_size=config.block_size or platform.default_block_size,
        max_num_batched_tokens=token_budget,
        max_num_seqs=config.max_num_seqs or platform.default_max_num_seqs,
        num_steps_ahead=steps_ahead,
        gpu_memory_utilization=share,
        cpu_compute=compute,
    )
    plan = make_plan(config, spec, dtype, platform, platform.memory(), packed_weights=packed_weights)
    if config.max_model_len is None and plan.max_model_len < spec.max_position:
        held, allowed = plan.max_model_len, spec.max_position
        logger.info("max_model_len is %d, not the model's %d: that is what the cache holds", held, allowed)
    return config.with_changes(max_model_len=plan.max_model_len), plan, dtype
