"""When the optimizer updates of a step are emitted, in which calls, and where what they change goes back to.

Late: behind the backward pass, one fused call per parameter group. Early: each parameter as soon as its gradient is complete and nobody
reads the old value any more, in calls of about a bucket, so that gradients need not all be there at once. What the gradient norm clips,
or several micro-batches add up, is complete only at the end: every update is a late one then.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..runtime import tiers, update
from ..runtime.sharding import ShardSpec
from .factors import is_getitem
from .micro_batches import is_sum
from .residency import DEVICE, HOST, ON_DEVICE, RECOMPUTE, StatePlace, Uses, unit_of
from .rule import tensor_args
from .rule_table import UPDATE, argument, op_name

if TYPE_CHECKING:
    from .lower import Assignment, Lowering

_COPIED_PORTION = 1 / 4  # of a bucket

NewValues = dict[tuple[str, str, str], tuple[fx.Node, ShardSpec]]
_Key = tuple[str, int, StatePlace]


class UpdateQueue:
    """The updates of one lowering. `after(op)` while ops are emitted, `finish()` once they all are."""

    def __init__(self, lowering: Lowering) -> None:
        self._low = lowering
        self._plan = lowering.plan
        self._open: dict[_Key, list[fx.Node]] = defaultdict(list)
        self._filled: dict[_Key, int] = defaultdict(int)  # bytes in the open bucket
        self._full: list[tuple[_Key, list[fx.Node]]] = []
        self._new: NewValues = {}
        self._returning: list[tuple[fx.Node, Callable[[], fx.Node]]] = []
        # Updates under way, with their gradients, waited for at the end; gradients sent for an update of the next step.
        self._on_cpu: list[tuple[list[fx.Node], fx.Node, list[fx.Node], StatePlace]] = []
        self._deferred: list[tuple[fx.Node, fx.Node]] = []
        self._left = [node for node in lowering.step.ops if op_name(node) == UPDATE]
        self._due = due_after(lowering.uses, lowering.plan.residency) if lowering.plan.early_updates else {}

    def resume(self) -> None:
        """At the beginning of the step: start what the last one deferred, in the order in which the forward pass reads."""
        deferred = [op for op in self._left if self._defers(op)]
        readers, order = self._low.uses.readers_of_inputs, self._low.uses.order
        for op in sorted(deferred, key=lambda op: order[readers[tensor_args(op)[0]][0]]):
            param, _, *states = tensor_args(op)
            local = [self._low.local_input(value) for value in (param, *states)]
            started = self._low.e.op(tiers.start_deferred, local[:1], [local[1:]], [self._low.info(param).fqn])
            for i, value in enumerate((param, *states)):
                self._low.replace_input(value, self._low.e.op(operator.getitem, started, i))

    def _defers(self, op: fx.Node) -> bool:
        return op in self._low.narrow and self._plan.state[tensor_args(op)[0]].deferred

    def after(self, node: fx.Node) -> None:
        """An op has been emitted: the updates that waited for it join their bucket; a full bucket goes once the next one is full too,
        so that its gradients have the time of a bucket to be summed over the ranks."""
        for op in self._due.get(node, ()):
            self._left.remove(op)
            key = self._key(op)
            bucket = self._open[key]
            bucket.append(op)
            self._filled[key] += self._num_bytes(op)
            if self._filled[key] >= self._call_bytes(key):
                self._filled[key] = 0
                self._full.append((key, self._open.pop(key)))
            while len(self._full) > (1 if math.prod(self._low.mesh) > 1 else 0):
                self._emit(*self._full.pop(0))

    def finish(self) -> NewValues:
        """Emit what is left; the new values of all parameters and states."""
        for op in self._left:
            self._open[self._key(op)].append(op)
        for key, ops in (*self._full, *self._open.items()):
            for call in self._calls(key, ops):
                self._emit(key, call)
        for op, sent in self._deferred:
            self._defer(op, sent)
        for ops, started, settled, place in self._on_cpu:
            self._results(ops, self._low.e.op(tiers.updated, started, settled), place)
        for param, returned in self._returning:
            self._new["param", self._low.info(param).fqn, ""] = (returned(), self._low.stored_spec(param))
        return self._new

    # -- calls ------------------------------------------------------------------------------------------------------------

    def _key(self, op: fx.Node) -> _Key:
        place = self._plan.state.get(tensor_args(op)[0], ON_DEVICE)
        return argument(op, "kind"), argument(op, "group"), place

    def _num_bytes(self, op: fx.Node) -> int:
        param = tensor_args(op)[0]
        spec = self._low.spec(param, self._plan.ops[op].operands[0])
        return math.prod(spec.local_shape()) * param.meta["val"].element_size()

    def _calls(self, key: _Key, ops: list[fx.Node]) -> list[list[fx.Node]]:
        """What lives on the device is updated in one call; what is fetched for its update in calls of a bucket."""
        if key[2] == ON_DEVICE:
            return [ops] if ops else []
        calls: list[list[fx.Node]] = [[]]
        for op in ops:
            if calls[-1] and sum(map(self._num_bytes, calls[-1])) >= self._call_bytes(key):
                calls.append([])
            calls[-1].append(op)
        return [call for call in calls if call]

    def _call_bytes(self, key: _Key) -> float:
        """What is updated together: what has to be copied for it in smaller portions, since behind the last gradient everything waits for
        the last portion to be sent, updated and written back."""
        return self._low.layouts.bucket_bytes * (1 if key[2] == ON_DEVICE else _COPIED_PORTION)

    def _emit(self, key: _Key, ops: list[fx.Node]) -> None:
        kind, group, place = key
        fqns = [self._low.info(tensor_args(op)[0]).fqn for op in ops]
        if place.update == HOST:
            self._send(key, ops, fqns)
        else:
            self._results(ops, self._on_device(kind, group, ops, fqns), place)

    def _results(self, ops: list[fx.Node], result: fx.Node, place: StatePlace) -> None:
        """Take apart what an update yields: parameters, then states."""
        e, at = self._low.e, len(ops)
        for i, op in enumerate(ops):
            param, _, *states = tensor_args(op)
            self._new_param(op, param, e.op(operator.getitem, result, i), place)
            for state in states:
                piece = e.op(operator.getitem, result, at)
                at += 1
                if place.state != DEVICE and place.update == DEVICE:
                    piece = self._write_back(state, piece)
                info = self._low.info(state)
                self._new["state", info.fqn, info.slot] = (piece, self._low.stored_spec(state))

    def _on_device(self, kind: str, group: int, ops: list[fx.Node], fqns: list[str]) -> fx.Node:
        params, grads, states = [], [], []
        for op in ops:
            layouts = self._plan.ops[op].operands
            local = [self._low.get(v, "update", layout) for v, layout in zip(tensor_args(op), layouts, strict=True)]
            params.append(local[0])
            grads.append(local[1])
            states.append(local[2:])
        return self._low.e.op(update.fused_update, params, grads, states, kind, group, fqns, self._low.loss())

    def _send(self, key: _Key, ops: list[fx.Node], fqns: list[str]) -> None:
        """Send gradients to the CPU, whose update begins when they have arrived. The step goes on: they are let go (settled) at the end, or
        where the schedule knows them to be there."""
        kind, group, place = key
        sent = [self._send_gradient(op) for op in ops]
        if place.deferred and all(map(self._defers, ops)):
            self._deferred += [(op, self._low.e.op(tiers.settle, grad)) for op, grad in zip(ops, sent, strict=True)]
            return
        params = [self._low.local_input(tensor_args(op)[0]) for op in ops]
        states = [[self._low.local_input(slot) for slot in tensor_args(op)[2:]] for op in ops]
        started = self._low.e.op(tiers.host_update, params, sent, states, kind, group, fqns, self._low.loss())
        settled = [self._low.e.op(tiers.settle, grad) for grad in sent if grad.target in (tiers.offload, tiers.send_gradient)]
        self._on_cpu.append((ops, started, settled, place))

    def _send_gradient(self, op: fx.Node) -> fx.Node:
        param, grad = tensor_args(op)[:2]
        layout = self._plan.ops[op].operands[1]
        if op in self._low.narrow:
            local = self._low.get(self._low.narrow[op], "bwd", layout)
            return self._low.e.op(tiers.send_gradient, self._low.local_input(param), local)
        local = self._low.get(grad, "update", layout)
        return local if grad in self._low.micro_batches.on_host else self._low.e.op(tiers.offload, local, HOST)

    def _defer(self, op: fx.Node, settled: fx.Node) -> None:
        """Leave an update to the next step, each by itself: so it is taken up again."""
        param, _, *states = tensor_args(op)
        kind, group, place = self._key(op)
        local = [self._low.local_input(value) for value in (param, *states)]
        fqns = [self._low.info(param).fqn]
        kept = self._low.e.op(tiers.defer_update, local[:1], [settled], [local[1:]], kind, group, fqns, self._low.loss())
        self._results([op], kept, place)

    # -- new values -------------------------------------------------------------------------------------------------------

    def _new_param(self, op: fx.Node, param: fx.Node, local: fx.Node, place: StatePlace) -> None:
        """Bring a new parameter back to the layout it is stored in."""
        name = ("param", self._low.info(param).fqn, "")
        if place.update == HOST:
            self._new[name] = (local, self._low.stored_spec(param))
            return
        made = self._plan.ops[op].results[0]
        assert made is not None, f"{op.name} has no layout"
        returned = self._low.layouts.reshard(param, local, made, self._plan.inputs[param], bucket=place.param == DEVICE)
        if place.param == DEVICE:
            self._returning.append((param, returned))  # waited for at the end, when all have started
        else:
            whole = returned()
            if place.cast:
                self._write_back_cast(param, whole)
            self._new[name] = (self._write_back(param, whole), self._low.stored_spec(param))

    def _write_back(self, stored: fx.Node, local: fx.Node) -> fx.Node:
        return self._low.e.op(tiers.settle, self._low.e.op(tiers.write_back, self._low.local_input(stored), local))

    def _write_back_cast(self, param: fx.Node, local: fx.Node) -> None:
        e, cast = self._low.e, self._low.uses.casts[param]
        narrow = e.op(torch.ops.aten._to_copy.default, local, dtype=cast.meta["val"].dtype)
        e.op(tiers.settle, e.op(tiers.write_back_cast, self._low.local_input(param), narrow))


def sent_narrow(uses: Uses, plan: Assignment, op: fx.Node) -> fx.Node | None:
    """The gradient of an update on the CPU before it is cast to the parameter's type, where nothing else is done to it behind that."""
    narrow, (param, grad) = uses.narrow_gradient(op), tensor_args(op)[:2]
    if narrow is None:
        return None
    cast, layout = plan.ops[grad], plan.inputs[param]
    same = cast.operands[0] == cast.results[0] == plan.ops[op].operands[1] == plan.kept.get(grad, layout) == layout
    return narrow if same else None


def due_after(uses: Uses, residency: dict[fx.Node, str]) -> dict[fx.Node, list[fx.Node]]:
    """Op → the updates that may run behind it: the gradient is complete, and the old parameter has been read for the last time, also by
    ops that are run again. Updates that wait for the end (gradients clipped, or summed over micro-batches) are in no list."""
    order, nodes = uses.order, list(uses.order)
    again = needed_again(uses, residency)
    last_read = {
        root: max(max(order[node], again.get(node, 0)) for node in readers) for root, readers in uses.readers_of_inputs.items()
    }
    out: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for param, op in uses.parameters():
        maker = unit_of(tensor_args(op)[1])
        if maker.op == "call_function" and maker.meta["op"].phase == "bwd" and not is_sum(maker):
            grad = tensor_args(op)[1]
            ready = max(order[grad.args[0] if is_getitem(grad) else grad], last_read.get(param, 0))  # type: ignore[index]
            out[nodes[ready]].append(op)
    return out


def needed_again(uses: Uses, residency: dict[fx.Node, str]) -> dict[fx.Node, int]:
    """Unit that is run again → the last time at which that can happen."""
    last: dict[fx.Node, int] = {}
    for unit in reversed(uses.units):
        if residency.get(unit) == RECOMPUTE:
            times = [uses.order[op] for op in uses.later[unit]] + [last.get(user, 0) for user in uses.consumers[unit]]
            last[unit] = max(times, default=0)
    return last
