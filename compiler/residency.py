"""Residency: what becomes, between forward and backward, of each tensor the forward pass makes, and where state lives.

A *unit* is a forward op that makes memory of its own (views are made again where they are needed, see `views`). Its results, once the
forward pass no longer reads them, are

- kept on the device ("keep");
- copied to a slower tier and fetched back in time ("host", "disk"); results below `SMALL_BYTES` stay, a copy would cost more than it frees;
- thrown away ("recompute"), and made again by running the op a second time when the backward pass asks for them. Its operands must then be
  there: kept, fetched, or made again themselves. Where nobody asks, nothing is made again: the result was dropped.

`Uses` knows, from the graph alone, who reads what and when; `pricing` turns that into intervals and seconds, `lower` into a program.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from .factors import is_getitem, result_values
from .rule import tensor_args
from .rule_table import CAST, UPDATE, op_name
from .step_graph import StepGraph
from .views import aliased_operand

DEVICE, HOST, DISK = "device", "host", "disk"
KEEP, RECOMPUTE = "keep", "recompute"
SMALL_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where a parameter and its optimizer state live between uses, and who updates them ("device", or "host": the CPU).

    cast: the device fetches the parameter in the narrower type in which it is read, which the host stores beside it. Where the CPU updates
    it, its gradient goes there in that type; where the device does, the whole of it is fetched once more for that. deferred: the CPU's
    update runs beside the next step's forward pass.
    """

    param: str = DEVICE
    state: str = DEVICE
    update: str = DEVICE
    cast: bool = False
    deferred: bool = False

    def __post_init__(self) -> None:
        if self.cast and self.param != HOST:
            raise ValueError(f"{self.text!r}: what is fetched in a narrower type is stored on the host")
        if self.deferred and not (self.cast and self.update == HOST):
            raise ValueError(
                f"{self.text!r}: only what the CPU updates, and is fetched in a narrower type, can be updated beside the next step"
            )

    @property
    def text(self) -> str:
        """As in plans: "param device, state host, update host", "param host (cast), state host, update host (deferred)"."""
        cast, deferred = " (cast)" * self.cast, " (deferred)" * self.deferred
        return f"param {self.param}{cast}, state {self.state}, update {self.update}{deferred}"

    @classmethod
    def parse(cls, text: str) -> StatePlace:
        """The inverse of `text`. Raises ValueError."""
        found = _PLACE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no place of a parameter; one reads {StatePlace().text!r}")
        return cls(found["param"], found["state"], found["update"], bool(found["cast"]), bool(found["deferred"]))


_PLACE = re.compile(
    r"param (?P<param>device|host|disk)(?P<cast> \(cast\))?, state (?P<state>device|host|disk), "
    r"update (?P<update>device|host)(?P<deferred> \(deferred\))?"
)


ON_DEVICE = StatePlace()


@dataclass
class Uses:
    """Who reads what in a step. All dicts are keyed by unit (a forward op that makes memory)."""

    step: StepGraph
    order: dict[fx.Node, int] = field(default_factory=dict)
    units: list[fx.Node] = field(default_factory=list)
    # units whose results a unit reads, through views too
    producers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    consumers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    # the last forward op that reads a result
    last_fwd: dict[fx.Node, fx.Node] = field(default_factory=dict)
    # ops behind the forward pass that read a result, in order
    later: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    # units with results that leave the step: always kept
    outputs: set[fx.Node] = field(default_factory=set)
    # placeholder → ops that read it, through views too; updates do not count
    readers_of_inputs: dict[fx.Node, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.order = {node: i for i, node in enumerate(self.step.graph.nodes)}
        for node in self.step.ops:
            if is_getitem(node):
                continue
            if op_name(node) != UPDATE:
                for root in {unit_of(arg) for arg in tensor_args(node)}:
                    if root.op == "placeholder":
                        self.readers_of_inputs[root].append(node)
            if node.meta["op"].phase == "fwd":
                self._forward(node)
            else:
                for unit in self._read(node):
                    self.later[unit].append(node)
        for value in self.step.returned:
            made = unit_of(value) if isinstance(value, fx.Node) else None
            if made in self.producers:
                self.outputs.add(made)  # type: ignore[arg-type]

    def _forward(self, node: fx.Node) -> None:
        read = self._read(node)
        for unit in read:
            self.last_fwd[unit] = node
        if aliased_operand(node) is not None:
            return
        self.units.append(node)
        self.producers[node], self.consumers[node], self.later[node] = read, [], []
        self.last_fwd[node] = node
        for unit in read:
            self.consumers[unit].append(node)

    def _read(self, node: fx.Node) -> list[fx.Node]:
        made = (unit_of(arg) for arg in tensor_args(node))
        return list(dict.fromkeys(unit for unit in made if unit in self.producers))  # type: ignore[misc]

    @cached_property
    def segment(self) -> dict[fx.Node, int]:
        """The repeated block a unit belongs to, as a running number: what is made again is made again within its segment."""
        out: dict[fx.Node, int] = {}
        number, last = -1, None
        for unit in self.units:
            block = _outer_block(unit.meta["op"].path)
            if block != last:
                number, last = number + 1, block
            out[unit] = number
        return out

    @cached_property
    def casts(self) -> dict[fx.Node, fx.Node]:
        """Trained parameter → the forward op that casts it to a narrower type, where nothing else reads it."""
        out = {}
        for param, _ in self.parameters():
            readers = self.readers_of_inputs[param]
            if len(readers) == 1 and op_name(readers[0]) == CAST and readers[0].args[0] is param and readers[0] in self.producers:
                before, after = param.meta["val"].dtype, readers[0].meta["val"].dtype
                if before.is_floating_point and after.is_floating_point and after.itemsize < before.itemsize:
                    out[param] = readers[0]
        return out

    def narrow_gradient(self, update: fx.Node) -> fx.Node | None:
        """The gradient of an update in the type its parameter is read in, where it is cast to the parameter's type at the end only."""
        param, grad = tensor_args(update)[:2]
        cast = self.casts.get(param)
        if cast is None or grad.op != "call_function" or op_name(grad) != CAST or len(grad.users) != 1:
            return None
        narrow = tensor_args(grad)[0]
        return narrow if narrow.meta["val"].dtype == cast.meta["val"].dtype else None

    def parameters(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(placeholder, update op) of every parameter that is trained."""
        for node in self.step.ops:
            if op_name(node) == UPDATE:
                yield tensor_args(node)[0], node


def _outer_block(path: str) -> str:
    """"model.layers.3.mlp.experts.5.w1" is in the block "model.layers.3": the first numbered module."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ""


def unit_of(value: fx.Node) -> fx.Node:
    """The op or placeholder that made the memory of a value."""
    while value.op == "call_function":
        maker: fx.Node = value.args[0] if is_getitem(value) else value  # type: ignore[assignment]
        alias = aliased_operand(maker)
        if alias is None:
            return maker
        value = alias
    return value


def results(unit: fx.Node) -> list[fx.Node]:
    """The values a unit makes that somebody reads."""
    return [value for value in result_values(unit) if value is not None]
