"""Capture: the graph, run again, gives eager PyTorch's bits; what cannot be captured says where and what to do."""

import contextlib
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from opweave import zoo
from opweave.compiler.capture import capture, default_loss
from opweave.compiler.capture_errors import CaptureError
from opweave.compiler.capture_tree import batch_tensors
from opweave.compiler.step_graph import StepGraph

TINY = [name for name in zoo.names() if name.endswith("-tiny")]
MOE = ("mixtral-tiny", "qwen3-moe-tiny")


def interpret(step: StepGraph, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run the graph op by op; each result must have the shape, strides and dtype the graph says."""
    values: dict[fx.Node, object] = {}

    def look(arg):
        if isinstance(arg, fx.Node):
            return values[arg]
        return [look(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    with torch.no_grad():
        for node in step.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node.name]
            elif node.op == "output":
                return tuple(values[a] for a in node.args[0])
            else:
                values[node] = node.target(*look(node.args), **node.kwargs)
                check_value(node, values[node])
    raise AssertionError("no output")


def check_value(node, value):
    expected = node.meta["val"]
    if isinstance(expected, torch.Tensor):
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype), node.format_node()
        assert value.numel() < 2 or value.stride() == expected.stride(), node.format_node()


def inputs_of(step, model, batch, seed=1):
    tensors = {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers()), "batch": batch_tensors(batch)}
    found = {i.name: tensors[i.kind][i.fqn].detach().clone() for i in step.inputs if i.kind in tensors}
    return found | {i.name: torch.tensor(seed) for i in step.inputs if i.kind == "seed"}


def eager(model, batch, loss_fn=None, autocast=None):
    """(loss, {fqn: gradient}) of eager PyTorch."""
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        loss = (loss_fn or default_loss)(model, batch)
    loss = loss[0] if isinstance(loss, tuple) else loss
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return loss.detach(), {k: g for k, g in zip(params, grads, strict=True) if g is not None}


def assert_same_as_eager(model, batch, loss_fn=None, autocast=None) -> StepGraph:
    """Bit-equal loss, gradients and changed buffers."""
    step = capture(model, batch, loss_fn=loss_fn, autocast=autocast)
    results = interpret(step, inputs_of(step, model, batch))
    loss, grads = eager(model, batch, loss_fn, autocast)
    buffers = dict(model.named_buffers())
    assert torch.equal(results[0], loss)
    assert {o.fqn for o in step.outputs if o.kind == "grad"} == set(grads)
    for output, result in zip(step.outputs, results, strict=True):
        if output.kind == "grad":
            assert torch.equal(result, grads[output.fqn]), output.fqn
        if output.kind == "buffer":
            assert torch.equal(result, buffers[output.fqn]), output.fqn
    return step


class Model(nn.Module):
    """A linear layer and a function of (model, input) that returns the loss."""

    def __init__(self, function, **modules):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def model_of(function, **modules):
    torch.manual_seed(0)
    return Model(function, **modules)


def x_of(*shape):
    return torch.randn(*(shape or (8, 16)), generator=torch.Generator().manual_seed(2))


def targets(step):
    return {str(n.target) for n in step.ops}


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


# In-place ops


def _writes_to_views(m, x):
    y = m.lin(x)
    part = y[:, 2:6]
    part.mul_(2)
    y[0] = 3.0
    y.view(4, 32).t()[0].add_(1)
    return (y * part.sum()).sum()


def _writes_by_index(m, x):
    h = torch.zeros(8, 16)
    index = torch.arange(8)
    h.index_add_(0, index, m.lin(x))
    h[index, index] = m.lin(x)[:, 0]
    h.scatter_add_(1, torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    out = torch.empty(8, 16)
    torch.add(h.detach(), 1, out=out)
    return (h * out).sum()


def _augmented(m, x):
    y = m.lin(x)
    y += 1
    y /= 2
    y -= x
    y **= 2
    y[..., 0] *= 3
    y.permute(1, 0)[0].zero_()
    y.diagonal().fill_(1.0)
    y.unsqueeze_(0)
    return y.clamp_(max=2.0).mean()


def _reads_after_writes(m, x):
    y = m.lin(x).clone()
    row, rest = y[1], y[2:]
    before = row * 2
    y.masked_fill_(y > 0, 0.5)
    rest.sub_(0.25)
    return (before + row).sum() + rest.sum() + y.relu_().sum()


def _writes_through_transposes(m, x):
    y, z, w = m.lin(x).clone(), torch.zeros(16, 8), torch.ones(4, 2, 16)
    y.t().copy_(torch.arange(128.0).view(16, 8))
    z.t().add_(m.lin(x))
    w.permute(2, 0, 1).view(16, 8)[3:5].mul_(z[3:5])
    w.transpose(0, 1)[1].sub_(torch.ones(16))
    return y.view(-1).sum() + (z.view(-1) * torch.arange(128.0)).sum() + w.view(-1).square().sum()


@pytest.mark.parametrize(
    "function", [_writes_to_views, _writes_by_index, _augmented, _reads_after_writes, _writes_through_transposes]
)
def test_in_place_ops_are_gone_and_right(function):
    assert_same_as_eager(model_of(function), x_of())


def test_changed_buffers_are_outputs():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(16, 16)
            for name in ("count", "average", "untouched"):
                self.register_buffer(name, torch.ones(16 if name == "average" else ()))

        def forward(self, x):
            y = self.lin(x)
            self.count += 1
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
            return ((y - self.average) ** 2).sum() / self.count

    step = assert_same_as_eager(Counts(), x_of())
    assert [o.fqn for o in step.outputs if o.kind == "buffer"] == ["count", "average"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.BatchNorm1d(16, track_running_stats=False), nn.BatchNorm1d(16).eval()])
def test_batch_norm(norm):
    model = model_of(lambda m, x: (m.norm(m.lin(x)) ** 3).sum(), norm=norm)
    if not norm.training:
        model.eval()
    assert_same_as_eager(model, x_of())


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


# Attention and dropout


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


# What cannot be captured


def _numpy(m, x):
    return torch.from_numpy(m.lin(x).detach().numpy()).sum()


def _changes_weights(m, x):
    m.lin.weight.data.mul_(2)
    return m.lin(x).sum()


def _writes_to_expanded(m, x):
    x[:1].expand(8, 16).add_(1)
    return m.lin(x).sum()


ERRORS = {
    "item": (lambda m, x: m.lin(x).sum() * x.sum().item(), r"in the model at test_capture.py:\d+: a Python value is taken from a tensor"),
    "branch": (lambda m, x: m.lin(x).sum() if (x > 0).all() else x.sum(), r"test_capture.py:\d+: a Python value .*torch.where"),
    "boolean index": (lambda m, x: m.lin(x)[x > 0].sum(), r"the result of index has a shape that depends on data .* masked_fill"),
    "nonzero": (lambda m, x: m.lin(x).sum() * x.nonzero().sum(), r"the result of nonzero has a shape that depends on data"),
    "numpy": (_numpy, r"test_capture.py:\d+: .*replace the numpy conversion by torch ops"),
    "shuffle": (lambda m, x: m.lin(x)[torch.randperm(8)].sum(), r"randperm draws random numbers .* pass them in the batch"),
    "resize": (lambda m, x: m.lin(x.clone().resize_(8, 16)).sum(), r"resize_ changes a tensor in place .* make a new tensor"),
    "expanded write": (_writes_to_expanded, r"an in-place write to a view made by expand cannot be captured; .*clone"),
    "reference": (lambda m, x: (m.lin(x) @ m.kept[0]).sum(), r"lin.weight is used through a reference that bypasses its module"),
    "weights": (_changes_weights, r"parameter lin.weight is changed in place during the forward pass"),
    "detached": (lambda m, x: m.lin(x).detach().sum(), r"the loss does not depend on any parameter that requires a gradient"),
    "shape": (lambda m, x: m.lin(x), r"the loss has the shape \(8, 16\); it must be a scalar"),
    "integer": (lambda m, x: m.lin(x).argmax(), r"the loss has the type torch.int64"),
    "nothing": (lambda m, x: None, r"no loss in what Model returned \(NoneType\); pass `loss_fn="),
    "bad shapes": (lambda m, x: (m.lin(x) @ torch.ones(3, 3)).sum(), r"in the model at test_capture.py:\d+: RuntimeError: .*reduction dim"),
    "sparse embedding": (
        lambda m, x: F.embedding(x.long(), m.lin.weight, sparse=True).sum(),
        r"an embedding with sparse=True cannot be captured; leave it at False",
    ),
    "submodule": (lambda m, x: m.sub(m.lin(x)), r"in sub at "),
    "big constant": (lambda m, x: (m.lin(x).sum() * m.table).sum(), r"of 70000 elements .* `register_buffer`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_captured(name):
    function, text = ERRORS[name]
    modules = {"sub": nn.BatchNorm1d(16, momentum=None), "table": torch.randn(70_000)}
    with pytest.raises(CaptureError, match=text):
        model = model_of(function, **modules)
        model.kept = [model.lin.weight]
        capture(model, x_of())


def test_autocast_of_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # as on a machine that has one
    with pytest.raises(CaptureError, match=r'Model is called under torch.autocast\("cuda"\), .*pass `autocast=`'):
        capture(model_of(lambda m, x: m.lin(x).sum()), x_of())


def test_bad_models_batches_and_optimizers():
    model, x = model_of(lambda m, x: m.lin(x).sum()), x_of()
    with pytest.raises(CaptureError, match="has no parameter that requires a gradient"):
        capture(nn.ReLU(), x)
    with pytest.raises(CaptureError, match="wrapped in DataParallel; give the plain module inside"):
        capture(nn.DataParallel(model), x)
    with pytest.raises(CaptureError, match="wrapped in OptimizedModule"):
        capture(torch.compile(model), x)
    with pytest.raises(CaptureError, match=r"give a torch.nn.Module"):
        capture(lambda x: x, x)
    with pytest.raises(CaptureError, match=r"no tensor in the batch \(a dict\)"):
        capture(model, {"a": 3})
    with pytest.raises(CaptureError, match=r"capture failed in lin at .*: addmm gets float32 and float64 tensors; cast the batch"):
        capture(model, x.double())
    with pytest.raises(CaptureError, match=r"batch 0 has the layout torch.sparse_coo"):
        capture(model, (x.to_sparse(),))
    with pytest.raises(ValueError, match=r"optimizer torch.optim.rmsprop.RMSprop is not supported; supported: SGD, Adam, AdamW"):
        capture(model, x, optimizer=torch.optim.RMSprop(model.parameters()))
    with pytest.raises(ValueError, match=r"parameter group 0 of SGD holds a tensor of shape \(3,\) that is no parameter of the model"):
        capture(model, x, optimizer=torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1))
    with pytest.raises(ValueError, match="differentiable=True"):
        capture(model, x, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))
