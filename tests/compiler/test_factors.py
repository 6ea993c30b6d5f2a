"""Factors are found from the graph: fused and grouped projections fall apart where the model views them, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.factors import _Classes, _match_view
from opweave.compiler.rule_table import op_name


def analysis_of(model, batch):
    return analyse(capture(model, batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))


def factors_of(analysis):
    """fqn of each parameter → factors of its dims, dims without an inner boundary as plain numbers."""
    placeholders = [n for n in analysis.step.graph.nodes if n.op == "placeholder"]
    return {
        info.fqn: tuple(f[0] if len(f) == 1 else f for f in analysis.factors.dims(node))
        for node, info in zip(placeholders, analysis.step.inputs, strict=True)
        if info.kind == "param"
    }


def test_gpt2_fused_qkv():
    import transformers

    config = transformers.GPT2Config(n_embd=96, n_layer=2, n_head=6, vocab_size=128, n_positions=16, bos_token_id=1, eos_token_id=2)
    ids = torch.randint(3, 128, (4, 8))
    found = factors_of(analysis_of(transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}))
    assert found["transformer.h.0.attn.c_attn.weight"] == (96, (3, 6, 16))
    assert found["transformer.h.1.attn.c_attn.bias"] == ((3, 6, 16),)
    assert found["transformer.h.0.attn.c_proj.weight"] == ((6, 16), 96)
    assert found["transformer.h.0.mlp.c_fc.weight"] == (96, 384)


def test_llama_rotary_heads():
    """Heads of 8, each in rotary halves; the feed-forward stays one factor."""
    model, batch = zoo.load("llama-tiny")
    found = factors_of(analysis_of(model, batch))
    assert found["model.layers.0.self_attn.q_proj.weight"] == ((8, 2, 4), 64)
    assert found["model.layers.0.self_attn.k_proj.weight"] == ((8, 2, 4), 64)
    assert found["model.layers.0.mlp.gate_proj.weight"] == (128, 64)


def test_equal_quantities_have_equal_ids():
    """The batch is the same quantity in every activation, heads in q, k and v; and they are not each other."""
    model, batch = zoo.load("opt-tiny")
    analysis = analysis_of(model, batch)
    factors = analysis.factors
    params = {i.fqn: n for n, i in zip((n for n in analysis.step.graph.nodes if n.op == "placeholder"), analysis.step.inputs, strict=True)}
    attentions = [n for n in analysis.step.ops if op_name(n) == "opweave::attention.default"]
    assert len(attentions) == 2
    first = factors.class_ids(params["input_ids"])[0]
    for index, node in enumerate(attentions):
        query = node.args[0]
        assert query.meta["val"].shape == (8, 8, 16, 8)
        ids = factors.class_ids(query)
        assert ids[0] == first
        heads = factors.class_ids(params[f"model.decoder.layers.{index}.self_attn.q_proj.weight"])[0]
        assert ids[1] == heads != first


class TwoViews(nn.Module):
    """12 features seen as 3x4 here and as 2x6 there: no common factors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x):
        y = self.layer(x)
        a = y.view(-1, 3, 4).transpose(1, 2).exp().mean()
        return a + y.view(-1, 2, 6).transpose(1, 2).sin().mean()


def test_contradictory_views_become_opaque():
    analysis = analysis_of(TwoViews(), {"x": torch.randn(4, 8)})
    opaque = analysis.factors.opaque_ops()
    assert opaque and {op_name(n).split(".")[0] for n in opaque} <= {"view", "_unsafe_view", "reshape", "_reshape_copy"}
    for node in opaque:
        bound = analysis.factors.bind(node)
        assert bound.opaque and set(bound.flags) == {"!"}
    reasons = [why for (op, why) in analysis.replicated if op_name(opaque[0]) == op]
    assert reasons == ["its dims are factored in ways that do not nest"]
    # One of the two keeps its factors: what is contradictory is given up, not everything.
    assert factors_of(analysis)["layer.weight"][0] in ((3, 4), (2, 6))


class Swiglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 40, bias=False), nn.Linear(20, 8, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up).square().mean()


def test_equal_halves_are_a_factor():
    found = factors_of(analysis_of(Swiglu(), {"x": torch.randn(4, 8)}))
    assert found == {"gate_up.weight": ((2, 20), 8), "down.weight": (8, 20)}


def test_local_shapes_and_atoms_multiply_to_the_tensor():
    for name in ("mixtral-tiny", "vit-tiny", "unet3d-tiny"):
        analysis = analysis_of(*zoo.load(name))
        for node in analysis.step.graph.nodes:
            if node.op == "placeholder":
                dims = analysis.factors.dims(node)
                shape = tuple(node.meta["val"].shape)
                assert tuple(int(torch.tensor(f).prod()) for f in dims) == shape
                assert [f for d in dims for f in d if f > 1] == list(analysis.factors.atoms(node))


@pytest.mark.parametrize(
    ("size", "bounds", "factors"), [(12, [4], (3, 4)), (12, [4, 2], (3, 2, 2)), (12, [4, 6], (3, 4)), (12, [5, 12, 1], (12,)), (1, [], ())]
)
def test_boundaries_nest(size, bounds, factors):
    """A boundary that does not divide, or does not nest with those there, is not taken."""
    classes = _Classes()
    cls = classes.new(size)
    for bound in bounds:
        classes.add_bound(cls, bound)
    assert classes.factors(cls) == factors


def test_views_are_matched_in_smallest_groups():
    size = [4, 6, 5, 24, 5, 1]
    assert _match_view((0, 1, 5, 2), (3, 4), size) == [([0, 1], [3]), ([2], [4])]
