"""CompiledDecoder: the decoder of every family, computed by kernels/cpu/step.cpp in one call a step.

Stands where a `Decoder` stands: takes the same checkpoint tensors, runs with the same context, returns the same states
(float32). It packs each tensor as it arrives, so that loading needs the packed size plus one tensor. What it cannot
compute, `explain_refusal` says before anything is loaded. Read next: docs/cpu-step.md.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.attention.base import AttentionInputs
from nanovllm.errors import ConfigError
from nanovllm.forward_context import ForwardContext
from nanovllm.kernels.cpu.library import MATRICES, VECTORS, Draw, Layer, Matrix, Model, Step, address, declare
from nanovllm.kernels.cpu.packing import (
    KIND_OF_BLOCKS,
    PACK_BLOCKS,
    Kind,
    PackedMatrix,
    pack_bfloat16,
    pack_in_slices,
    pack_int4_group,
    pack_int8_group,
    packed_size,
)
from nanovllm.layers.rotary import RotaryTable
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.model_spec import ModelSpec

# How floats are packed: (a layer's matrices, embedding and head); and which stored GGUF blocks are taken as they are.
KINDS = {
    "bf16": (Kind.BFLOAT16, Kind.BFLOAT16),
    "int8": (Kind.INT8_GROUP, Kind.INT8_GROUP),
    "int4": (Kind.INT4_GROUP, Kind.INT8_GROUP),
}
PACKERS = {Kind.BFLOAT16: pack_bfloat16, Kind.INT8_GROUP: pack_int8_group, Kind.INT4_GROUP: pack_int4_group}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
FLOATS = {"", "F32", "F16", "BF16"}
NATIVE_BLOCKS = {"bf16": (), "int8": ("Q8_0",), "int4": ("Q8_0", "Q4_0", "Q4_1")}
Stored = Mapping[str, tuple[tuple[int, ...], str]]  # a checkpoint's tensors: name -> (shape, GGUF type, or "" in other files)
CHECKPOINT_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}


def explain_refusal(spec: ModelSpec) -> str | None:
    """Why the compiled step cannot run this model; None: it can."""
    if spec.head_dim % 16:
        return f"its head size is {spec.head_dim}, and the compiled step needs a multiple of 16"
    return None


def natural_compute(stored: Stored) -> str:
    """The form that keeps what a checkpoint stores: "int4" where its layers are all of 4 bits in groups of 32, or Q8_0;
    "int8" for other quantised files; "bf16" for floats. docs/decisions/0009-the-compiled-step-by-default.md has the reasons.
    """
    types = {type_name for name, (shape, type_name) in stored.items() if len(shape) == 2 and name not in TABLES}
    if types <= FLOATS:
        return "bf16"
    return "int4" if types <= set(NATIVE_BLOCKS["int4"]) and types != {"Q8_0"} else "int8"


def loaded_bytes(spec: ModelSpec, compute: str, stored: Stored) -> int:
    """What the weights will take, known before they are read."""
    total = 0
    for name, (shape, type_name) in stored.items():
        if len(shape) == 1:
            total += 4 * shape[0]  # norms and biases, float32
        elif len(shape) == 2 and (name != "lm_head.weight" or not spec.tie_word_embeddings):
            is_native = type_name in NATIVE_BLOCKS[compute]
            kind = KIND_OF_BLOCKS[type_name] if is_native else KINDS[compute][name in TABLES]
            total += packed_size(kind, *shape)
    return total


class CompiledDecoder:
    def __init__(
        self,
        spec: ModelSpec,
        compute: str,
        dtype: torch.dtype,
        library: ctypes.CDLL,
        num_threads: int,
        cores: Sequence[int] | None = None,
    ) -> None:
        """`compute`: "bf16", "int8" or "int4", the form of the weights; `dtype`: of the KV cache, float32 or bfloat16.

        `cores`: one for each thread to stay on, the caller's first.
        """
        self.spec, self.compute, self.dtype = spec, compute, dtype
        self.num_heads, self.num_kv_heads = spec.total_num_heads, spec.total_num_kv_heads
        self.rotary: RotaryTable | None = None
        self._library, self._num_threads, self._cores = declare(library), num_threads, cores
        self._matrices: dict[str, PackedMatrix] = {}  # by the checkpoint's name, such as "model.layers.0.mlp.up_proj"
        self._vectors: dict[str, Tensor] = {}  # norms and biases, float32
        self._caches: list[Tensor] = []  # those that the layers point to
        self._layers = (Layer * spec.num_layers)()
        self._handle: int | None = None

    # --- loading

    def weight_slots(self) -> dict[str, WeightSlot]:
        return dict(self._iter_weight_slots())

    def is_ignored_weight(self, name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.spec.tie_word_embeddings)

    def _iter_weight_slots(self) -> Iterator[tuple[str, WeightSlot]]:
        spec = self.spec
        shapes = self._layer_shapes()
        for name in ("model.embed_tokens",) if spec.tie_word_embeddings else ("model.embed_tokens", "lm_head"):
            yield self._matrix_slot(name, (spec.vocab_size, spec.hidden_size))
        for number in range(spec.num_layers):
            for part, shape in shapes.items():
                name = f"model.layers.{number}.{CHECKPOINT_NAMES[part]}"
                yield self._matrix_slot(name, shape) if len(shape) == 2 else self._vector_slot(f"{name}.weight", shape)
                if (spec.qkv_bias and part in ("query", "key", "value")) or (spec.output_bias and part == "output"):
                    yield self._vector_slot(f"{name}.bias", shape[:1])
        yield self._vector_slot("model.norm.weight", (spec.hidden_size,))

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors of a layer: matrices [num_out, num_in], norms [size]."""
        spec, hidden = self.spec, self.spec.hidden_size
        query_size, kv_size = self.num_heads * spec.head_dim, self.num_kv_heads * spec.head_dim
        head_norms: dict[str, tuple[int, ...]] = {"query_norm": (spec.head_dim,), "key_norm": (spec.head_dim,)}
        return {
            "query": (query_size, hidden),
            "key": (kv_size, hidden),
            "value": (kv_size, hidden),
            "output": (hidden, query_size),
            "gate": (spec.intermediate_size, hidden),
            "up": (spec.intermediate_size, hidden),
            "down": (hidden, spec.intermediate_size),
            "input_norm": (hidden,),
            "post_norm": (hidden,),
            **(head_norms if spec.qk_norm else {}),
        }

    def _matrix_slot(self, name: str, shape: tuple[int, ...]) -> tuple[str, WeightSlot]:
        pack_floats = PACKERS[KINDS[self.compute][f"{name}.weight" in TABLES]]

        def load(tensor: Tensor) -> None:
            self._matrices[name] = pack_in_slices(pack_floats, tensor)

        def load_blocks(raw: np.ndarray, type_name: str) -> None:
            self._matrices[name] = PACK_BLOCKS[type_name](raw)

        return f"{name}.weight", WeightSlot(shape, load, NATIVE_BLOCKS[self.compute], load_blocks)

    def _vector_slot(self, name: str, shape: tuple[int, ...]) -> tuple[str, WeightSlot]:
        def load(tensor: Tensor) -> None:
            self._vectors[name] = tensor.float().clone()

        return name, WeightSlot(shape, load)

    def finish_loading(self, device: torch.device, max_model_len: int) -> None:
        """Point the structures of the C side at the packed weights."""
        spec = self.spec
        self.rotary = RotaryTable(spec.rope, spec.head_dim, max_model_len, dtype=torch.float32, device=device)
        for number, layer in enumerate(self._layers):
            prefix = f"model.layers.{number}."
            for part in MATRICES:
                setattr(layer, part, Matrix.of(self._matrices[prefix + CHECKPOINT_NAMES[part]]))
            self._merge_qkv_bias(prefix)
            for part in VECTORS:
                name = f"{CHECKPOINT_NAMES[part]}.weight" if part in CHECKPOINT_NAMES else part
                name = "self_attn.o_proj.bias" if part == "output_bias" else name
                setattr(layer, part, address(self._vectors.get(prefix + name)))

    def _merge_qkv_bias(self, prefix: str) -> None:
        if self.spec.qkv_bias:
            parts = [self._vectors.pop(f"{prefix}self_attn.{part}_proj.bias") for part in "qkv"]
            self._vectors[f"{prefix}qkv_bias"] = torch.cat(parts)

    @property
    def num_bytes(self) -> int:
        """Of the packed weights, norms and biases."""
        vectors = sum(vector.nbytes for vector in self._vectors.values())
        return sum(matrix.num_bytes for matrix in self._matrices.values()) + vectors

    @property
    def bytes_per_weight(self) -> float:
        """Mean over the packed weights, with their scales and padding."""
        return self.num_bytes / sum(matrix.num_out * matrix.num_in for matrix in self._matrices.values())

    # --- running

    def __call__(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """input_ids: [N] int32 -> final hidden states of the tokens asked for, [num_needed or N, hidden_size] float32."""
        if self._caches is not context.kv_caches:
            self._attach(context.kv_caches, context.attention_plan.block_tables)
        plan: AttentionInputs = context.attention_plan
        num_tokens = len(input_ids)
        needed = torch.arange(num_tokens) if context.needed_tokens is None else context.needed_tokens
        hidden = torch.empty(len(needed), self.spec.hidden_size)
        starts, lengths, rows = (np.array(numbers, dtype=np.int32) for numbers in (plan.starts, plan.lengths, plan.rows))
        cos, signed_sin = (table.contiguous() for table in context.rotary)
        step = Step(num_tokens, len(rows), len(needed), plan.block_tables.shape[1])
        step.token_ids, step.slots = address(input_ids.contiguous()), address(context.slot_mapping)
        step.cos, step.signed_sin = address(cos), address(signed_sin)
        step.starts, step.lengths, step.rows = starts.ctypes.data, lengths.ctypes.data, rows.ctypes.data
        step.block_tables, step.needed, step.hidden = address(plan.block_tables), address(needed), address(hidden)
        assert input_ids.dtype == torch.int32 and plan.block_tables.dtype == torch.int32
        self._library.nanovllm_forward(self._handle, ctypes.byref(step))
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] float32 -> [n, vocab_size] float32."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.spec.vocab_size)
        self._library.nanovllm_logits(self._handle, address(hidden), len(hidden), address(logits))
        return logits

    def race(
        self,
        logits: Tensor,
        hashes: Tensor,
        keys: Tensor,
        inverse_temperature: Tensor,
        top_p: Tensor,
        top_k: Tensor,
        min_p: Tensor | None,
        masks: Tensor | None,
        mask_lines: Tensor | None,
    ) -> Tensor:
        """A `sampling.draw.Race`: the tokens that the noise of `gumbel.py` draws, one row to a thread: [n] int64.

        logits: [n, vocab_size] float32; hashes: [vocab_size] int32; keys: [n] int32; the limits: [n, 1] float32, top_k int64;
        masks: [m, num_mask_words] int32; mask_lines: [n] int32, -1 for a row without one.
        """
        assert logits.dtype == torch.float32 and hashes.dtype == keys.dtype == torch.int32 and top_k.dtype == torch.int64
        token_ids = torch.empty(len(logits), dtype=torch.int64)
        logits = logits.contiguous()
        operands = (logits, hashes, keys, inverse_temperature, top_p, top_k, min_p, masks, mask_lines, token_ids)
        draw = Draw(len(logits), logits.shape[1], *map(address, operands))
        self._library.nanovllm_draw(self._handle, ctypes.byref(draw))
        return token_ids

    def _attach(self, kv_caches: list[Tensor], block_tables: Tensor) -> None:
        """The caches are made after the weights are loaded; the first step brings them."""
        spec = self.spec
        for layer, cache in zip(self._layers, kv_caches, strict=True):
            layer.kv_cache = address(cache)
        self._caches = kv_caches
        _, _, num_blocks, block_size, _ = kv_caches[0].shape
        model = Model(spec.hidden_size, spec.intermediate_size, spec.num_layers, self.num_heads)
        model.num_kv_heads, model.head_dim, model.block_size = self.num_kv_heads, spec.head_dim, block_size
        model.kv_is_bfloat16, model.num_blocks, model.norm_eps = self.dtype == torch.bfloat16, num_blocks, spec.norm_eps
        embedding = self._matrices["model.embed_tokens"]
        model.embedding = Matrix.of(embedding)
        model.head = Matrix.of(self._matrices.get("lm_head", embedding))
        model.final_norm, model.layers = address(self._vectors["model.norm.weight"]), self._layers
        self.close()
        self._handle = self._library.nanovllm_create(ctypes.byref(model), self._num_threads)
        self._destroy: Any = weakref.finalize(self, self._library.nanovllm_destroy, self._handle)
        if self._cores is not None:
            self._pin(self._cores)

    def _pin(self, cores: Sequence[int]) -> None:
        assert len(cores) == self._num_threads
        if not self._library.nanovllm_pin(self._handle, (ctypes.c_int32 * len(cores))(*cores)):
            raise ConfigError(f"cpu_pin_threads=True: the system does not let threads stay on the cores {list(cores)}")

    def close(self) -> None:
        """End the threads. Happens by itself when the decoder is forgotten."""
        if self._handle is not None:
            self._destroy()
            self._handle = None
