from __future__ import annotations

import pytest
import torch

from nanovllm.errors import WeightMismatch
from nanovllm.layers.weight_slot import WeightSlot
from nanovllm.loaders.checkpoint import Checkpoint
from nanovllm.loaders.load import load_weights
from nanovllm.loaders.weight_source import RandomWeights, WeightSource


class ToyModel:
    """One parameter for each slot; a tied head is ignored."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        self.parameters = {name: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in shapes.items()}

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {name: WeightSlot(tuple(parameter.shape), parameter.copy_) for name, parameter in self.parameters.items()}

    def is_ignored_weight(self, name: str) -> bool:
        return name == "lm_head.weight"


class RefusesToLoad(RandomWeights):
    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was loaded")


SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (3, 4), "b.bias": (5,), "norm.weight": (4,)}


def test_every_parameter_is_filled_from_the_source() -> None:
    model, source = ToyModel(SHAPES), RandomWeights(SHAPES, seed=1)
    steps: list[tuple[int, int]] = []
    load_weights(model, source, progress=lambda done, total: steps.append((done, total)))
    for name, parameter in model.parameters.items():
        assert torch.equal(parameter, source.load(name))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_ignored_tensors_are_not_loaded() -> None:
    model = ToyModel({"norm.weight": (4,)})
    source = RandomWeights({"norm.weight": (4,), "lm_head.weight": (10, 10)})
    load_weights(model, source)
    assert model.parameters["norm.weight"].tolist() == [1, 1, 1, 1]


def test_all_disagreements_are_raised_together_before_anything_is_loaded() -> None:
    source = RefusesToLoad({"a.weight": (4, 3), "b.bias": (5, 1), "extra": (1,), "lm_head.weight": (1,)})
    with pytest.raises(WeightMismatch) as caught:
        load_weights(ToyModel({**SHAPES, "c.weight": (1,)}), source)
    error = caught.value
    assert error.missing == ["c.weight", "norm.weight"]
    assert error.unexpected == ["extra"]
    assert error.wrong_shape == ["a.weight (checkpoint [4, 3], model [3, 4])", "b.bias (checkpoint [5, 1], model [5])"]


def test_random_weights_depend_on_name_and_seed_but_not_on_order() -> None:
    first, second = RandomWeights(SHAPES, seed=1), RandomWeights(dict(reversed(SHAPES.items())), seed=1)
    for name in SHAPES:
        assert torch.equal(first.load(name), second.load(name))
    assert not torch.equal(first.load("a.weight"), RandomWeights(SHAPES, seed=2).load("a.weight"))
    twins = RandomWeights({"x": (1000,), "y": (1000,)})
    assert not torch.equal(twins.load("x"), twins.load("y"))
    assert twins.load("x").std().item() == pytest.approx(0.02, rel=0.1)
    assert first.load("norm.weight").tolist() == [1, 1, 1, 1]


def test_the_demo_model_loads_into_bfloat16_parameters(demo: Checkpoint) -> None:
    source: WeightSource = demo.weights
    model = ToyModel({name: source.shape(name) for name in source.names()}, torch.bfloat16)
    load_weights(model, source)
    for name in ("model.embed_tokens.weight", "model.layers.29.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(model.parameters[name], source.load(name).bfloat16())
