"""Each kernel against its torch twin, over shapes, dtypes and ragged edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanovllm.attention.base import AttentionInputs, AttentionSpec, HeadNorm, Rotary
from nanovllm.attention.torch_reference import TorchAttention
from nanovllm.attention.triton_paged import TritonAttention
from nanovllm.kernels import activation, one_token, rms_norm
from nanovllm.kernels.compiles import watch_compiles
from nanovllm.kernels.draw_token import draw_tokens
from nanovllm.kernels.draw_top_p import draw_within_top_p
from nanovllm.kernels.gather_inputs import gather_inputs
from nanovllm.sampling import filters
from nanovllm.sampling.gumbel import draw_keys, exponential_noise, stream_of, token_hashes

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual.float()).all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


class TestAttention:
    @pytest.mark.parametrize(
        ("heads", "head_dim", "block_size", "dtype"),
        [  # every head size, block size, group size and dtype, and both ways of loading keys; compiling costs seconds each
            ((16, 8), 128, 64, torch.bfloat16),
            ((16, 8), 128, 16, torch.bfloat16),
            ((16, 8), 128, 64, torch.float32),
            ((32, 8), 128, 128, torch.bfloat16),
            ((28, 4), 128, 32, torch.bfloat16),
            ((9, 3), 64, 64, torch.bfloat16),
            ((9, 3), 64, 16, torch.float32),
            ((14, 2), 80, 64, torch.bfloat16),
            ((8, 8), 96, 32, torch.bfloat16),
            ((8, 1), 96, 64, torch.float32),
            ((8, 2), 256, 64, torch.bfloat16),
            ((8, 2), 256, 16, torch.bfloat16),
            ((4, 4), 64, 128, torch.float16),
        ],
        ids=str,
    )
    def test_mixed_ragged_batches_equal_the_twin(self, device, heads, head_dim, block_size, dtype):
        spec = AttentionSpec(*heads, head_dim, block_size)
        starts, lengths = [0, 37, 5, 699, 0, 64, 33, 1999, 130], [50, 1, 20, 1, 1, 1, 300, 1, 17]
        rows = [3, 0, 8, 1, 7, 2, 6, 4, 5]
        num_blocks = sum(-(-(s + n) // block_size) for s, n in zip(starts, lengths)) + 4
        free = iter(torch.randperm(num_blocks).tolist())
        tables = torch.zeros(10, -(-2000 // block_size), dtype=torch.int32)
        for row, start, length in zip(rows, starts, lengths):
            for index in range(-(-(start + length) // block_size)):
                tables[row, index] = next(free)
        fast, slow = TritonAttention(spec, dtype, device), TorchAttention(spec, torch.float32, device)
        cache = torch.randn(fast.kv_cache_shape(num_blocks), device=device).to(dtype)
        query = torch.randn(sum(lengths), heads[0], head_dim, device=device).to(dtype)
        inputs = AttentionInputs(starts, lengths, rows, tables.to(device))
        expected = slow.attend(query.float(), cache.permute(0, 2, 1, 3, 4).contiguous().float(), slow.plan(inputs))
        for _ in range(2):  # twice: the arrival counters must be left at zero
            assert error(fast.attend(query, cache, fast.plan(inputs)), expected) < TOLERANCE[dtype]

    @pytest.mark.parametrize("num_sequences", [1, 2, 7, 64, 256])
    def test_split_contexts_are_combined(self, device, num_sequences):
        spec = AttentionSpec(16, 8, 128, 64)
        lengths = np.random.default_rng(0).integers(1, 3000, num_sequences).tolist()
        tables = torch.randint(0, 500, (num_sequences, 47), dtype=torch.int32, device=device)
        fast, slow = TritonAttention(spec, torch.bfloat16, device), TorchAttention(spec, torch.float32, device)
        cache = torch.randn(fast.kv_cache_shape(500), device=device, dtype=torch.bfloat16)
        query = torch.randn(num_sequences, 16, 128, device=device, dtype=torch.bfloat16)
        inputs = AttentionInputs([n - 1 for n in lengths], [1] * num_sequences, list(range(num_sequences)), tables)
        expected = slow.attend(query.float(), cache.permute(0, 2, 1, 3, 4).contiguous().float(), slow.plan(inputs))
        assert error(fast.attend(query, cache, fast.plan(inputs)), expected) < 6e-3

    def test_stale_values_do_not_reach_a_sequence(self, device):
        spec = AttentionSpec(4, 2, 64, 64)
        fast = TritonAttention(spec, torch.bfloat16, device)
        tables = torch.arange(2, dtype=torch.int32, device=device)[:, None]
        cache = torch.full(fast.kv_cache_shape(2), math.nan, device=device, dtype=torch.bfloat16)
        cache[:, :, :, :20] = torch.randn(2, 2, 2, 20, 64, device=device)
        query = torch.randn(21, 4, 64, device=device, dtype=torch.bfloat16)
        out = fast.attend(query, cache, fast.plan(AttentionInputs([0, 19], [20, 1], [0, 1], tables)))
        assert torch.isfinite(out).all()

    @pytest.mark.parametrize("num_tokens", [1, 5, 64, 65, 700])
    @pytest.mark.parametrize("has_norm", [True, False])
    @pytest.mark.parametrize("shape", [(16, 8, 128), (9, 3, 64), (7, 1, 80), (32, 8, 96)], ids=str)
    def test_rotate_and_store_equals_the_twin(self, device, shape, has_norm, num_tokens):
        num_heads, num_kv_heads, head_dim = shape
        spec = AttentionSpec(*shape, 16)
        fast, slow = TritonAttention(spec, torch.float32, device), TorchAttention(spec, torch.float32, device)
        heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device)
        angles = torch.rand(num_tokens, 1, head_dim // 2, device=device) * 6
        rotary = Rotary(torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1))
        norm = HeadNorm(torch.rand(num_heads + num_kv_heads, head_dim, device=device), 1e-6) if has_norm else None
        slots = torch.randperm(64 * 16, device=device)[:num_tokens]
        caches = [torch.zeros(backend.kv_cache_shape(64), device=device) for backend in (fast, slow)]
        queries = [b.rotate_and_store(heads, norm, rotary, cache, slots) for b, cache in zip((fast, slow), caches)]
        torch.testing.assert_close(*queries, rtol=0, atol=2e-6)
        torch.testing.assert_close(caches[0].permute(0, 2, 1, 3, 4), caches[1], rtol=0, atol=2e-6)

    @pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
    def test_what_is_not_a_number_does_not_reach_earlier_tokens(self, device, bad):
        """A chunk of 40 tokens, the 30th of which is poisoned; then its slots belong to another sequence."""
        spec = AttentionSpec(4, 2, 64, 16)
        backend = TritonAttention(spec, torch.float32, device)
        heads = torch.randn(40, 8, 64, device=device)
        rotary = Rotary(torch.ones(40, 1, 64, device=device), torch.zeros(40, 1, 64, device=device))
        slots, table = torch.arange(40, device=device), torch.arange(3, dtype=torch.int32, device=device)[None]
        outputs = []
        for value in (0.0, bad):
            heads[30, 4:] = value
            cache = torch.zeros(backend.kv_cache_shape(3), device=device)
            query = backend.rotate_and_store(heads, None, rotary, cache, slots)
            plan = backend.plan(AttentionInputs([0], [40], [0], table))
            outputs.append(backend.attend(query, cache, plan))
        assert torch.equal(outputs[0][:30], outputs[1][:30])
        assert not outputs[1][30:].isfinite().any(1).any()
        one = backend.attend(query[:1], cache, backend.plan(AttentionInputs([19], [1], [0], table)))
        assert one.isfinite().all()


class TestElementwise:
    @pytest.mark.parametrize("size", [576, 1024, 3000, 12288])
    @pytest.mark.parametrize("num_tokens", [1, 3, 513])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_add_rms_norm(self, device, dtype, num_tokens, size):
        x, residual = (torch.randn(num_tokens, size, device=device).to(dtype) * 5 for _ in range(2))
        weight = torch.rand(size, device=device).to(dtype)
        normed, total = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
        torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
        assert error(normed, F.rms_norm((x + residual).double(), (size,), weight.double(), 1e-5)) < TOLERANCE[dtype]
        assert (
            error(rms_norm.rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (size,), weight.double(), 1e-5)) < TOLERANCE[dtype]
        )

    @pytest.mark.parametrize("size", [64, 1000, 3072, 12288])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_silu_and_mul(self, device, dtype, size):
        gate_up = (torch.randn(5, 2 * size, device=device) * 8).to(dtype)
        gate, up = gate_up.double().chunk(2, -1)
        assert error(activation.silu_and_mul(gate_up), F.silu(gate) * up) < TOLERANCE[dtype]

    @pytest.mark.parametrize(
        ("n", "k"), [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (960, 576), (576, 1536), (100, 96)]
    )
    def test_products_of_one_token(self, device, n, k):
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        x, weight, norm, bias, gate_up = random(1, k), random(n, k) * 0.02, random(k), random(1, n), random(1, 2 * k)
        normed = F.rms_norm(x.double(), (k,), norm.double(), 1e-6).bfloat16().double()
        assert error(one_token.norm_product(x, norm, 1e-6, weight, bias), normed @ weight.double().T + bias.double()) < 6e-3
        assert error(one_token.product_add(x, weight, bias), x.double() @ weight.double().T + bias.double()) < 6e-3
        gate, up = gate_up.double().chunk(2, -1)
        activated = (F.silu(gate).bfloat16().double() * up).bfloat16().double()
        assert error(one_token.silu_product_add(gate_up, weight, bias), activated @ weight.double().T + bias.double()) < 6e-3


class TestSampling:
    @pytest.mark.parametrize("vocab_size", [50, 4096, 49_157, 151_936])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_tokens_equal_the_specification(self, device, dtype, vocab_size):
        num_samples = 64
        logits = (torch.randn(num_samples, vocab_size, device=device) * 3).to(dtype)
        inverse = torch.tensor([0.0, 1.0, 0.5, 1.6] * 16, device=device)
        positions = list(range(7, 7 + num_samples))
        keys = torch.from_numpy(draw_keys(np.array([stream_of(i) for i in range(num_samples)], dtype=np.uint64), positions))
        tokens = torch.zeros(num_samples, dtype=torch.int64, device=device)
        table = torch.zeros(num_samples, 100, dtype=torch.int32, device=device)
        rows = torch.arange(num_samples, dtype=torch.int32, device=device)
        where = torch.tensor(positions, dtype=torch.int32, device=device)
        draw_tokens(logits, inverse, keys.to(device), rows, where, table, tokens)
        noise = exponential_noise(token_hashes(vocab_size), keys).double()
        scores = logits.double().cpu() * inverse.cpu()[:, None].double() - noise.log()
        expected = torch.where(inverse.cpu() > 0, scores.argmax(-1), logits.float().cpu().argmax(-1))
        differs = tokens.cpu() != expected
        best = scores.max(-1).values
        assert all(best[i] - scores[i, tokens[i]] < 1e-5 for i in differs.nonzero()[:, 0]), "only rounding may decide otherwise"
        assert differs.sum() <= 1
        assert torch.equal(table[rows.long(), where.long()], tokens.int())

    @pytest.mark.parametrize(("vocab_size", "share"), [(50, 0.5), (4096, 0.01), (49_157, 0.9), (151_936, 0.001)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_grammars_leave_the_noise_and_forbid_the_rest(self, device, dtype, vocab_size, share):
        num_samples, generator = 32, np.random.default_rng(vocab_size)
        logits = (torch.randn(num_samples, vocab_size, device=device) * 3).to(dtype)
        inverse = torch.tensor([0.0, 1.0, 0.5, 1.6] * 8, device=device)
        keys = torch.from_numpy(generator.integers(-(2**31), 2**31, num_samples, dtype=np.int32)).to(device)
        allowed = generator.random((num_samples, vocab_size)) < share
        allowed[:, 17] = True
        padded = np.zeros((num_samples, -(-vocab_size // 32) * 32), dtype=np.uint8)
        padded[:, :vocab_size] = allowed
        masks = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32)[::-1].copy()).to(device)
        lines = torch.arange(num_samples - 1, -1, -1, dtype=torch.int32)
        lines[5], lines[8] = -1, -1
        allowed[5], allowed[8] = True, True
        edited = logits.float().masked_fill(~torch.from_numpy(allowed).to(device), -torch.inf)
        table = torch.zeros(num_samples, 4, dtype=torch.int32, device=device)
        rows = torch.arange(num_samples, dtype=torch.int32, device=device)
        tokens, expected = torch.zeros(2, num_samples, dtype=torch.int64, device=device)
        draw_tokens(edited, inverse, keys, rows, torch.zeros_like(rows), table, expected)
        draw_tokens(logits, inverse, keys, rows, torch.ones_like(rows), table, tokens, masks, lines.to(device))
        assert torch.equal(tokens, expected) and torch.equal(table[:, 0], table[:, 1])

    @pytest.mark.parametrize("held", [0, 1])
    def test_a_held_draw_writes_nothing(self, device, held):
        rows = torch.arange(3, dtype=torch.int32, device=device)
        logits, ones = torch.randn(3, 5000, device=device), torch.ones(3, device=device)
        tokens, table = torch.full((3,), -7, device=device), torch.full((3, 2), -7, dtype=torch.int32, device=device)
        flag = torch.tensor([held], dtype=torch.int32, device=device)
        draw_tokens(logits, ones, rows, rows, torch.zeros_like(rows), table, tokens, held=flag)
        assert ((tokens == -7) == bool(held)).all() and ((table[:, 0] == -7) == bool(held)).all()

    def test_tokens_are_written_to_a_place_of_the_hosts_memory(self, device):
        drawn = torch.full((3, 8), -7, pin_memory=True)
        logits, rows = torch.randn(4, 5000, device=device), torch.arange(4, dtype=torch.int32, device=device)
        zeros, table = torch.zeros(4, device=device), torch.zeros(4, 1, dtype=torch.int32, device=device)
        place = torch.ones(1, dtype=torch.int32, device=device)
        draw_tokens(logits, zeros, rows, rows, torch.zeros_like(rows), table, drawn, place=place)
        torch.cuda.synchronize()
        assert drawn[1, :4].tolist() == logits.argmax(-1).tolist() == table[:, 0].tolist()
        assert (drawn[[0, 2]] == -7).all() and (drawn[1, 4:] == -7).all()

    def test_grammars_and_logits_that_are_not_finite(self, device):
        logits = torch.zeros(4, 5000, device=device)
        logits[0], logits[1, 7], logits[2, 4000] = -math.inf, math.nan, math.inf
        logits[3, 4000] = math.inf
        masks = torch.zeros(1, 157, dtype=torch.int32, device=device)
        masks[0, 1] = 0b1000  # token 35
        ones, zeros = torch.ones(4, device=device), torch.zeros(4, dtype=torch.int32, device=device)
        lines = torch.tensor([0, 0, 0, -1], dtype=torch.int32, device=device)
        tokens, table = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, 2, dtype=torch.int32, device=device)
        rows = torch.arange(4, dtype=torch.int32, device=device)
        draw_tokens(logits, ones, zeros, rows, zeros, table, tokens, masks, lines)
        assert tokens.tolist() == [35, -1, 35, -1], "the only token that fits wins even where the model says never"

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    def test_what_is_not_finite_is_no_token(self, device, temperature):
        logits = not_finite(device)
        num_rows = len(logits)
        inverse = torch.full((num_rows,), 1 / temperature if temperature else 0.0, device=device)
        tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        table = torch.full((num_rows, 4), 99, dtype=torch.int32, device=device)
        draw_tokens(logits, inverse, rows, rows, torch.zeros_like(rows), table, tokens)
        assert tokens[:-1].tolist() == [-1] * (num_rows - 1) and tokens[-1] == 4321
        assert table[:, 0].tolist() == [0] * (num_rows - 1) + [4321]


def not_finite(device: torch.device) -> torch.Tensor:
    """Rows that have no token: all NaN, one NaN, one infinity, nothing possible. And one in which a single token is possible."""
    logits = torch.randn(5, 5000, device=device)
    logits[0], logits[1, 17], logits[2, 4999], logits[3:] = math.nan, -math.nan, math.inf, -math.inf
    logits[4, 4321] = -3.0
    return logits


def test_gather_inputs_looks_up_tokens_and_slots(device):
    tokens = torch.arange(60, dtype=torch.int32, device=device).view(3, 20)
    blocks = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 0], [9, 8, 7, 6, 5]], dtype=torch.int32, device=device)
    rows = torch.tensor([2, 0, -1, 1], dtype=torch.int32, device=device)
    ids, slots = gather_inputs(rows, torch.tensor([7, 19, 0, 4], dtype=torch.int32, device=device), tokens, blocks, 4)
    assert ids.tolist() == [47, 19, 0, 24]
    assert slots.tolist() == [8 * 4 + 3, 9 * 4 + 3, -1, 2 * 4]


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("has_min_p", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_p_draws_the_tokens_of_the_twin(device, dtype, has_min_p, scale):
    num_rows, vocab_size = 64, 49_157
    logits = (torch.randn(num_rows, vocab_size, device=device) * scale).to(dtype)
    inverse, top_p = torch.rand(num_rows, 1, device=device) + 0.5, torch.rand(num_rows, 1, device=device) * 0.98 + 0.01
    min_p = torch.rand(num_rows, 1, device=device) * 0.1 if has_min_p else None
    keys = torch.randint(-(2**31), 2**31 - 1, (num_rows,), dtype=torch.int32, device=device)
    weights = filters.relative_weights(logits, inverse)
    if min_p is not None:
        filters.drop_below_min_p(weights, min_p)
    race = weights / exponential_noise(token_hashes(vocab_size).to(device), keys)
    expected = filters.winner_within_top_p(logits, weights, race, top_p)
    actual = draw_within_top_p(logits, inverse, top_p, min_p, keys)
    assert (actual != expected).sum() <= 1, "only a sum at the very edge of the nucleus may round otherwise"
    assert len(set(actual.tolist())) > 5 or scale > 3


@pytest.mark.parametrize("has_min_p", [False, True])
def test_top_p_of_what_is_not_finite_is_no_token(device, has_min_p):
    column = torch.full((5, 1), 0.9, device=device)
    keys = torch.arange(5, dtype=torch.int32, device=device)
    tokens = draw_within_top_p(not_finite(device), column, column, column * 0.1 if has_min_p else None, keys)
    assert tokens.tolist() == [-1, -1, -1, -1, 4321]


def test_late_compiles_are_noticed(device):
    names = watch_compiles()
    x = torch.randn(3, 8 * 41, device=device)  # a size that nothing else has
    rms_norm.rms_norm(x, torch.ones(8 * 41, device=device), 1e-6)
    assert len(names) == 1 and "norm" in names[0]
