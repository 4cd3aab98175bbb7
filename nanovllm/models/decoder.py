"""Decoder: the shape that most families share. Pre-norm, rotary, grouped-query attention, SwiGLU.

A family file (`llama.py`, `qwen2.py`, `qwen3.py`) says how to read its config and nothing else; what differs between
families is a property of the ModelSpec. Module and tensor names are those of the checkpoints.
N is the number of tokens of the step, all sequences flat in one dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nanovllm.forward_context import ForwardContext
from nanovllm.kernels.activation import silu_and_mul
from nanovllm.kernels.one_token import can_fuse, norm_product, product_add, silu_product_add
from nanovllm.layers.embedding import OutputHead, VocabEmbedding, VocabTable
from nanovllm.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from nanovllm.layers.norm import QKNorm, RMSNorm
from nanovllm.layers.rotary import RotaryTable
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.model_spec import ConfigReader, ModelSpec
from nanovllm.parallel.group import ParallelGroup


class Attention(nn.Module):
    """Project, turn, remember, attend, project."""

    def __init__(self, spec: ModelSpec, layer: int, group: ParallelGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, spec.head_dim
        self.qkv_proj = QKVLinear(
            spec.hidden_size, spec.total_num_heads, spec.total_num_kv_heads, spec.head_dim, group, bias=spec.qkv_bias, dtype=dtype
        )
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        query_size = spec.total_num_heads * spec.head_dim
        self.o_proj = RowParallelLinear("o_proj", query_size, spec.hidden_size, group, bias=spec.output_bias, dtype=dtype)
        norm = (self.num_heads, self.num_kv_heads, spec.head_dim, spec.norm_eps)
        self.qk_norm = QKNorm(*norm, dtype=dtype) if spec.qk_norm else None

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[N, hidden_size] -> [N, hidden_size]."""
        return self.o_proj(self.attend(self.qkv_proj(x), context))

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """[N, (H + 2 K) * D] -> [N, H * D]."""
        query = self.remember(qkv, context)
        return context.backend.attend(query, context.kv_caches[self.layer], context.attention_plan)

    def remember(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """Keys and values into the cache; returns the turned queries, [N, H, D]."""
        heads = qkv.view(len(qkv), -1, self.head_dim)  # [N, H + 2 K, D]
        head_norm = self.qk_norm.as_head_norm() if self.qk_norm is not None else None
        kv_cache = context.kv_caches[self.layer]
        return context.backend.rotate_and_store(heads, head_norm, context.rotary, kv_cache, context.slot_mapping)


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec, group: ParallelGroup, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = spec.hidden_size, spec.intermediate_size
        self.gate_up_proj = ColumnParallelLinear(["gate_proj", "up_proj"], *sizes, group, bias=False, dtype=dtype)
        self.down_proj = RowParallelLinear("down_proj", sizes[1], sizes[0], group, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden_size] -> [N, hidden_size]."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, layer: int, group: ParallelGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype)
        self.self_attn = Attention(spec, layer, group, dtype)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype)
        self.mlp = FeedForward(spec, group, dtype)

    def forward(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The residual stream is x + residual; each norm adds the two, so that addition and norm can be one kernel."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, context)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual  # type: ignore[return-value]  # a norm always returns one

    def forward_last(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The last layer of a step with prompt chunks: every token leaves its key and value, and only those whose final
        state is asked for go on. Returns x and residual of these, [num_needed, hidden_size]."""
        attention, needed = self.self_attn, context.needed_tokens
        x, residual = self.input_layernorm(x, residual)
        query = attention.remember(attention.qkv_proj(x), context).index_select(0, needed)  # type: ignore[arg-type]
        residual = residual.index_select(0, needed)  # type: ignore[union-attr, arg-type]
        if not len(query):
            return residual, residual
        mixed = context.backend.attend(query, context.kv_caches[attention.layer], context.needed_plan)
        x, residual = self.post_attention_layernorm(attention.o_proj(mixed), residual)
        return self.mlp(x), residual  # type: ignore[return-value]

    def forward_one_token(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The same for a step of one token, with the norms, SiLU and additions inside the products. x: [1, hidden_size]."""
        attention, mlp, norm = self.self_attn, self.mlp, self.input_layernorm
        qkv = norm_product(x, norm.weight, norm.eps, attention.qkv_proj.weight, attention.qkv_proj.bias)  # type: ignore[arg-type]
        x = product_add(attention.attend(qkv, context), attention.o_proj.weight, x)  # type: ignore[arg-type]
        norm = self.post_attention_layernorm
        gate_up = norm_product(x, norm.weight, norm.eps, mlp.gate_up_proj.weight)  # type: ignore[arg-type]
        return silu_product_add(gate_up, mlp.down_proj.weight, x)  # type: ignore[arg-type]


class Decoder(nn.Module):
    """The whole model on one rank: token ids in, hidden states out, logits for the positions that need them."""

    def __init__(self, spec: ModelSpec, group: ParallelGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.group, self.dtype = spec, group, dtype
        self.embed_tokens = VocabEmbedding(spec.vocab_size, spec.hidden_size, group, dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer, group, dtype) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype=dtype)
        is_tied = spec.tie_word_embeddings
        table = self.embed_tokens if is_tied else VocabTable(spec.vocab_size, spec.hidden_size, group, dtype=dtype)
        self.lm_head = OutputHead(table, is_tied)
        self.rotary: RotaryTable | None = None  # made by finish_loading, for the context length that is served

    @staticmethod
    def read_spec(reader: ConfigReader) -> ModelSpec:
        """The family's reading of a checkpoint config."""
        raise NotImplementedError

    @property
    def num_kv_heads(self) -> int:
        """On this rank."""
        return self.layers[0].self_attn.num_kv_heads  # type: ignore[union-attr, return-value]

    @property
    def num_heads(self) -> int:
        """On this rank."""
        return self.layers[0].self_attn.num_heads  # type: ignore[union-attr, return-value]

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """input_ids: [N] -> final hidden states of the tokens that the context asks for, [num_needed or N, hidden_size]."""
        x, residual = self.embed_tokens(input_ids), None
        if context.needed_tokens is None and self.group.size == 1 and not self.spec.output_bias and can_fuse(x):
            for layer in self.layers:
                x = layer.forward_one_token(x, context)  # type: ignore[operator]
            return self.norm(x, None)[0]
        *layers, last = self.layers
        for layer in layers:
            x, residual = layer(x, residual, context)
        x, residual = (last if context.needed_tokens is None else last.forward_last)(x, residual, context)  # type: ignore[operator]
        return self.norm(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size]; the caller picks the positions that need logits."""
        return self.lm_head(hidden)

    # --- loading

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Every checkpoint tensor of this model, by name."""
        return dict(self._iter_weight_slots())

    def _iter_weight_slots(self) -> Iterator[tuple[str, WeightSlot]]:
        yield from self.embed_tokens.weight_slots("model.embed_tokens")
        for number, layer in enumerate(self.layers):
            prefix = f"model.layers.{number}."
            yield from layer.input_layernorm.weight_slots(f"{prefix}input_layernorm")  # type: ignore[union-attr, operator]
            yield from layer.post_attention_layernorm.weight_slots(f"{prefix}post_attention_layernorm")  # type: ignore[union-attr, operator]
            for module in (layer.self_attn.qkv_proj, layer.self_attn.qk_norm, layer.self_attn.o_proj):  # type: ignore[union-attr]
                if module is not None:
                    yield from module.weight_slots(f"{prefix}self_attn.")  # type: ignore[union-attr, operator]
            for module in (layer.mlp.gate_up_proj, layer.mlp.down_proj):  # type: ignore[union-attr]
                yield from module.weight_slots(f"{prefix}mlp.")  # type: ignore[union-attr, operator]
        yield from self.norm.weight_slots("model.norm")
        yield from self.lm_head.weight_slots("lm_head")

    def is_ignored_weight(self, name: str) -> bool:
        """Tensors that some checkpoints carry and nobody reads: rotary tables, and the copy of a tied head."""
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.spec.tie_word_embeddings)

    def finish_loading(self, device: torch.device, max_model_len: int) -> None:
        """Move to the device, let every layer repack itself, make the rotary table."""
        finish: list[Callable[[torch.device], None]] = [
            module.finish_loading  # type: ignore[misc]
            for module in self.modules()
            if module is not self and hasattr(module, "finish_loading") and not isinstance(module, OutputHead)
        ]
        for one in [*finish, self.lm_head.finish_loading]:
            one(device)
        self.rotary = RotaryTable(self.spec.rope, self.spec.head_dim, max_model_len, dtype=self.dtype, device=device)
