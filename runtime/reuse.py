"""Which gathered parameters can be received in the memory of the old ones.

Where parameters are whole and their update is split (ZeRO-1 and 2), a step ends with all-gathers of the new values. Received in new
memory they would double the parameters for a moment. A gather may write over the old parameter when nothing reads that afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from .. import torch_compat
from . import collectives, update
from .program import LocalProgram, Port

# Overloads that return a view without saying so.
_SILENT_VIEWS = ("aten::_unsafe_view",)


def gathers_in_place(program: LocalProgram) -> dict[fx.Node, dict[int, fx.Node]]:
    """All-gather (or bucket of them) → position of a tensor in it → placeholder of the parameter that may be overwritten."""
    nodes = list(program.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    placeholders = [node for node in nodes if node.op == "placeholder"][1:]
    inputs = {port.key: (node, port) for node, port in zip(placeholders, program.inputs, strict=True)}
    values: Any = nodes[-1].args[0]
    out: dict[fx.Node, dict[int, fx.Node]] = {}
    for value, port in zip(values, program.outputs, strict=True):
        if port.kind != "param" or port.key not in inputs or not isinstance(value, fx.Node):
            continue
        gather, position = _gather_of(value)
        old, old_port = inputs[port.key]
        if gather is not None and _same_layout(old_port, port) and _last_reader(old, gather, order) <= order[gather]:
            out.setdefault(gather, {})[position] = old
    return out


def _gather_of(value: fx.Node) -> tuple[fx.Node | None, int]:
    """The all-gather a value comes from, and its place in it."""
    position = 0
    bucket = value.target is operator.getitem
    if bucket:
        value, position = value.args[0], value.args[1]  # type: ignore[assignment]
    if not isinstance(value, fx.Node) or value.target is not collectives.wait:
        return None, 0
    start: Any = value.args[0]
    return (start, position) if start.target is (collectives.all_gather_bucket if bucket else collectives.all_gather) else (None, 0)


def _same_layout(old: Port, new: Port) -> bool:
    return old.spec is not None and new.spec is not None and old.dtype == new.dtype and old.spec.axes == new.spec.axes


def _last_reader(old: fx.Node, gather: fx.Node, order: dict[fx.Node, int]) -> int:
    """Place of the last node that reads the memory of `old`, the gather's own result aside."""
    last = 0
    seen = {old}
    todo = [old]
    while todo:
        value = todo.pop()
        for user in value.users:
            last = max(last, order[user])
            for alias in () if user is gather else _aliases(value, user):
                if alias not in seen:
                    seen.add(alias)
                    todo.append(alias)
    return last


def _aliases(value: fx.Node, user: fx.Node) -> Iterator[fx.Node]:
    """Results of `user` that may share memory with its operand `value`."""
    if user.op != "call_function":
        return
    if user.target is update.fused_update:
        # Result i is parameter i; an operand is in one place only.
        params: Any = user.args[0] if user.args else user.kwargs["params"]
        if value in params:
            at = list(params).index(value)
            yield from (part for part in user.users if part.target is operator.getitem and part.args[1] == at)
        return
    if isinstance(user.target, torch_compat.OpOverload):
        if torch_compat.returns_alias(user.target) or user.target.name() in _SILENT_VIEWS:
            yield user
        return
    yield user  # a Python function may return its argument
