"""Repeated blocks: which ops and parameters are the same one in different layers, and therefore share their choice.

Two ops are the same when they stand at the same place of the same phase of modules whose paths differ only in numbers
("layers.3.mlp.fc1" and "layers.7.mlp.fc1"), and have the same rule over atoms of the same sizes. Nothing is assumed about the
layers' neighbours: the selection problem is the quotient of the graph, every edge counted as often as it occurs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable

from torch import fx

from .factors import FactorMap, is_getitem
from .rule_table import op_name
from .step_graph import GraphInput, StepGraph

_NUMBER = re.compile(r"(^|\.)\d+(?=\.|$)")


def normalise(path: str) -> str:
    """A module path with its numbers replaced: "layers.3.mlp" is "layers.*.mlp"."""
    return _NUMBER.sub(r"\1*", path)


def op_keys(step: StepGraph, factors: FactorMap) -> dict[fx.Node, Hashable]:
    """For every op the key of its class; ops with equal keys share one choice."""
    ordinal: dict[tuple[str, str, str], int] = defaultdict(int)
    keys: dict[fx.Node, Hashable] = {}
    for node in step.ops:
        if is_getitem(node):
            continue
        info = node.meta["op"]
        name = op_name(node)
        # Updates have no module of their own: their parameter tells them apart.
        path = normalise(info.path)
        place = (info.path, info.phase, name)
        at = ordinal[place]
        ordinal[place] += 1
        bound = factors.bind(node)
        dtype = tuple(str(v.dtype) for v in _values(node))
        keys[node] = (path, info.phase, name, at, bound, dtype)
    return keys


def _values(node: fx.Node) -> list:  # type: ignore[type-arg]
    val = node.meta["val"]
    return [v for v in (val if isinstance(val, (list, tuple)) else [val]) if hasattr(v, "dtype")]


def input_key(info: GraphInput, node: fx.Node, factors: FactorMap) -> Hashable:
    """The class of a stored tensor: parameters of equal layers share their layout."""
    return (
        info.kind,
        normalise(info.fqn),
        info.slot,
        factors.dims(node),
        str(node.meta["val"].dtype),
        node.meta["val"].requires_grad,
        info.group,
    )
