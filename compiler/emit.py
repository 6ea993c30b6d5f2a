"""Writing nodes of a local graph, and how one op is cut: what `lower` and the local forms of `local_ops` share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ..runtime import collectives
from ..runtime.sharding import ShardSpec
from ..torch_compat import OpOverload
from .factors import BoundOp
from .rule import tensor_args
from .rule_table import argument
from .strategies import OpStrategy


class Emitter:
    """Writes nodes of the local graph; the interface `local_ops` uses."""

    def __init__(self, mesh: tuple[int, ...], device: str = "cpu") -> None:
        self.mesh = mesh
        self.graph = fx.Graph()
        self.device = device
        self.coords = self.graph.placeholder("coords")
        self.collective_axes: set[tuple[int, ...]] = set()

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One call. Ops that make a tensor from none make it on the program's device."""
        if kwargs.get("device") is not None or (_makes_tensor(target) and not any(isinstance(a, fx.Node) for a in args)):
            kwargs["device"] = torch.device(self.device)
        return self.graph.create_node("call_function", target, args, kwargs)

    def start(self, target: Callable[..., Any], x: Any, axes: tuple[int, ...], *args: Any) -> fx.Node:
        """Start a collective; wait with `wait`."""
        self.collective_axes.add(axes)
        return self.op(target, x, axes, *args)

    def wait(self, pending: fx.Node) -> fx.Node:
        """The result of a started collective."""
        return self.op(collectives.wait, pending)

    def all_reduce(self, x: fx.Node, axes: tuple[int, ...], kind: str) -> fx.Node:
        """Combine over axes and wait. kind: sum, max or min."""
        return self.wait(self.start(collectives.all_reduce, x, axes, kind))

    def offset(self, axes: tuple[int, ...], local_size: int) -> fx.Node:
        """The first global index of this device's contiguous piece."""
        return self.op(collectives.shard_offset, self.coords, axes, self._sizes(axes), local_size)

    def zero_unless_first(self, x: fx.Node, axes: tuple[int, ...]) -> fx.Node:
        """A replicated tensor as a partial sum."""
        return self.op(collectives.zero_unless_first, x, self.coords, axes)

    def take(self, x: fx.Node, axes: tuple[int, ...], dim: int, outer: int) -> fx.Node:
        """This device's slice."""
        return self.op(collectives.take_shard, x, self.coords, axes, self._sizes(axes), dim, outer)

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.mesh[a] for a in axes)


@lru_cache(maxsize=4096)
def _makes_tensor(target: Any) -> bool:
    return isinstance(target, OpOverload) and any(a.name == "device" for a in target._schema.arguments)


@dataclass(slots=True)
class Cut:
    """How one op is cut; what a local form asks."""

    node: fx.Node
    bound: BoundOp
    strategy: OpStrategy
    operands: list[ShardSpec]
    results: list[ShardSpec | None]
    mesh: tuple[int, ...]

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument of the global op by schema name."""
        return argument(self.node, name, default)

    def operand_shape(self, index: int) -> tuple[int, ...]:
        return self.operands[index].local_shape()

    def operand_whole(self, index: int) -> tuple[int, ...]:
        return self.operands[index].shape

    def operand_dtype(self, index: int) -> torch.dtype:
        return tensor_args(self.node)[index].meta["val"].dtype

    def result_shape(self, index: int = 0) -> tuple[int, ...]:
        return self._result(index).local_shape()

    def result_whole(self, index: int = 0) -> tuple[int, ...]:
        return self._result(index).shape

    def result_spec(self, index: int = 0) -> ShardSpec:
        return self._result(index)

    def _result(self, index: int) -> ShardSpec:
        spec = self.results[index]
        assert spec is not None, f"result {index} of {self.node.name} is unused and has no layout"
        return spec

    def operand_axes(self, index: int, dim: int) -> tuple[int, ...]:
        """Mesh axes that split a dim of an operand, ascending."""
        return _axes_of(self.operands[index], dim)

    def result_axes(self, dim: int, index: int = 0) -> tuple[int, ...]:
        """Mesh axes that split a dim of a result, ascending."""
        return _axes_of(self._result(index), dim)

    def pieces(self, letter: str) -> int:
        """Into how many pieces a letter of the rule is cut."""
        names = self.bound.names
        axes = zip(self.strategy.codes, self.mesh, strict=True)
        return math.prod(n for c, n in axes if c >= 0 and names[c].split(".")[0] == letter)

    def num_pieces_reduced(self) -> int:
        """Into how many pieces the reduced letters are cut."""
        atoms = self.bound.results[0] or ()
        return math.prod(n for c, n in zip(self.strategy.codes, self.mesh, strict=True) if c >= 0 and c not in atoms)


def _axes_of(spec: ShardSpec, dim: int) -> tuple[int, ...]:
    dim = dim % len(spec.shape)
    return tuple(a for a, entry in enumerate(spec.axes) if isinstance(entry, tuple) and entry[0] == dim)
