"""Layout changes in the local program: the collectives of `reshard.steps`, those of small gradients sent together.

The last collective of a change starts where the tensor is ready and is waited for where the result is first asked for.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..runtime import collectives
from ..runtime.sharding import ShardSpec
from .emit import Emitter
from .factors import FactorMap
from .layout import PARTIAL_NAME, Layout
from .reshard import Step, steps

# A gradient holds its memory on every rank until it is waited for: no more than so many buckets are sent before the oldest is.
_NUM_UNDER_WAY = 4
_LOCAL = ("slice", "zero")  # steps without messages


@dataclass(slots=True)
class Later:
    """A tensor whose last collective is under way: emitted `wait` on first use."""

    get: Callable[[], fx.Node]
    node: fx.Node | None = None

    def __call__(self) -> fx.Node:
        if self.node is None:
            self.node = self.get()
        return self.node


def ready(node: fx.Node) -> Later:
    """A tensor that is there."""
    return Later(lambda: node, node)


@dataclass(slots=True)
class _Bucket:
    """Tensors waiting to be sent together."""

    items: list[tuple[fx.Node, tuple[Any, ...]]] = field(default_factory=list)
    num_bytes: float = 0.0
    sent: fx.Node | None = None
    arrived: fx.Node | None = None  # what the wait for it yields


@dataclass(slots=True, eq=False)
class _Journey:
    """A gradient on its way through several collectives: where it is, and what is left. num_bytes: that it holds until then."""

    value: fx.Node
    later: Later
    legs: list[tuple[Step, tuple[int, ...]]]
    num_bytes: float


class Resharding:
    """Brings local tensors into other layouts.

    spec: the ShardSpec of a value in a layout. is_written: whether a value is stored and updated in place. bucket_bytes: gradients and
    new parameters are sent together up to this many; may be changed on the way.
    """

    def __init__(
        self, emitter: Emitter, factors: FactorMap, spec: Callable[[fx.Node, Layout], ShardSpec], is_written: Callable[[fx.Node], bool],
        bucket_bytes: int,
    ) -> None:  # fmt: skip
        self._e, self._factors, self._spec, self._is_written = emitter, factors, spec, is_written
        self._mesh = emitter.mesh
        self.bucket_bytes = bucket_bytes
        self._buckets: dict[tuple[Any, ...], _Bucket] = {}
        self._under_way: deque[_Bucket] = deque()
        self._half_way: deque[_Journey] = deque()

    def reshard(self, value: fx.Node, node: fx.Node, source: Layout, target: Layout, *, bucket: bool = False) -> Later:
        """A local tensor of a value brought into another layout; the last collective is waited for when the result is asked for."""
        legs = self._legs(source, target)
        if bucket and sum(step.kind not in _LOCAL for step, _ in legs) > 1:
            return self._travel(_Journey(value, ready(node), legs, _local_bytes(value, self._spec(value, source))))
        later = ready(node)
        for i, (step, axes) in enumerate(legs):
            later = self._step(value, later(), step, axes, bucket=bucket and i == len(legs) - 1)
        return later

    def _legs(self, source: Layout, target: Layout) -> list[tuple[Step, tuple[int, ...]]]:
        """Steps with their axes. All-reduces of one kind over several axes are one all-reduce over all of them."""
        out: list[tuple[Step, tuple[int, ...]]] = []
        for step in steps(source, target, self._mesh):
            if out and step.kind == out[-1][0].kind == "all_reduce" and step.source == out[-1][0].source:
                out[-1] = (out[-1][0], tuple(sorted((*out[-1][1], step.axis))))
            else:
                out.append((step, (step.axis,)))
        return out

    def _travel(self, journey: _Journey) -> Later:
        """A gradient that is reduced over one axis and then over another starts its second leg when a few buckets of others have begun
        their first: waiting for the first at once would let the backward pass wait for whatever is under way before it."""
        self._next_leg(journey)
        self._half_way.append(journey)
        while self._has_waited(self._half_way):
            oldest = self._half_way.popleft()
            self._next_leg(oldest)
            if oldest.legs:
                self._half_way.append(oldest)

        def get() -> fx.Node:
            if journey in self._half_way:
                self._half_way.remove(journey)
            while journey.legs:
                self._next_leg(journey)
            return journey.later()

        return Later(get)

    def _next_leg(self, journey: _Journey) -> None:
        """Wait for the collective that is under way and start the next."""
        while journey.legs:
            step, axes = journey.legs.pop(0)
            journey.later = self._step(journey.value, journey.later(), step, axes, bucket=not journey.legs)
            if step.kind not in _LOCAL:
                break

    def _has_waited(self, queue: deque[_Bucket] | deque[_Journey]) -> bool:
        """Whether so much is behind the first of a queue that it has had the time."""
        return sum(item.num_bytes for item in queue) - queue[0].num_bytes > _NUM_UNDER_WAY * self.bucket_bytes

    def _step(self, value: fx.Node, x: fx.Node, step: Step, axes: tuple[int, ...], *, bucket: bool) -> Later:
        spec = self._spec(value, step.before)
        e = self._e
        if step.kind == "slice":
            piece = e.take(x, axes, *self._place(value, spec, step.target))
            # Some kernels of torch take saved statistics for contiguous without looking. State stays a view: updates write through it.
            written = self._is_written(value)
            return ready(piece if written else e.op(torch.ops.aten.contiguous.default, piece))
        if step.kind == "zero":
            return ready(e.zero_unless_first(x, axes))
        kind = PARTIAL_NAME.get(step.source, "sum")
        if step.kind == "all_reduce":
            if bucket:
                return self._bucketed(value, x, spec, ("all_reduce", axes, kind), ())
            pending = e.start(collectives.all_reduce, x, axes, kind)
        elif step.kind == "reduce_scatter":
            place = self._place(value, spec, step.target)
            if bucket:
                return self._bucketed(value, x, spec, ("reduce_scatter", axes, kind), place)
            pending = e.start(collectives.reduce_scatter, x, axes, *place, kind)
        elif step.kind == "all_gather":
            place = self._place(value, spec, step.source)
            if bucket:
                return self._bucketed(value, x, spec, ("all_gather", axes, ""), place)
            pending = e.start(collectives.all_gather, x, axes, *place)
        else:
            split, gather = self._place(value, spec, step.target), self._place(value, spec, step.source)
            pending = e.start(collectives.all_to_all, x, axes, *split, *gather)
        return Later(lambda: e.wait(pending))

    def _place(self, value: fx.Node, spec: ShardSpec, atom: int) -> tuple[int, int]:
        """(dim, product of the local sizes of the dim's factors outside this atom)."""
        dim, index = self._factors.splits(value)[atom]
        return dim, math.prod(spec.local_factors()[dim][:index])

    # -- buckets ----------------------------------------------------------------------------------------------------------

    def _bucketed(self, value: fx.Node, x: fx.Node, spec: ShardSpec, key: tuple[Any, ...], place: tuple[Any, ...]) -> Later:
        val = value.meta["val"]
        full = (*key, val.dtype)
        bucket = self._buckets.setdefault(full, _Bucket())
        at = len(bucket.items)
        bucket.items.append((x, place))
        bucket.num_bytes += _local_bytes(value, spec)
        if bucket.num_bytes >= self.bucket_bytes:
            self._send(full)

        def get() -> fx.Node:
            if bucket.sent is None:
                self._send(full)
            result = self._wait(bucket)
            return self._e.op(operator.getitem, result, at) if len(bucket.items) > 1 else result

        return Later(get)

    def _wait(self, bucket: _Bucket) -> fx.Node:
        if bucket.arrived is None:
            assert bucket.sent is not None, "a bucket is waited for before it is sent"
            bucket.arrived = self._e.wait(bucket.sent)
        return bucket.arrived

    def _send(self, key: tuple[Any, ...]) -> None:
        bucket = self._buckets.pop(key)
        self._start(bucket, key)
        if key[0] != "all_gather":
            self._under_way.append(bucket)
            while self._has_waited(self._under_way):
                self._wait(self._under_way.popleft())

    def _start(self, bucket: _Bucket, key: tuple[Any, ...]) -> None:
        kind, axes, op, _ = key
        xs = [x for x, _ in bucket.items]
        places = [p for _, p in bucket.items]
        if len(xs) == 1:
            args = (*places[0], op) if op else places[0]
            bucket.sent = self._e.start(getattr(collectives, kind), xs[0], axes, *args)
            return
        target = getattr(collectives, kind + "_bucket")
        if kind == "all_reduce":
            bucket.sent = self._e.start(target, xs, axes, op)
        else:
            dims, outers = [p[0] for p in places], [p[1] for p in places]
            bucket.sent = self._e.start(target, xs, axes, dims, outers, *([op] if op else []))


def _local_bytes(value: fx.Node, spec: ShardSpec) -> int:
    """Of the piece of a value on one device."""
    return math.prod(spec.local_shape()) * value.meta["val"].element_size()
