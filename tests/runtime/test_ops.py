"""opweave's own ops: attention and experts against eager PyTorch, random numbers that do not depend on the mesh."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from opweave.runtime import attention, moe, ops, random
from opweave.runtime.sharding import ShardSpec, unravel

opweave = torch.ops.opweave
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Attention


def heads(num_q, num_kv, dtype, s=6, t=6, d=8):
    """q [2, num_q, s, d], k and v [2, num_kv, t, d], laid out heads-last as models make them."""
    made = (torch.randn(2, length, num, d, dtype=dtype).transpose(1, 2) for num, length in ((num_q, s), (num_kv, t), (num_kv, t)))
    return tuple(x.requires_grad_() for x in made)


CASES = {
    "plain": {"num_kv": 4},
    "causal": {"num_kv": 4, "is_causal": True},
    "grouped": {"num_kv": 2},
    "masked": {"num_kv": 4, "masked": True, "t": 10},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention_has_the_bits_of_eager(case, dtype):
    options = dict(CASES[case])
    is_causal, masked, t = options.pop("is_causal", False), options.pop("masked", False), options.pop("t", 6)
    q, k, v = heads(4, options["num_kv"], dtype, t=t)
    mask = torch.randn(2, 1, 6, t, dtype=dtype) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=options["num_kv"] != 4)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    scale = 1 / math.sqrt(8)
    with torch.no_grad():
        out, lse = opweave.attention(q, k, v, mask, is_causal, scale)
        grads = opweave.attention_backward(grad, q, k, v, mask, out, lse, is_causal, scale)
    assert torch.equal(out, expected) and lse.shape == (2, 4, 6)
    assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_attention_written_out_agrees_with_the_kernel(case):
    options = dict(CASES[case])
    t = options.get("t", 6)
    q, k, v = (x.detach() for x in heads(4, options["num_kv"], torch.float64, t=t))
    mask = torch.randn(2, 1, 6, t, dtype=torch.float64) if options.get("masked") else None
    rest = (options.get("is_causal", False), 0.3)
    out, lse = attention.forward(q, k, v, mask, *rest)
    grad = torch.randn_like(out)
    torch.testing.assert_close(attention._math_forward(q, k, v, mask, *rest), (out, lse))
    written_out = attention._math_backward(grad, q, k, v, mask, out, lse, *rest)
    torch.testing.assert_close(written_out, attention.backward(grad, q, k, v, mask, out, lse, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads_last", [True, False])
def test_attention_fake_results_are_laid_out_as_real_ones(dtype, heads_last):
    q, k, v = (x.detach() if heads_last else x.detach().contiguous() for x in heads(4, 2, dtype))
    args = (q, k, v, None, True, 0.3)
    out, lse = attention.forward(*args)
    grads = attention.backward(out, *args[:4], out, lse, *args[4:])
    fake = (*attention.forward_fake(*args), *attention.backward_fake(out, *args[:4], out, lse, *args[4:]))
    for real, other in zip((out, lse, *grads), fake, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype)


# Experts

T, H, FF, E, K = 24, 8, 16, 4, 2


def experts(dtype):
    """x [T, H], idx and weights [T, K], gate_up [E, 2 FF, H], down [E, H, FF]; the last expert is never chosen."""
    idx = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    shapes = ((T, H), (T, K), (E, 2 * FF, H), (E, H, FF))
    x, weights, gate_up, down = (torch.randn(s, dtype=dtype).requires_grad_() for s in shapes)
    return x, idx, weights, gate_up, down


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_experts_are_those_of_transformers(dtype, act):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    x, idx, weights, gate_up, down = args = experts(dtype)
    module = SimpleNamespace(num_experts=E, gate_up_proj=gate_up, down_proj=down, act_fn=lambda h: moe.activation(act, h))
    expected = modeling.MixtralExperts.forward.__wrapped__(module, x, idx, weights)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (x, weights, gate_up, down), grad)
    with torch.no_grad():
        out = opweave.moe_mlp(*args, act, 0, E)
        grads = opweave.moe_mlp_backward(grad, *args, act, 0, E)
    assert torch.equal(out, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_experts_in_two_halves_add_up():
    x, idx, weights, gate_up, down = (t.detach() for t in experts(torch.float64))
    whole = opweave.moe_mlp(x, idx, weights, gate_up, down, "silu", 0, E)
    grad = torch.randn_like(whole)
    grads = opweave.moe_mlp_backward(grad, x, idx, weights, gate_up, down, "silu", 0, E)
    halves = [(first, gate_up[first : first + 2], down[first : first + 2]) for first in (0, 2)]
    parts = [opweave.moe_mlp(x, idx, weights, g, d, "silu", first, E) for first, g, d in halves]
    torch.testing.assert_close(sum(parts), whole)
    part_grads = [opweave.moe_mlp_backward(grad, x, idx, weights, g, d, "silu", first, E) for first, g, d in halves]
    for i in (0, 1):  # of x and of the routing weights: partial sums
        torch.testing.assert_close(part_grads[0][i] + part_grads[1][i], grads[i])
    for i in (2, 3):  # of the experts: each half owns its own
        torch.testing.assert_close(torch.cat([g[i] for g in part_grads]), grads[i])


@pytest.mark.parametrize("first", [0, 1, 2])
def test_grouped_products_agree_with_the_loop(first):
    x, idx, weights, gate_up, down = (t.detach() for t in experts(torch.float32))
    gate_up, down, grad = gate_up[first : first + 2], down[first : first + 2], torch.randn(T, H)
    args = (x, idx, weights, gate_up, down, "silu", first)
    torch.testing.assert_close(moe._forward_grouped(*args), moe.forward(*args, E))
    torch.testing.assert_close(moe._backward_grouped(grad, *args), moe.backward(grad, *args, E))


def test_autograd_function_uses_the_backward_op():
    x, idx, weights, gate_up, down = experts(torch.float64)
    inputs = (x, weights, gate_up, down)
    assert torch.autograd.gradcheck(lambda x, w, g, d: moe.MoeMlp.apply(x, idx, w, g, d, "silu"), inputs, fast_mode=True)


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="unknown activation 'swish' of moe_mlp; known: silu, gelu, gelu_tanh, relu"):
        moe.activation("swish", torch.ones(1))


# Random numbers

SPECS = {
    "rows": ((8, 6), ((8,), (6,)), ((0, 0), None)),
    "both": ((8, 6), ((8,), (6,)), ((1, 0), (0, 0))),
    "same dim twice": ((8, 6), ((8,), (6,)), ((0, 0), (0, 0))),
    "factor of a dim": ((24, 6), ((3, 4, 2), (6,)), ((0, 1), (0, 2))),
    "replicated": ((8, 6), ((8,), (6,)), (None, None)),
    "scalar": ((), (), (None, None)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_piece_of_the_mask_is_a_slice_of_the_whole(name):
    shape, factors, axes = SPECS[name]
    spec = ShardSpec(shape=shape, factors=factors, axes=axes, mesh=(2, 2))
    seed = torch.tensor(11)
    whole = opweave.dropout_mask(seed, 5, 0.4, list(shape))
    uniform = opweave.uniform(seed, 5, list(shape), torch.float32)
    normal = opweave.normal(seed, 5, list(shape), torch.float64)
    for rank in range(4):
        at = unravel(rank, spec.mesh)
        assert torch.equal(ops.local_dropout_mask(seed, 5, 0.4, spec, at), spec.shard(whole, at))
        assert torch.equal(ops.local_uniform(seed, 5, torch.float32, spec, at), spec.shard(uniform, at))
        assert torch.equal(ops.local_normal(seed, 5, torch.float64, spec, at), spec.shard(normal, at))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_mask_keeps_the_right_share(p):
    kept = opweave.dropout_mask(torch.tensor(3), 0, p, [500, 400])
    assert kept.dtype == torch.bool
    assert abs(kept.double().mean().item() - (1 - p)) < (0.004 if 0 < p < 1 else 1e-12)


def test_masks_of_other_seeds_ops_and_places_are_independent():
    seed = torch.tensor(3)
    base = opweave.dropout_mask(seed, 0, 0.5, [100_000]).double() * 2 - 1
    for other in (opweave.dropout_mask(seed, 1, 0.5, [100_000]), opweave.dropout_mask(seed + 1, 0, 0.5, [100_000])):
        assert abs((base * (other.double() * 2 - 1)).mean().item()) < 0.015
    for lag in (1, 2, 64, 768):
        assert abs((base[lag:] * base[:-lag]).mean().item()) < 0.015


def test_uniform_and_normal_have_their_moments():
    seed = torch.tensor(3)
    uniform = opweave.uniform(seed, 0, [200_000], torch.float32)
    normal = opweave.normal(seed, 0, [200_000], torch.float32)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.005 and abs(uniform.var().item() - 1 / 12) < 0.002
    assert abs(normal.mean().item()) < 0.01 and abs(normal.var().item() - 1) < 0.02 and torch.isfinite(normal).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_uniform_stays_below_one(dtype):
    assert random.uniform(torch.tensor(1), 0, [100_000], dtype).max() < 1


# Constants and updates


def test_constant_is_made_from_numbers():
    made = opweave.constant([2, 2], [1, 2, 3, 4.5], torch.float32)
    assert torch.equal(made, torch.tensor([[1.0, 2.0], [3.0, 4.5]]))
    assert torch.equal(opweave.constant([2], [True, False], torch.bool), torch.tensor([True, False]))


def test_update_cannot_be_called():
    with pytest.raises(RuntimeError, match="stands for the optimizer in a captured graph and cannot be called"):
        opweave.update(torch.ones(2), torch.ones(2), [], "SGD", 0)
