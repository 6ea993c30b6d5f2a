"""The text of a program: a graph as one Python function, one line per instruction.

Running it costs a function call per op and nothing else. A value is deleted right after its last use; `getitem`s stand directly behind what
they take apart, so that a tuple does not keep its other parts alive. What runs once per micro-batch is a loop (see `micro_batches`), at
whose end all that the next round makes anew is deleted. In a text for lockstep every collective is a `yield` (see `lockstep`),
in a tracked one every instruction reports what it made and what died (see `memory`).
"""

from __future__ import annotations

import linecache
import operator
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .. import torch_compat
from . import collectives, micro_batches, tiers
from .workspace import WORKSPACE_BYTES

Overwrites = dict[fx.Node, dict[int, fx.Node]]  # as `reuse.gathers_in_place` returns
_SUMS = (micro_batches.accumulate, tiers.add_up)  # their first argument is what they yielded in the round before
_INLINE = (int, bool, type(None))  # constants written into the text as they are


@dataclass(slots=True, eq=False, weakref_slot=True)
class ProgramText:
    """The function made of a graph. code: its code object; constants: what its names stand for; lines: line number → node."""

    code: types.CodeType
    constants: dict[str, Any]
    lines: dict[int, fx.Node]
    filename: str

    def bind(self, bindings: Mapping[Any, Any]) -> Callable[..., Any]:
        """The function itself, with `bindings` in place of functions of the graph."""
        namespace = {name: _bound(value, bindings) for name, value in self.constants.items()}
        return types.FunctionType(self.code, namespace)

    def explain(self, error: BaseException) -> None:
        """Add to an error that passed through the function which instruction it comes from."""
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is self.code:
                node = self.lines.get(trace.tb_lineno)
                if node is not None:
                    error.add_note(f"while running {_describe(node)}")
            trace = trace.tb_next


def _bound(value: Any, bindings: Mapping[Any, Any]) -> Any:
    if isinstance(value, types.FunctionType) and value in bindings:
        return bindings[value]
    return torch_compat.direct_call(value)


def _describe(node: fx.Node) -> str:
    info = node.meta.get("op")
    where = "".join(
        f", {what} {value}" for what, value in (("module", getattr(info, "path", "")), ("at", getattr(info, "line", ""))) if value
    )
    return f"instruction {node.name} = {node.target}{where}"


class _Writer:
    """Writes the text of a graph. tracked: with reports to a memory account. lockstep: with collectives as yields."""

    def __init__(self, graph: fx.Graph, *, tracked: bool, lockstep: bool, into: Overwrites) -> None:
        self.tracked = tracked
        self.lockstep = lockstep
        self.into = into
        self.nodes = list(graph.nodes)
        self.order = _hoisted(self.nodes)
        self.slot = {node: i for i, node in enumerate(self.nodes)}
        self.constants: dict[str, Any] = {}
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.line_nodes: dict[int, fx.Node] = {}
        self.indent = "    "

    def text(self) -> str:
        dying = _dying(self.order, self.into)
        loop = _Loop.of(self.order, dying)
        dying = loop.dying if loop is not None else dying
        placeholders = [node for node in self.order if node.op == "placeholder" and (loop is None or node not in loop.brought)]
        self.lines.append("def step(inputs, track, drop):" if self.tracked else "def step(inputs):")
        names = [*map(self._name, placeholders), *(["batches"] if loop is not None else [])]
        self._add("[" + ", ".join(names) + "] = inputs")
        self._add("del inputs[:]")
        for node in placeholders:
            self._report(node)
            self._delete([node] if not node.users else [])
        if loop is not None:
            self._loop_begins(loop)
        for node in self.order:
            if loop is not None and node is loop.end:
                self._loop_ends(loop)
            elif node.op == "call_function":
                self._instruction(node, dying.get(node, []))
            elif node.op == "output":
                self._add(f"return {self._value(node.args[0])}")
        if self.lockstep:
            self._add("yield")  # a generator even where the program has no collective
        return "\n".join(self.lines) + "\n"

    # -- what runs once per micro-batch -----------------------------------------------------------------------------------

    def _loop_begins(self, loop: _Loop) -> None:
        """Every round begins with its micro-batch, and without what the last one has left for those behind the loop."""
        for total in loop.sums:
            self._add(f"{self._name(total)} = None")
        self._add("for [" + ", ".join(map(self._name, loop.brought)) + "] in batches:")
        self.indent = "        "
        if loop.made_anew:
            self._add(" = ".join(map(self._name, loop.made_anew)) + " = None")
            self._drop(loop.made_anew)
        for node in loop.brought:
            self._report(node)
            self._delete([node] if not node.users else [])

    def _loop_ends(self, loop: _Loop) -> None:
        if loop.old:
            self._add(", ".join(map(self._name, loop.old)) + " = " + ", ".join(map(self._name, loop.new)))
        if self.tracked:
            self._add(f"track({self.slot[loop.end]}, {self._value(list(loop.new))})", loop.end)
        self.indent = "    "
        self._add("del batches")
        self._delete(loop.kept_until_end)
        self._drop([loop.end])

    def _instruction(self, node: fx.Node, dying: Sequence[fx.Node]) -> None:
        call = self._call(node)
        if node.users or self.tracked:
            self._add(f"{self._name(node)} = {call}", node)
            self._report(node)
            if node.target is tiers.settle and isinstance(node.args[0], fx.Node):
                self._report(node.args[0])  # it has let go of what it copied
        else:
            self._add(call, node)
        self._delete([*dying, *([node] if not node.users and self.tracked else [])])

    def _call(self, node: fx.Node) -> str:
        if node.target is operator.getitem:
            return f"{self._value(node.args[0])}[{self._value(node.args[1])}]"
        args = [self._value(arg) for arg in node.args]
        if node.target in _SUMS:
            args = [self._name(node), *args]
        kwargs = [f"{name}={self._value(value)}" for name, value in node.kwargs.items()]
        target = self._constant(node.target)
        if node in self.into:
            kwargs.append("into=" + self._into(node))
        if self.lockstep and node.target in collectives.STARTS:
            pairs = [f"{name!r}: {self._value(value)}" for name, value in node.kwargs.items()]
            pairs += [f"'into': {self._into(node)}"] if node in self.into else []
            named = "{" + ", ".join(pairs) + "}"
            return f"yield ({target}, ({''.join(a + ', ' for a in args)}), {named})"
        return f"{target}({', '.join(args + kwargs)})"

    def _into(self, node: fx.Node) -> str:
        olds = self.into[node]
        if node.target is collectives.all_gather:
            return self._name(olds[0])
        return "{" + ", ".join(f"{i}: {self._name(old)}" for i, old in olds.items()) + "}"

    def _value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._name(value)
        if type(value) in _INLINE:
            return repr(value)
        if isinstance(value, (list, tuple)) and _has_nodes(value):
            inner = "".join(self._value(v) + ", " for v in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, dict) and _has_nodes(list(value.values())):
            return "{" + ", ".join(f"{k!r}: {self._value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice) and _has_nodes([value.start, value.stop, value.step]):
            return f"slice({self._value(value.start)}, {self._value(value.stop)}, {self._value(value.step)})"
        return self._constant(_plain(value))

    def _constant(self, value: Any) -> str:
        name = self.names.get(id(value))
        if name is None:
            name = self.names[id(value)] = f"k{len(self.constants)}"
            self.constants[name] = value
        return name

    def _name(self, node: fx.Node) -> str:
        return f"v{self.slot[node]}"

    def _add(self, line: str, node: fx.Node | None = None) -> None:
        self.lines.append(self.indent + line)
        if node is not None:
            self.line_nodes[len(self.lines)] = node

    def _report(self, node: fx.Node) -> None:
        if not self.tracked:
            return
        workspace = ""
        if node.target in WORKSPACE_BYTES:
            workspace = f", {self._constant(WORKSPACE_BYTES[node.target])}({', '.join(map(self._value, (node, *node.args)))})"
        self._add(f"track({self.slot[node]}, {self._name(node)}{workspace})", node)

    def _delete(self, nodes: Sequence[fx.Node]) -> None:
        if nodes:
            self._add("del " + ", ".join(map(self._name, nodes)))
            self._drop(nodes)

    def _drop(self, nodes: Sequence[fx.Node]) -> None:
        if self.tracked:
            self._add(f"drop(({''.join(f'{self.slot[node]}, ' for node in nodes)}))")


@dataclass(frozen=True, slots=True)
class _Loop:
    """The loop over micro-batches. brought: the inputs each round brings. sums: what is summed over all. old, new: inputs that the next
    round finds replaced. made_anew: what outlives the last round, and is no sum. dying: as `_dying` says, but for kept_until_end,
    which a round is the last to read and the next one reads again."""

    end: fx.Node
    brought: list[fx.Node]
    sums: list[fx.Node]
    old: list[fx.Node]
    new: list[fx.Node]
    made_anew: list[fx.Node]
    dying: dict[fx.Node, list[fx.Node]]
    kept_until_end: list[fx.Node]

    @classmethod
    def of(cls, order: Sequence[fx.Node], dying: dict[fx.Node, list[fx.Node]]) -> _Loop | None:
        """The loop of a program in this order; None where there is one batch."""
        end = next((node for node in order if node.target is micro_batches.end), None)
        if end is None:
            return None
        names, old, new = end.args
        inside = [node for node in order[: order.index(end)] if node.op == "call_function"]
        brought = [node for node in order if node.op == "placeholder" and node.name in names]  # type: ignore[operator]
        fleeting = {*inside, *brought}
        last = {node for at in (*inside, end) for node in dying.get(at, ())}
        sums = [node for node in inside if node.target in _SUMS]
        made_anew = [node for node in inside if node.users and node not in last and node not in sums]
        deletable = {at: [node for node in nodes if node in fleeting] if at in fleeting else nodes for at, nodes in dying.items()}
        kept = [node for node in last if node not in fleeting or node in dying.get(end, ())]
        return cls(end, brought, sums, list(old), list(new), made_anew, deletable, kept)  # type: ignore[arg-type]


def _hoisted(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Execution order: as given, but getitems directly behind what they take apart, and without collectives nobody waits for."""
    moved = dict.fromkeys(n for n in nodes if n.op == "call_function" and n.target is operator.getitem)
    behind: dict[fx.Node, list[fx.Node]] = {}
    for node in moved:
        assert isinstance(node.args[0], fx.Node), f"{node.name} takes a part of {node.args[0]!r}"
        if node.users:
            behind.setdefault(node.args[0], []).append(node)
    order: list[fx.Node] = []

    def place(node: fx.Node) -> None:
        order.append(node)
        for part in behind.get(node, ()):
            place(part)

    for node in nodes:
        dead_start = node.op == "call_function" and node.target in collectives.STARTS and not node.users
        if not dead_start and node not in moved:
            place(node)
    return order


def _dying(order: Sequence[fx.Node], into: Overwrites) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values it is the last to use or to overwrite."""
    seen: set[fx.Node] = set()
    out: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        for used in (*node.all_input_nodes, *into.get(node, {}).values()):
            if used not in seen:
                seen.add(used)
                out.setdefault(node, []).append(used)
    return out


def _has_nodes(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_nodes(v) for v in value)
    return isinstance(value, fx.Node)


def _plain(value: Any) -> Any:
    """fx's immutable containers as the plain ones ops were traced with."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if type(value).__name__ == "immutable_dict":
        return {k: _plain(v) for k, v in value.items()}
    if type(value) is tuple:
        return tuple(_plain(v) for v in value)
    return value


_programs = iter(range(1 << 62))


def write(graph: fx.Graph, *, tracked: bool = False, lockstep: bool = False, into: Overwrites | None = None) -> ProgramText:
    """The function of a graph: `step(inputs)`, or `step(inputs, track, drop)` where tracked. It empties the list `inputs`.

    into: gathers that write over old values (see `reuse`).
    """
    writer = _Writer(graph, tracked=tracked, lockstep=lockstep, into=into or {})
    source = writer.text()
    filename = f"<opweave program {next(_programs)}>"
    module = compile(source, filename, "exec")
    code = next(c for c in module.co_consts if isinstance(c, types.CodeType))
    text = ProgramText(code=code, constants=writer.constants, lines=writer.line_nodes, filename=filename)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    weakref.finalize(text, linecache.cache.pop, filename, None)
    return text
