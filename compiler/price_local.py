"""The price of an op that becomes several when it is cut: that of the local form which lowering writes for it.

A softmax over a split dimension is no fused kernel any more but a maximum, a sum and what lies between, each with its own pass over memory,
and two exchanges. Its price is that of the little program it becomes, as `timeline` has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.simulate import COMPUTE
from ..runtime.meta_ops import MetaOps
from ..runtime.program import LocalProgram, Port
from ..runtime.sharding import ShardSpec
from .emit import Emitter
from .factors import BoundOp, FactorMap
from .layout import Layout, spec_of
from .lower import emit_op
from .rule import tensor_args
from .strategies import OpStrategy
from .timeline import timeline


class LocalSeconds(NamedTuple):
    """Of one op: computing, and exchanging with nothing beside it."""

    kernel_s: float
    exchange_s: float


class LocalPrices:
    """Prices of local forms on one mesh of a cluster."""

    def __init__(self, factors: FactorMap, cluster: Cluster, mesh: tuple[int, ...]) -> None:
        self._factors, self._cluster, self._mesh = factors, cluster, mesh
        self._ops = MetaOps()

    def seconds(self, node: fx.Node, bound: BoundOp, strategy: OpStrategy) -> LocalSeconds:
        """What an op takes under a strategy."""
        line = timeline(self._program(node, bound, strategy), self._cluster, device="meta", ops=self._ops)
        kernel_s = sum(item.seconds for item in line.instructions if item.stream == COMPUTE)
        return LocalSeconds(kernel_s, sum(item.seconds for item in line.instructions) - kernel_s)

    def _program(self, node: fx.Node, bound: BoundOp, strategy: OpStrategy) -> LocalProgram:
        e = Emitter(self._mesh, "meta")
        operands, ports = {}, []
        for i, (value, layout) in enumerate(zip(tensor_args(node), strategy.operands, strict=True)):
            operands[i] = e.graph.placeholder(f"operand{i}")
            val: torch.Tensor = value.meta["val"]
            ports.append(Port(name=operands[i].name, kind="batch", fqn="", dtype=val.dtype, spec=self._spec(value, layout)))
        emit_op(e, self._spec, node, bound, strategy, operands)
        e.graph.output(())
        return LocalProgram(mesh=self._mesh, graph=e.graph, inputs=tuple(ports), outputs=())

    def _spec(self, value: fx.Node, layout: Layout) -> ShardSpec:
        shape = tuple(int(s) for s in value.meta["val"].shape)
        return spec_of(layout, shape, self._factors.dims(value), self._factors.splits(value), self._mesh)
