"""Every family at toy size against Transformers: same logits, however the tokens are cut, cached and mixed."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models.toys import Driver, Toy, load_toy, make_toy

from nanovllm.errors import UnsupportedArchitecture, UnsupportedConfigValue, WeightMismatch
from nanovllm.loaders.checkpoint import open_checkpoint
from nanovllm.models.registry import read_model_spec

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 24}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, no groups": ("llama", {"num_key_value_heads": 6, "rope_theta": 500_000.0}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
}
PROMPT = torch.randint(0, 97, (45,), generator=torch.Generator().manual_seed(1)).tolist()
OTHER = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(2)).tolist()


@cache
def toy(variant: str) -> Toy:
    family, changes = VARIANTS[variant]
    return make_toy(family, **changes)


def blocks_for(num_tokens: int, block_size: int, seed: int = 0, among: int = 64) -> list[int]:
    """Enough block ids, in an order that has nothing to do with their places."""
    return torch.randperm(among, generator=torch.Generator().manual_seed(seed)).tolist()[: -(-num_tokens // block_size)]


def check_prompt(toy: Toy, token_ids: list[int], **tolerance: float) -> None:
    driver = Driver(load_toy(toy.folder))
    driver.seat(3, token_ids, blocks_for(len(token_ids), 4))
    (logits,) = driver.step((3, 0, len(token_ids)))
    torch.testing.assert_close(logits, toy.logits(token_ids), **(tolerance or TOLERANCE))


@pytest.mark.parametrize("variant", VARIANTS)
class TestLogits:
    def test_of_a_whole_prompt(self, variant):
        expected = toy(variant).logits(PROMPT)
        assert 0.5 < expected.std() < 20, "a toy whose logits are all alike would prove nothing"
        check_prompt(toy(variant), PROMPT)

    @pytest.mark.parametrize("chunk_size", [1, 7, 16])
    def test_of_a_chunked_prompt(self, variant, chunk_size):
        driver = Driver(load_toy(toy(variant).folder))
        driver.seat(0, PROMPT, blocks_for(len(PROMPT), 4))
        starts = range(0, len(PROMPT), chunk_size)
        logits = torch.cat([driver.step((0, start, min(chunk_size, len(PROMPT) - start)))[0] for start in starts])
        torch.testing.assert_close(logits, toy(variant).logits(PROMPT), **TOLERANCE)

    def test_of_a_batch_that_mixes_prompt_chunks_and_decoding_rows_on_a_shared_prefix(self, variant):
        """Row 5 computes 20 tokens; rows 2 and 7 continue from 16 of them through their block tables."""
        driver = Driver(load_toy(toy(variant).folder), num_blocks=80)
        shared = blocks_for(20, 4)
        left, right = PROMPT[:16] + OTHER[:9], PROMPT[:16] + OTHER[9:22]
        driver.seat(5, PROMPT, [*shared, *range(64, 71)])
        driver.step((5, 0, 20))
        driver.seat(2, left, [*shared[:4], 71, 72, 73])
        driver.seat(7, right, [*shared[:4], 74, 75, 76, 77])
        driver.seat(0, OTHER, [*blocks_for(52, 4)[5:13]])
        first = driver.step((2, 16, 8), (5, 20, 1), (0, 0, 5), (7, 16, 1))
        second = driver.step((7, 17, 12), (2, 24, 1), (5, 21, 24), (0, 5, 1))
        got = {2: (first[0], second[1]), 5: (first[1], second[2]), 0: (first[2], second[3]), 7: (first[3], second[0])}
        for row, tokens, start in ((2, left, 16), (5, PROMPT, 20), (0, OTHER[:6], 0), (7, right, 16)):
            expected = toy(variant).logits(tokens)[start:]
            torch.testing.assert_close(torch.cat(got[row]), expected, **TOLERANCE)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_every_head_size_and_block_size_gives_the_same_logits(head_dim, block_size):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 4 * head_dim // 2, "intermediate_size": 64}
    checkpoint = _toy_of_head_size(head_dim, tuple(sizes.items()))
    driver = Driver(load_toy(checkpoint.folder), block_size=block_size)
    num_blocks = -(-len(PROMPT) // block_size)
    blocks = blocks_for(64, 1)
    driver.seat(1, PROMPT, blocks[:num_blocks])
    driver.seat(0, OTHER[:15], blocks[num_blocks : num_blocks - (-15 // block_size)])
    parts = driver.step((1, 0, 17), (0, 0, 15)), driver.step((1, 17, 28))
    logits = torch.cat([parts[0][0], parts[1][0]])
    torch.testing.assert_close(logits, checkpoint.logits(PROMPT), **TOLERANCE)


@cache
def _toy_of_head_size(head_dim: int, sizes: tuple[tuple[str, int], ...]) -> Toy:
    return make_toy("llama", head_dim=head_dim, **dict(sizes))


LONG_PROMPT = torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(3)).tolist()
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.8,
    },
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False},
    "yarn, betas": {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 205,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
}


class TestRopeScaling:
    @pytest.mark.parametrize("kind", ROPES)
    @pytest.mark.parametrize("family", ["llama", "qwen3"])
    def test_gives_the_logits_of_transformers(self, family, kind, tmp_path):
        rope = {"rope_theta": 10000.0, **ROPES[kind]}
        toy = make_toy(family, tmp_path, rope_parameters=rope, head_dim=16, num_hidden_layers=1)
        driver = Driver(load_toy(toy.folder), num_blocks=64, max_model_len=256)
        driver.seat(0, LONG_PROMPT, blocks_for(len(LONG_PROMPT), 4))
        (logits,) = driver.step((0, 0, len(LONG_PROMPT)))
        torch.testing.assert_close(logits, toy.logits(LONG_PROMPT), rtol=0, atol=2e-4)
        if kind == "linear":
            unscaled = make_toy(family, tmp_path / "plain", head_dim=16, num_hidden_layers=1)
            assert (unscaled.logits(LONG_PROMPT) - logits).abs().max() > 0.1, "the scaling changes something"

    def test_reads_the_old_spelling_of_the_config_too(self, tmp_path):
        """Checkpoints of before Transformers 5 have rope_theta and rope_scaling, some with `type` for the kind."""
        rope = {"rope_theta": 20000.0, **ROPES["llama3"]}
        toy = make_toy("llama", tmp_path, rope_parameters=rope)
        config = json.loads((tmp_path / "config.json").read_text())
        scaling = config.pop("rope_parameters")
        config["rope_theta"] = scaling.pop("rope_theta")
        scaling["type"] = scaling.pop("rope_type")
        config["rope_scaling"] = scaling
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_prompt(toy, LONG_PROMPT[:100])

    @pytest.mark.parametrize("kind", ["dynamic", "longrope", "ntk", "su", "mrope", "proportional"])
    def test_of_another_kind_is_refused_by_name(self, kind):
        new = {"rope_parameters": {"rope_type": kind, "factor": 2.0}}
        old = {"rope_parameters": None, "rope_scaling": {"type": kind, "factor": 2.0}}
        for spelling in (new, old):
            with pytest.raises(UnsupportedConfigValue, match=f"rope_type={kind!r} is not implemented"):
                read_model_spec(changed_config(**spelling), "toy")

    @pytest.mark.parametrize("kind", ["longrope", "mrope"])
    def test_of_another_kind_is_refused_by_name_also_when_it_has_no_factor(self, kind):
        with pytest.raises(UnsupportedConfigValue, match=f"rope_type={kind!r} is not implemented"):
            read_model_spec(changed_config(rope_parameters={"rope_type": kind}), "toy")

    def test_that_was_added_beside_other_parameters_is_honoured_or_refused(self):
        """What the model cards advise for long contexts: add a rope_scaling to config.json. It may not be dropped."""
        config = changed_config(rope_scaling=ROPES["yarn"])
        assert config["rope_parameters"]["rope_type"] == "default"
        try:
            assert read_model_spec(config, "toy").rope.scaling == "yarn"
        except UnsupportedConfigValue as error:
            assert "rope_scaling" in str(error)

    @pytest.mark.parametrize("key", ["mscale", "mscale_all_dim"])
    def test_of_yarn_with_mscale_is_refused_by_name(self, key):
        with pytest.raises(UnsupportedConfigValue, match=f"{key}=0.7"):
            read_model_spec(changed_config(rope_parameters={**ROPES["yarn"], key: 0.7}), "toy")


def changed_config(variant: str = "llama", **changes: Any) -> dict[str, Any]:
    config = json.loads((toy(variant).folder / "config.json").read_text())
    return {**config, **changes}


class TestRefusals:
    @pytest.mark.parametrize(
        ("variant", "key", "value"),
        [
            ("llama", "hidden_act", "gelu"),
            ("llama", "mlp_bias", True),
            ("llama", "quantization_config", {"quant_method": "awq"}),
            ("llama", "partial_rotary_factor", 0.5),
            ("qwen2", "use_sliding_window", True),
            ("qwen2", "hidden_act", "gelu_pytorch_tanh"),
            ("qwen3", "use_sliding_window", True),
            ("qwen3", "quantization_config", {"quant_method": "fp8"}),
        ],
    )
    def test_a_config_value_that_is_not_implemented_is_named(self, variant, key, value):
        read_model_spec(changed_config(variant), "toy")  # unchanged, it is fine
        with pytest.raises(UnsupportedConfigValue, match=f"toy: {key}="):
            read_model_spec(changed_config(variant, **{key: value}), "toy")

    def test_query_heads_that_cannot_share_their_kv_heads_are_refused(self):
        with pytest.raises(UnsupportedConfigValue, match="6 query heads cannot share 4 key/value heads"):
            read_model_spec(changed_config(num_key_value_heads=4), "toy")

    @pytest.mark.parametrize("architectures", [["MistralForCausalLM"], ["LlamaForSequenceClassification"], [], None, "Llama"])
    def test_an_unknown_architecture_is_refused(self, architectures):
        with pytest.raises(UnsupportedArchitecture, match="rchitecture"):
            read_model_spec(changed_config(architectures=architectures), "toy")

    def test_a_misspelt_architecture_gets_a_suggestion(self):
        with pytest.raises(UnsupportedArchitecture, match="did you mean 'Qwen3ForCausalLM'"):
            read_model_spec(changed_config(architectures=["Qwen3ForCasualLM"]), "toy")


def with_tensors(variant: str, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a toy whose tensors are added, replaced, or (None) left out; dots are written as double underscores."""
    shutil.copytree(toy(variant).folder, folder, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestWeights:
    def test_a_missing_tensor_is_listed(self, tmp_path):
        folder = with_tensors("qwen3", tmp_path, model__layers__1__self_attn__k_norm__weight=None)
        with pytest.raises(WeightMismatch) as caught:
            load_toy(folder)
        assert caught.value.missing == ["model.layers.1.self_attn.k_norm.weight"]
        assert not caught.value.unexpected and not caught.value.wrong_shape

    def test_an_extra_tensor_is_listed(self, tmp_path):
        folder = with_tensors("llama", tmp_path, model__layers__0__self_attn__q_proj__bias=torch.zeros(48))
        with pytest.raises(WeightMismatch, match="model.layers.0.self_attn.q_proj.bias") as caught:
            load_toy(folder)
        assert caught.value.unexpected == ["model.layers.0.self_attn.q_proj.bias"]

    def test_a_tensor_of_the_wrong_shape_is_listed_with_both_shapes(self, tmp_path):
        folder = with_tensors("qwen2", tmp_path, model__layers__0__mlp__down_proj__weight=torch.zeros(100, 48))
        with pytest.raises(WeightMismatch) as caught:
            load_toy(folder)
        assert caught.value.wrong_shape == ["model.layers.0.mlp.down_proj.weight (checkpoint [100, 48], model [48, 100])"]

    def test_an_untied_model_without_a_head_is_refused(self, tmp_path):
        with pytest.raises(WeightMismatch, match="lm_head.weight"):
            load_toy(with_tensors("llama", tmp_path, lm_head__weight=None))

    def test_a_tied_checkpoint_may_carry_a_copy_of_the_head_and_rotary_tables(self, tmp_path):
        names = set(open_checkpoint(toy("llama, tied").folder).weights.names())
        assert "lm_head.weight" not in names
        extra = {"lm_head__weight": torch.zeros(97, 48), "model__layers__0__self_attn__rotary_emb__inv_freq": torch.zeros(4)}
        folder = with_tensors("llama, tied", tmp_path, **extra)
        check_prompt(Toy(folder, toy("llama, tied").oracle), PROMPT)

    def test_a_float32_checkpoint_is_rounded_once_when_it_is_served_in_bfloat16(self):
        model = load_toy(toy("qwen3").folder, torch.bfloat16)
        driver = Driver(model)
        driver.seat(0, PROMPT, blocks_for(len(PROMPT), 4))
        (logits,) = driver.step((0, 0, len(PROMPT)))
        expected = toy("qwen3").logits(PROMPT)
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).std() < 0.05 * expected.std()
