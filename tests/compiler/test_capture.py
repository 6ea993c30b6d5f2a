"""Capture: the graph, run again, gives eager PyTorch's bits, and says what a plan needs to know."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from capturing import assert_same_as_eager, eager, inputs_of, interpret, model_of, targets, x_of
from torch import nn

from opweave import zoo
from opweave.compiler.capture import capture, default_loss
from opweave.compiler.capture_tree import batch_tensors

TINY = [name for name in zoo.names() if name.endswith("-tiny")]
MOE = ("mixtral-tiny", "qwen3-moe-tiny")


# Families


@pytest.mark.parametrize("name", TINY)
def test_family_is_bit_equal_to_eager(name):
    model, batch = zoo.load(name)
    if name in MOE:
        model.set_experts_implementation("eager")  # the default of transformers sums in another order
    assert_same_as_eager(model, batch)


@pytest.mark.parametrize("name", ["opt-tiny", "llama-tiny", "mixtral-tiny", "mamba-tiny", "mlp-tiny"])
def test_family_in_float64(name):
    model, batch = zoo.load(name)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    if name in MOE:
        model.set_experts_implementation("eager")
    assert_same_as_eager(model.double(), batch)


@pytest.mark.parametrize("name", ["opt-tiny", "convnet-tiny"])
def test_autocast_is_captured_as_casts(name):
    model, batch = zoo.load(name)
    step = assert_same_as_eager(model, batch, autocast=torch.bfloat16)
    assert "aten._to_copy.default" in targets(step)


def test_attention_mask_in_the_batch():
    model, batch = zoo.load("opt-tiny")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :4] = 0
    assert_same_as_eager(model, {**batch, "attention_mask": mask})


def test_meta_model_is_captured_without_memory():
    model = zoo.build("gpt2")
    with torch.device("meta"):
        ids = torch.zeros(8, 1024, dtype=torch.long)
    step = capture(model, {"input_ids": ids, "labels": ids}, optimizer=torch.optim.AdamW(model.parameters()))
    assert sum(i.kind == "param" for i in step.inputs) == len(list(model.parameters()))
    assert "opweave.attention.default" in targets(step)


def test_model_is_left_as_it_was():
    model, batch = zoo.load("mixtral-tiny")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._experts_implementation
    capture(model, batch)
    assert model.config._experts_implementation == implementation
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not nn.modules.module._global_forward_hooks


def test_experts_of_another_form_are_captured_without_the_op():
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=16, vocab_size=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model, ids = transformers.GptOssForCausalLM(config).train(), torch.randint(3, 64, (2, 8))
    model.set_experts_implementation("eager")
    step = capture(model, {"input_ids": ids, "labels": ids})
    loss, grads = eager(model, {"input_ids": ids, "labels": ids})
    results = interpret(step, inputs_of(step, model, {"input_ids": ids, "labels": ids}))
    assert "opweave.moe_mlp.default" not in targets(step)
    torch.testing.assert_close(results[0], loss)
    for output, result in zip(step.outputs, results, strict=True):
        if output.kind == "grad":
            torch.testing.assert_close(result, grads[output.fqn])


# What the graph says


def test_graph_has_no_devices_and_no_writes():
    model, batch = zoo.load("bart-tiny")
    step = capture(model, batch)
    step.verify()
    assert not any("device" in n.kwargs or "pin_memory" in n.kwargs for n in step.ops)
    assert not any(isinstance(a, torch.device) for n in step.ops for a in n.args)


def test_ops_know_module_phase_partner_and_line():
    model, batch = zoo.load("opt-tiny")
    step = capture(model, batch, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    by_name = {n.name: n for n in step.ops}
    attention = next(n for n in step.ops if n.target is torch.ops.opweave.attention.default)
    backward = next(n for n in reversed(step.ops) if n.target is torch.ops.opweave.attention_backward.default)
    update = next(n for n in step.ops if n.target is torch.ops.opweave.update.default)
    assert attention.meta["op"].path == "model.decoder.layers.0.self_attn"
    assert attention.meta["op"].phase == "fwd" and attention.meta["op"].line.startswith("sdpa_attention.py:")
    assert backward.meta["op"].phase == "bwd" and backward.meta["op"].partner == attention.name
    assert backward.meta["op"].path == attention.meta["op"].path
    assert update.meta["op"].phase == "update"
    paths = {n.meta["op"].path for n in step.ops if n.target is torch.ops.aten.addmm.default}
    assert "model.decoder.layers.1.self_attn.q_proj" in paths
    partners = {n.meta["op"].partner for n in step.ops if n.meta["op"].phase == "bwd"} - {""}
    assert partners <= set(by_name) and all(by_name[p].meta["op"].phase == "fwd" for p in partners)


def test_repeated_constants_and_empty_views_are_merged():
    def function(m, x):
        return (m.lin(x).detach() * 1 + m.lin(x).view(8, 16).clone() + torch.zeros(16) + torch.zeros(16)).sum()

    step = capture(model_of(function), x_of())
    names = [n.target for n in step.ops]
    assert torch.ops.aten.detach.default not in names and torch.ops.aten.clone.default not in names
    assert names.count(torch.ops.aten.addmm.default) == 1
    assert sum(n.target is torch.ops.aten.full.default and n.args[0] == [16] for n in step.ops) == 1


def test_convolution_gradients_are_ops_of_their_own():
    model, batch = zoo.load("convnet-tiny")
    masks = [n.args[-1] for n in capture(model, batch).ops if n.target is torch.ops.aten.convolution_backward.default]
    assert all(sum(mask) == 1 for mask in masks)


# Parameters and batches


def test_tied_frozen_and_unused_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
            self.out.weight = self.embed.weight
            self.frozen = nn.Linear(16, 16).requires_grad_(False)
            self.unused = nn.Linear(4, 4)

        def forward(self, ids):
            return F.cross_entropy(self.out(self.frozen(self.embed(ids))).flatten(0, 1), ids.flatten())

    model, ids = Tied(), torch.randint(0, 32, (8, 4))
    step = assert_same_as_eager(model, ids)
    assert step.tied == {"out.weight": "embed.weight"}
    step = capture(model, ids, optimizer=torch.optim.Adam(model.parameters()))
    assert [o.fqn for o in step.outputs if o.kind == "param"] == ["embed.weight"]
    assert {i.fqn for i in step.inputs if i.kind == "param"} == {k for k, _ in model.named_parameters()}


def vars_of(value):
    return vars(value) if dataclasses.is_dataclass(value) else {}


@dataclasses.dataclass
class DataBatch:
    x: torch.Tensor
    factor: int


@pytest.mark.parametrize(
    ("batch", "paths"),
    [
        (x_of(), ["batch"]),
        ((x_of(), x_of(16)), ["0", "1"]),
        ([x_of(), {"scale": x_of(16)}], ["0", "1.scale"]),
        ({"x": x_of(), "name": "a"}, ["x"]),
        (DataBatch(x_of(), 3), ["x"]),
    ],
)
def test_batches_of_all_kinds(batch, paths):
    def loss_fn(model, given):
        tensors = list(batch_tensors(given).values())
        return model.lin(tensors[0]).mul(tensors[-1].mean()).sum() * getattr(given, "factor", 1)

    step = assert_same_as_eager(model_of(None), batch, loss_fn)
    assert [i.fqn for i in step.inputs if i.kind == "batch"] == paths
    assert step.batch_constants == ({"name": "a"} if isinstance(batch, dict) else {"factor": 3} if "factor" in vars_of(batch) else {})


def test_extras_are_rebuilt():
    def loss_fn(model, x):
        y = model.lin(x)
        return y.sum(), {"y": y, "n": 3, "pair": (y.mean(), "text")}

    model, x = model_of(None), x_of()
    step = capture(model, x, loss_fn=loss_fn)
    results = interpret(step, inputs_of(step, model, x))
    extras = [r for o, r in zip(step.outputs, results, strict=True) if o.kind == "extra"]
    (rebuilt,) = step.extra_spec.rebuild(extras)
    assert torch.equal(rebuilt["y"], model.lin(x)) and rebuilt["n"] == 3 and rebuilt["pair"][1] == "text"


def test_default_loss_of_what_models_return():
    x = x_of()
    for returned in (lambda y: y, lambda y: (y, 1), lambda y: {"loss": y, "logits": 2}):
        model = model_of(lambda m, x, returned=returned: returned(m.lin(x).sum()))
        assert [o.kind for o in capture(model, x).outputs] == ["loss", "grad", "grad"]


def test_constants_become_part_of_the_graph():
    step = assert_same_as_eager(model_of(lambda m, x: (m.lin(x) * torch.tensor([1.0, 2.0] * 8) * m.scale).sum(), scale=x_of(16)), x_of())
    assert "opweave.constant.default" in targets(step)
    assert_same_as_eager(model_of(lambda m, x: m.lin(x).sum() * torch.tensor(2.0).item()), x_of())


def test_foreign_devices_become_neutral():
    step = capture(model_of(lambda m, x: (m.lin(x).to("cuda:0") + torch.ones(16, device="cuda")).sum()), x_of())
    assert not any("device" in n.kwargs for n in step.ops)


@pytest.mark.parametrize("name", ["opt-tiny", "mixtral-tiny"])
def test_checkpointed_layers_are_one_with_their_first_run(name):
    model, batch = zoo.load(name)
    model.config.use_cache = False  # as checkpointing sets it
    ops = [n.target for n in capture(model, batch).ops]
    model.gradient_checkpointing_enable()
    if name in MOE:
        model.set_experts_implementation("eager")
    assert sorted(map(str, ops)) == sorted(str(n.target) for n in assert_same_as_eager(model, batch).ops)


def test_checkpointed_layers_and_recurrent_layers():
    from torch.utils.checkpoint import checkpoint

    assert_same_as_eager(model_of(lambda m, x: checkpoint(lambda z: m.lin(z).tanh().sin(), m.lin(x), use_reentrant=False).sum()), x_of())
    gru = nn.GRU(16, 8, batch_first=True)
    assert_same_as_eager(model_of(lambda m, x: m.gru(m.lin(x).view(2, 4, 16))[0].sum(), gru=gru), x_of())


# Optimizer


def optimizers(params):
    return {
        "sgd": (torch.optim.SGD(params, lr=0.1), "SGD", ()),
        "momentum": (torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True), "SGD", ("momentum_buffer",)),
        "adam": (torch.optim.Adam(params, amsgrad=True), "Adam", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        "adamw": (torch.optim.AdamW(params), "AdamW", ("exp_avg", "exp_avg_sq")),
    }


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_each_trained_parameter_has_one_update(name):
    model = model_of(lambda m, x: m.lin(x).sum())
    optimizer, kind, slots = optimizers(list(model.parameters()))[name]
    step = capture(model, x_of(), optimizer=optimizer)
    updates = [n for n in step.ops if n.target is torch.ops.opweave.update.default]
    assert [n.args[3:] for n in updates] == [(kind, 0), (kind, 0)]
    assert [(i.fqn, i.slot) for i in step.inputs if i.kind == "state"] == [(f, s) for f in ("lin.weight", "lin.bias") for s in slots]
    assert [(o.kind, o.slot) for o in step.outputs[1:]] == [("param", ""), *(("state", s) for s in slots)] * 2


def test_parameter_groups():
    model = model_of(lambda m, x: m.lin(x).sum())
    groups = [{"params": [model.lin.bias], "weight_decay": 0.0}, {"params": [model.lin.weight], "momentum": 0.9}]
    step = capture(model, x_of(), optimizer=torch.optim.SGD(groups, lr=0.1))
    assert {i.fqn: i.group for i in step.inputs if i.kind == "param"} == {"lin.weight": 1, "lin.bias": 0}
    assert [(i.fqn, i.slot) for i in step.inputs if i.kind == "state"] == [("lin.weight", "momentum_buffer")]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradient_clipping_is_that_of_torch(max_norm):
    model, batch = zoo.load("mlp-tiny")
    model, batch = model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    step = capture(model, batch, clip_grad_norm=max_norm)
    results = interpret(step, inputs_of(step, model, batch))
    default_loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for output, result in zip(step.outputs, results, strict=True):
        if output.kind == "grad":
            torch.testing.assert_close(result, model.get_parameter(output.fqn).grad, rtol=1e-12, atol=0)
