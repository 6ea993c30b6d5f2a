"""The optimizer as ops of the graph: gradient clipping, then one `opweave::update` per trained parameter.

The graph says which state each parameter has; numbers such as the learning rate are read from the optimizer at every step by the
runtime, which also keeps the step count.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .capture_record import Origin
from .step_graph import GraphOutput

if TYPE_CHECKING:
    from .capture import _Trace

aten = torch.ops.aten
SUPPORTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """kind: the optimizer's class name. group_of: parameter group of each trained parameter. slots: state names per group."""

    kind: str
    group_of: dict[str, int]
    slots: tuple[tuple[str, ...], ...]


def read_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerSpec:
    """What the graph needs to know of a torch optimizer. Raises ValueError on one that is not supported or not of this model."""
    kind = type(optimizer)
    if kind not in SUPPORTED:
        names = ", ".join(c.__name__ for c in SUPPORTED)
        raise ValueError(
            f"the optimizer {kind.__module__}.{kind.__name__} is not supported; supported: {names} of torch.optim. "
            "Without an optimizer, capture returns gradients and the update is yours"
        )
    fqns = {id(p): fqn for fqn, p in model.named_parameters()}
    group_of: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        _check_group(kind.__name__, index, group)
        for param in group["params"]:
            if id(param) not in fqns:
                raise ValueError(
                    f"parameter group {index} of {kind.__name__} holds a tensor of shape {tuple(param.shape)} that is no parameter of the "
                    "model; make the optimizer from `model.parameters()` after the last change of the model"
                )
            group_of[fqns[id(param)]] = index
    slots = tuple(_slots(kind.__name__, group) for group in optimizer.param_groups)
    return OptimizerSpec(kind=kind.__name__, group_of=group_of, slots=slots)


def _check_group(kind: str, index: int, group: dict[str, Any]) -> None:
    for option in ("differentiable",):
        if group.get(option):
            raise ValueError(f"parameter group {index} of {kind} has {option}=True, which is not supported; leave it at False")


def _slots(kind: str, group: dict[str, Any]) -> tuple[str, ...]:
    if kind == "SGD":
        return ("momentum_buffer",) if group["momentum"] != 0 else ()
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


Outputs = list[tuple[GraphOutput, fx.Node]]


def add_update(trace: _Trace, spec: OptimizerSpec | None, grads: dict[str, fx.Node], clip: float | None) -> Outputs:
    """Append clipping and updates; the outputs they lead to (clipped gradients without an optimizer)."""
    if clip is not None and grads:
        grads = _clip(trace, grads, clip)
    if spec is None:
        return [(GraphOutput(kind="grad", fqn=fqn), node) for fqn, node in grads.items()]
    outputs: Outputs = []
    params = {i.fqn: i.name for i in trace.inputs if i.kind == "param"}
    placeholders = {n.name: n for n in trace.recorder.graph.nodes if n.op == "placeholder"}
    for fqn, grad in grads.items():
        outputs += _update(trace, spec, fqn, placeholders[params[fqn]], grad)
    return outputs


def _update(trace: _Trace, spec: OptimizerSpec, fqn: str, param: fx.Node, grad: fx.Node) -> Outputs:
    """One parameter's update node and what is picked from it."""
    group = spec.group_of[fqn]
    val = param.meta["val"]
    slots = spec.slots[group]
    state = [trace.add_placeholder("state", fqn, val, slot=slot, group=group) for slot in slots]
    recorder = trace.recorder
    recorder.set_origin(Origin(fqn.rpartition(".")[0], "update", ""))
    node = recorder.emit(torch.ops.opweave.update.default, (param, grad, state, spec.kind, group), {}, (val,) * (1 + len(slots)))
    picked = [recorder.emit(operator.getitem, (node, i), {}, val) for i in range(1 + len(slots))]
    outputs = [(GraphOutput(kind="param", fqn=fqn), picked[0])]
    outputs += [(GraphOutput(kind="state", fqn=fqn, slot=slot), item) for slot, item in zip(slots, picked[1:], strict=True)]
    return outputs


def _clip(trace: _Trace, grads: dict[str, fx.Node], max_norm: float) -> dict[str, fx.Node]:
    """Gradients scaled as by `torch.nn.utils.clip_grad_norm_`, the norm written as the root of a sum of squares.

    So each gradient may be in pieces: their sums of squares add up. Half-precision gradients are squared in float32.
    """
    recorder = trace.recorder
    squares = []
    for fqn, grad in grads.items():
        recorder.set_origin(Origin(fqn.rpartition(".")[0], "update", ""))
        squares.append(_sum_of_squares(trace, grad))
    recorder.set_origin(Origin("", "update", ""))
    total = _sum(trace, squares)
    scalar = total.meta["val"]
    norm = recorder.emit(aten.sqrt.default, (total,), {}, scalar)
    shifted = recorder.emit(aten.add.Tensor, (norm, 1e-6), {}, scalar)
    inverse = recorder.emit(aten.reciprocal.default, (shifted,), {}, scalar)
    ratio = recorder.emit(aten.mul.Tensor, (inverse, float(max_norm)), {}, scalar)
    factor = recorder.emit(aten.clamp.default, (ratio, None, 1.0), {}, scalar)
    clipped = {}
    for fqn, grad in grads.items():
        recorder.set_origin(Origin(fqn.rpartition(".")[0], "update", ""))
        clipped[fqn] = recorder.emit(aten.mul.Tensor, (grad, _cast(trace, factor, grad.meta["val"].dtype)), {}, grad.meta["val"])
    return clipped


def _cast(trace: _Trace, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    val = node.meta["val"]
    if val.dtype == dtype:
        return node
    cast = trace.recorder.val_of(tuple(val.shape), val.stride(), dtype)
    return trace.recorder.emit(aten._to_copy.default, (node,), {"dtype": dtype}, cast)


def _sum_of_squares(trace: _Trace, grad: fx.Node) -> fx.Node:
    wide = torch.promote_types(grad.meta["val"].dtype, torch.float32)
    grad = _cast(trace, grad, wide)
    square = trace.recorder.emit(aten.mul.Tensor, (grad, grad), {}, grad.meta["val"])
    return trace.recorder.emit(aten.sum.default, (square,), {}, trace.recorder.val_of((), (), wide))


def _sum(trace: _Trace, scalars: list[fx.Node]) -> fx.Node:
    """Sum of 0-dim nodes of one or more types, in the widest."""
    dtypes = {n.meta["val"].dtype for n in scalars}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    scalars = [_cast(trace, n, wide) for n in scalars]
    stacked = trace.recorder.emit(aten.stack.default, (scalars,), {}, trace.recorder.val_of((len(scalars),), None, wide))
    return trace.recorder.emit(aten.sum.default, (stacked,), {}, trace.recorder.val_of((), (), wide))
