"""The part of a program that runs once per micro-batch: when its sums are added to, and where it ends.

A sum is added to as soon as its gradient is there. Where the gradient travels between ranks first, it is added once so much has gathered
behind it that it has had the time, and at the latest at the end. Of a parameter that the CPU updates the sum is on the host: each
gradient is sent there, and added when the next one is sent. At the end each buffer's new value goes to the next micro-batch, and the
sums that are exchanged themselves set out, a few at a time.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from .. import torch_compat
from ..runtime import collectives, micro_batches, tiers
from ..runtime.program import STORED_KINDS
from .micro_batches import gradient_sums, sent_to_sum, update_of_sum
from .residency import HOST, ON_DEVICE
from .rule import tensor_args

if TYPE_CHECKING:
    from .lower import Lowering

aten = torch.ops.aten
# What yields all of its operand's elements: in its memory, or in new memory.
_WHOLE = (
    aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten._unsafe_view.default, aten.reshape.default,
    aten.contiguous.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip


class MicroBatchLowering:
    """The sums of one lowering over micro-batches. With one batch nothing is to be done."""

    def __init__(self, lowering: Lowering) -> None:
        self._low = lowering
        self._sums = gradient_sums(lowering.step)
        self._waiting: deque[tuple[fx.Node, Callable[[fx.Node], None]]] = deque()
        self._waiting_bytes = 0.0
        self._bucket_bytes_behind = 0
        self._sent: tuple[fx.Node, fx.Node] | None = None  # (sum, what is on its way to it)
        self.on_host = {total for total in self._sums if self._is_on_host(total)}
        self.is_over = lowering.step.num_micro_batches == 1

    def begin(self, bucket_bytes: int) -> None:
        """The first micro-batch begins; until the end gradients are sent together up to so many bytes."""
        if not self.is_over:
            self._bucket_bytes_behind, self._low.layouts.bucket_bytes = self._low.layouts.bucket_bytes, bucket_bytes

    def add(self, node: fx.Node) -> None:
        """Emit an `opweave::accumulate`, now or when its operand has arrived."""
        value = tensor_args(node)[0]
        if not self._low.travels(value, node):
            self._emit(node)
            return
        self._when_arrived(node, self._emit)

    def end(self) -> None:
        """Nothing that is emitted from here on runs more than once."""
        if self.is_over:
            return
        while self._waiting:
            self._oldest()
        self._add_sent()
        low, step = self._low, self._low.step
        brought = tuple(info.name for info in step.inputs if info.kind not in STORED_KINDS)
        buffers = [info.fqn for info in step.outputs if info.kind == "buffer"]
        new = dict(zip(buffers, map(low.output_of_its_own, step.output_values("buffer")), strict=True))
        old = {low.info(node).fqn: node for node in low.inputs("buffer")}
        for value in step.output_values("extra"):
            if value in old.values():
                low.output_of_its_own(value)
        low.e.op(micro_batches.end, brought, [low.local_input(old[fqn]) for fqn in new], list(new.values()))
        self.is_over = True
        low.layouts.bucket_bytes = self._bucket_bytes_behind
        for total in (total for total in self._sums if total not in self.on_host):
            low.keep(total, "bwd")
            self._when_arrived(total, low.wait_for_kept)  # what it was made of is free then

    def _when_arrived(self, node: fx.Node, then: Callable[[fx.Node], None]) -> None:
        """Do something with what is on its way to or from a sum, once more than two buckets are behind it: it has had the time."""
        self._waiting.append((node, then))
        self._waiting_bytes += self._num_bytes(node)
        while self._waiting_bytes - self._num_bytes(self._waiting[0][0]) > 2 * self._low.layouts.bucket_bytes:
            self._oldest()

    def _oldest(self) -> None:
        node, then = self._waiting.popleft()
        self._waiting_bytes -= self._num_bytes(node)
        then(node)

    def _emit(self, node: fx.Node) -> None:
        if node not in self.on_host:
            self._low.emit(node)
            return
        self._add_sent()
        local = self._low.get(self._as_sent(node), "bwd", self._low.plan.ops[node].operands[0])
        self._sent = (node, self._low.e.op(tiers.offload, local, HOST))

    def _add_sent(self) -> None:
        if self._sent is None:
            return
        node, sent = self._sent
        self._sent = None
        e = self._low.e
        self._low.made(node, e.op(tiers.add_up, e.op(tiers.settle, sent), node.meta["val"].dtype))

    def _as_sent(self, node: fx.Node) -> fx.Node:
        """What is sent to a sum on the host; the narrow form of a gradient where it is cut like the wide one all the way."""
        value, narrow, plan = self._sums[node], sent_to_sum(node), self._low.plan
        if narrow is value:
            return value
        layout = plan.ops[node].operands[0]
        same = plan.ops[value].operands[0] == plan.ops[value].results[0] == plan.kept.get(value, layout) == layout
        return narrow if same else value

    def _is_on_host(self, total: fx.Node) -> bool:
        """Whether the CPU updates the parameter, with gradients in the layout of the sum."""
        plan, op = self._low.plan, update_of_sum(total)
        if op is None or plan.state.get(tensor_args(op)[0], ON_DEVICE).update != HOST:
            return False
        layout = plan.ops[total].results[0]
        return layout == plan.ops[op].operands[1] == plan.kept.get(total, layout)

    def _num_bytes(self, node: fx.Node) -> float:
        spec = self._low.spec(node, self._low.plan.ops[node].operands[0])
        return math.prod(spec.local_shape()) * node.meta["val"].element_size()


def let_sums_take_over(graph: fx.Graph) -> None:
    """Let a sum begin in the memory of its first operand where nothing else refers to that; elsewhere it begins as a copy."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is micro_batches.accumulate:
            node.update_arg(1, _is_for_one_user(node.args[0]))


def _is_for_one_user(value: fx.Node) -> bool:
    """Whether the memory of a value is there for its one user alone, and holds nothing else."""
    while value.op == "call_function" and len(value.users) == 1:
        source = value.args[0] if value.args else None
        if value.target is collectives.wait:
            return True
        if value.target is operator.getitem and isinstance(source, fx.Node):
            return source.target is collectives.wait or _makes_memory(source)
        if value.target not in _WHOLE:
            return _makes_memory(value)
        assert isinstance(source, fx.Node), f"{value.name} is a view of {source!r}"
        value = source
    return False


def _makes_memory(node: fx.Node) -> bool:
    """Whether the results of a call are always new memory, each its own."""
    target = node.target
    return isinstance(target, torch_compat.OpOverload) and not (target.is_view or torch_compat.returns_alias(target) or target in _WHOLE)
