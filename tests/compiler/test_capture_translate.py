"""Attention is one op; dropout and random tensors are functions of the seed."""

import functools

import pytest
import torch
import torch.nn.functional as F
from capturing import assert_same_as_eager, inputs_of, interpret, model_of, targets, x_of

from opweave.compiler.capture import capture


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_one_op_with_grouped_heads(is_causal):
    def function(m, x):
        q = m.lin(x).view(2, 4, 4, 4)
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], is_causal=is_causal, enable_gqa=True).square().sum()

    step = assert_same_as_eager(model_of(function), x_of())
    op = next(n for n in step.ops if n.target is torch.ops.opweave.attention.default)
    assert [tuple(a.meta["val"].shape) for a in op.args[:3]] == [(2, 4, 4, 4), (2, 2, 4, 4), (2, 2, 4, 4)]
    assert op.args[3:] == (None, is_causal, 0.5)
    assert tuple(op.meta["val"][1].shape) == (2, 4, 4)


def test_attention_with_trained_mask_or_dropout_is_decomposed():
    def function(m, x, p=0.0):
        q = x.view(2, 4, 4, 4)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=m.lin(x)[:4, :4], dropout_p=p).square().sum()

    step = assert_same_as_eager(model_of(function), x_of())
    assert "opweave.attention.default" not in targets(step) and "aten.bmm.default" in targets(step)
    step = capture(model_of(functools.partial(function, p=0.5)), x_of())
    assert "opweave.dropout_mask.default" in targets(step)


def test_dropout_is_a_function_of_the_seed():
    model, x = model_of(lambda m, x: F.dropout(F.dropout2d(m.lin(x).view(8, 4, 2, 2), 0.3).flatten(1), 0.5).square().sum()), x_of()
    step = capture(model, x)
    assert [i.name for i in step.inputs if i.kind == "seed"] == ["seed"]
    first, again, other = (interpret(step, inputs_of(step, model, x, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    masks = [n for n in step.ops if n.target is torch.ops.opweave.dropout_mask.default]
    assert [n.args[1:] for n in masks] == [(0, 0.3, [8, 4, 1, 1]), (1, 0.5, [8, 16])]


def test_checkpointed_dropout_drops_the_same_again():
    from torch.utils.checkpoint import checkpoint

    def layer(m, z):
        return F.dropout(m.lin(F.dropout(z, 0.2)), 0.5).tanh()

    x = x_of()
    graphs = []
    for run in (layer, lambda m, z: checkpoint(functools.partial(layer, m), z, use_reentrant=False)):
        model = model_of(lambda m, x, run=run: (run(m, m.lin(x)) * run(m, x)).sum())
        step = capture(model, x)
        assert sum(n.target is torch.ops.opweave.dropout_mask.default for n in step.ops) == 4
        graphs.append(interpret(step, inputs_of(step, model, x)))
    assert all(torch.equal(a, b) for a, b in zip(*graphs, strict=True))


def test_capture_leaves_the_random_state():
    model = model_of(lambda m, x: F.dropout(m.lin(x), 0.5).sum())
    before = torch.get_rng_state()
    capture(model, x_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_off_leaves_nothing():
    zero, evaluated = (lambda m, x: F.dropout(m.lin(x), 0.0).sum()), (lambda m, x: F.dropout(m.lin(x), 0.5, m.training).sum())
    for model in (model_of(zero), model_of(evaluated).eval()):
        assert not any(i.kind == "seed" for i in capture(model, x_of()).inputs)


def test_random_tensors_are_functions_of_the_seed():
    def function(m, x):
        noise = torch.rand_like(x) + torch.randn(16) + torch.empty(16).uniform_(-1, 1) + torch.empty(16).normal_(0.5, 2.0)
        return (m.lin(x) * noise * torch.bernoulli(torch.full((16,), 0.5))).sum()

    model, x = model_of(function), x_of()
    step = capture(model, x)
    results = [interpret(step, inputs_of(step, model, x, seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
