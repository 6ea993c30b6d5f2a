"""What tests of capture share: small models, and graphs run op by op beside eager PyTorch."""

import contextlib

import torch
from torch import fx, nn

from opweave.compiler.capture import capture, default_loss
from opweave.compiler.capture_tree import batch_tensors
from opweave.compiler.step_graph import StepGraph


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
