"""The choice graph: everything the planner decides, and what depends on what, before any price.

A `Choice` is one decision, shared by its members (the equal ops of repeated blocks). Its kinds:

- "op": how an op is split (options: `OpStrategy`).
- "input": how a parameter or buffer is stored between steps (options: layouts).
- "value": in which layout a tensor with several readers is kept (options: layouts). Its producer's result is brought there once.
- "read": in which layout the readers of one phase see it (options: layouts, each once as an *alias* of the kept tensor, which costs no
  memory but needs the kept layout to be equal, and once as a copy). ZeRO-3's gathered parameters are "read"s of a split "input".

A `Link` is a place where a tensor goes from one choice to another and may have to change its layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from .blocks import input_key, op_keys
from .factors import BoundOp, FactorMap, is_getitem, result_values
from .layout import Layout, is_partial, replicated
from .micro_batches import gradient_sums, is_sum, num_runs
from .rule import tensor_args
from .rule_table import UPDATE, op_name
from .step_graph import GraphInput, StepGraph
from .strategies import OpStrategy, enumerate_strategies, unique, value_layouts

Phase = str
Reader = tuple[fx.Node, int]  # (op, index of the tensor operand)


@dataclass(slots=True, eq=False)
class Choice:
    """One decision. options: see the module docstring; alias: for "read"s, whether the option is the kept tensor itself."""

    index: int
    kind: Literal["op", "input", "value", "read"]
    members: list[fx.Node]
    options: list
    op: BoundOp | None = None
    alias: list[bool] = field(default_factory=list)
    phase: str = ""


@dataclass(slots=True, eq=False)
class Link:
    """`count` equal places where a tensor goes from `source` to `target`.

    source_layouts, target_layouts: per option of the two choices the layout there. value: a representative tensor.
    side: runs beside the computation (gradient reduction, parameter gather) rather than on the critical path. bucketed: lowering sends
    many such tensors in one message. num_runs: how often a step comes by: once per micro-batch, or once.
    """

    source: Choice
    target: Choice
    source_layouts: list[Layout]
    target_layouts: list[Layout]
    value: fx.Node
    count: int = 1
    side: bool = False
    bucketed: bool = False
    num_runs: int = 1


@dataclass(slots=True)
class ChoiceGraph:
    """All choices and links, and for every tensor the way from its producer to each of its readers."""

    step: StepGraph
    factors: FactorMap
    mesh: tuple[int, ...]
    choices: list[Choice] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    op_choice: dict[fx.Node, Choice] = field(default_factory=dict)
    input_choice: dict[fx.Node, Choice] = field(default_factory=dict)
    # value -> its "value" choice; (value, phase) -> its "read" choice
    kept: dict[fx.Node, Choice] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, str], Choice] = field(default_factory=dict)
    # parameters: storage placeholder -> the update op that writes it
    updates: dict[fx.Node, fx.Node] = field(default_factory=dict)
    gradients: set[fx.Node] = field(default_factory=set)
    # mesh axes on which parameters are read as they are stored (forced tensor parallelism)
    own_reads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Restriction:
    """What a forced plan leaves in, per mesh axis.

    op(node, bound, axis, codes), stored(placeholder, axis, codes): the codes an op or a stored parameter may use, out of those it
    could. gradient(axis, atom): may a reduced gradient be split so? own_reads: axes on which parameters are read as they are stored.
    """

    name: str
    op: Callable[[fx.Node, BoundOp, int, list[int]], list[int]]
    stored: Callable[[fx.Node, int, list[int]], list[int]]
    gradient: Callable[[int, int], bool]
    own_reads: tuple[int, ...] = ()


def readers_by_value(step: StepGraph) -> dict[fx.Node, list[Reader]]:
    """For every tensor the ops that read it."""
    readers: dict[fx.Node, list[Reader]] = defaultdict(list)
    for node in step.ops:
        if not is_getitem(node):
            for i, arg in enumerate(tensor_args(node)):
                readers[arg].append((node, i))
    return readers


def reading_phase(node: fx.Node) -> str:
    """The phase in which an op reads."""
    return node.meta["op"].phase


class ChoiceBuilder:
    """Builds the choice graph of a step on a mesh."""

    def __init__(self, step: StepGraph, factors: FactorMap, mesh: tuple[int, ...], restriction: Restriction | None = None) -> None:
        own = restriction.own_reads if restriction is not None else ()
        self.out = ChoiceGraph(step=step, factors=factors, mesh=mesh, own_reads=own)
        self._restriction = restriction
        self._by_key: dict[Hashable, Choice] = {}
        self._links: dict[Hashable, Link] = {}
        self._update_ops: set[fx.Node] = set()
        self._readers = readers_by_value(step)
        placeholders = (n for n in step.graph.nodes if n.op == "placeholder")
        self._inputs: dict[fx.Node, GraphInput] = dict(zip(placeholders, step.inputs, strict=True))
        self._sums = gradient_sums(step)
        self._summed = set(self._sums.values())

    def build(self) -> ChoiceGraph:
        """All choices, then all links."""
        self._ops()
        self._stored()
        self._relays()
        for value in self._values():
            self._connect(value)
        self._write_back()
        return self.out

    # -- choices ------------------------------------------------------------------------------------------------------

    def _choice(self, key: Hashable, kind: str, member: fx.Node, make: Callable[[], list]) -> Choice:
        found = self._by_key.get((kind, key))
        if found is None:
            found = Choice(index=len(self.out.choices), kind=kind, members=[], options=make())  # type: ignore[arg-type]
            self.out.choices.append(found)
            self._by_key[(kind, key)] = found
        found.members.append(member)
        return found

    def _ops(self) -> None:
        for node, key in op_keys(self.out.step, self.out.factors).items():
            bound: BoundOp = key[4]  # type: ignore[index]

            def options(node: fx.Node = node, bound: BoundOp = bound) -> list[OpStrategy]:
                r = self._restriction
                return enumerate_strategies(bound, self.out.mesh, None if r is None else lambda axis, codes: r.op(node, bound, axis, codes))

            choice = self._choice(key, "op", node, options)
            choice.op = bound
            choice.phase = node.meta["op"].phase
            self.out.op_choice[node] = choice

    def _stored(self) -> None:
        mesh, factors = self.out.mesh, self.out.factors
        for node, info in self._inputs.items():
            if info.kind == "state":
                continue  # goes with its update op
            if info.kind != "param":
                self.out.input_choice[node] = self._choice(node.name, "input", node, lambda: [replicated(len(mesh))])
                continue

            def layouts(node: fx.Node = node) -> list[Layout]:
                r = self._restriction
                allowed = None if r is None else lambda axis, codes: r.stored(node, axis, codes)
                return value_layouts(factors.atoms(node), mesh, allowed)

            self.out.input_choice[node] = self._choice(input_key(info, node, factors), "input", node, layouts)
        for op in self.out.step.ops:
            if op_name(op) == UPDATE:
                self._update_ops.add(op)
                param, grad = tensor_args(op)[:2]
                self.out.updates[param] = op
                self.out.gradients.add(grad)
        self.out.gradients |= self._sums.keys() | self._summed

    def _values(self) -> list[fx.Node]:
        return [v for v in self._readers if self._inputs.get(v) is None or self._inputs[v].kind != "state"]

    def source(self, value: fx.Node) -> tuple[Choice, int]:
        """The choice that makes a tensor, and which of its results it is."""
        if value.op == "placeholder":
            return self.out.input_choice[value], 0
        if is_getitem(value):
            return self.out.op_choice[value.args[0]], value.args[1]  # type: ignore[index,return-value]
        return self.out.op_choice[value], 0

    def source_layouts(self, value: fx.Node) -> list[Layout]:
        """Per option of the producer the layout it yields."""
        choice, index = self.source(value)
        if choice.kind == "op":
            return [s.results[index] for s in choice.options]
        return choice.options

    def _reader_layouts(self, value: fx.Node, phase: str | None = None) -> list[Layout]:
        out: dict[Layout, None] = {}
        for op, i in self._readers[value]:
            if phase is None or reading_phase(op) == phase:
                for s in self.out.op_choice[op].options:
                    out[s.operands[i]] = None
        return list(out)

    def _relays(self) -> None:
        groups: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        for value in self._values():
            choice, index = self.source(value)
            groups[choice.index, index].append(value)
        for (choice_index, _), values in groups.items():
            self._relays_of(self.out.choices[choice_index], values)

    def _relays_of(self, producer: Choice, values: list[fx.Node]) -> None:
        counts = {p: max(sum(reading_phase(op) == p for op, _ in self._readers[v]) for v in values) for p in ("fwd", "bwd")}
        is_param = self._is_param(values[0])
        total = max(len(self._readers[v]) for v in values)
        gradient = any(v in self.out.gradients for v in values)
        if producer.kind == "op" and (total > 1 or gradient):
            key = (producer.index, self.source(values[0])[1])
            kept = self._choice(key, "value", values[0], lambda: self._kept_layouts(values, gradient))
            kept.members[:] = values
            kept.phase = values[0].meta["op"].phase
            self.out.kept |= dict.fromkeys(values, kept)
        elif not is_param:
            return
        both = counts["fwd"] and counts["bwd"]
        for phase in ("fwd", "bwd"):
            if counts[phase] and (is_param or (both and counts[phase] > 1)):
                self._read(producer, values, phase, is_param)

    def _is_param(self, value: fx.Node) -> bool:
        info = self._inputs.get(value)
        return info is not None and info.kind == "param"

    def _kept_layouts(self, values: list[fx.Node], gradient: bool) -> list[Layout]:
        made = unique(layout for v in values[:1] for layout in self.source_layouts(v))
        wanted: dict[Layout, None] = {}
        for v in (values[0], values[-1]):
            wanted |= dict.fromkeys(self._reader_layouts(v))
        if gradient:
            out = unique([replicated(len(self.out.mesh)), *(w for w in wanted if not is_partial(w))])
            r = self._restriction
            if r is not None:
                out = [w for w in out if all(c < 0 or r.gradient(axis, c) for axis, c in enumerate(w))]
            if values[0] in self._summed:  # the sum over the micro-batches may be exchanged instead
                out += [w for w in made if is_partial(w) and w in wanted]
            return out
        whole = [w for w in (*made, *wanted) if not is_partial(w)]
        return unique([*whole, *(w for w in made if is_partial(w) and w in wanted)])

    def _read(self, producer: Choice, values: list[fx.Node], phase: str, is_param: bool) -> None:
        wanted = unique(layout for v in (values[0], values[-1]) for layout in self._reader_layouts(v, phase))
        wanted = [w for w in wanted if not is_partial(w)] if is_param else wanted
        kept = self.out.kept.get(values[0], producer)
        same = [w for w in kept.options if w in wanted] if kept.kind != "op" else []
        key = (producer.index, self.source(values[0])[1], phase)
        read = self._choice(key, "read", values[0], lambda: same + wanted)
        read.alias = [True] * len(same) + [False] * len(wanted)
        read.members[:] = values
        read.phase = phase
        self.out.reads |= {(v, phase): read for v in values}

    # -- links ----------------------------------------------------------------------------------------------------------

    def _link(
        self, source: Choice, target: Choice, a: list[Layout], b: list[Layout], value: fx.Node, *, side: bool, tag: tuple[Hashable, ...],
        phase: Phase = "bwd", bucketed: bool = False,
    ) -> None:  # fmt: skip
        key = (source.index, target.index, tag, side)
        found = self._links.get(key)
        if found is not None:
            found.count += 1
            return
        link = Link(source, target, a, b, value, 1, side, bucketed, num_runs(self.out.step, phase))
        self._links[key] = link
        self.out.links.append(link)

    def _connect(self, value: fx.Node) -> None:
        producer, index = self.source(value)
        at, layouts = producer, self.source_layouts(value)
        kept = self.out.kept.get(value)
        side = value in self.out.gradients
        param = self._is_param(value)
        if kept is not None:
            # Behind all micro-batches there is no backward pass left to hide an exchange.
            behind = is_sum(value)
            phase = "update" if behind else "bwd"
            self._link(at, kept, layouts, kept.options, value, side=side and not behind, tag=("kept", index), phase=phase, bucketed=side)
            at, layouts = kept, kept.options
        for phase in ("fwd", "bwd"):
            read = self.out.reads.get((value, phase))
            if read is not None:
                self._link(at, read, layouts, read.options, value, side=param, tag=("read", phase, index))
        for op, i in self._readers[value]:
            target = self.out.op_choice[op]
            read = self.out.reads.get((value, reading_phase(op)))
            start, have = (read, read.options) if read is not None else (at, layouts)
            wanted = [s.operands[i] for s in target.options]
            side = op in self._update_ops
            self._link(start, target, have, wanted, value, side=side, tag=("op", i, index, start.kind), phase=reading_phase(op))

    def _write_back(self) -> None:
        """The updated parameter returns to the layout it is stored in."""
        for param, op in self.out.updates.items():
            update, stored = self.out.op_choice[op], self.out.input_choice[param]
            made = [s.results[0] for s in update.options]
            value = result_values(op)[0] or param
            self._link(update, stored, made, stored.options, value, side=True, tag=("write",), phase="update", bucketed=True)


def build_choices(step: StepGraph, factors: FactorMap, mesh: tuple[int, ...], restriction: Restriction | None = None) -> ChoiceGraph:
    """The choice graph of a step on a mesh (see the module docstring)."""
    return ChoiceBuilder(step, factors, mesh, restriction).build()
