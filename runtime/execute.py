"""Runs a `LocalProgram` on one rank.

The graph is turned once into the text of one Python function, one line per instruction: running it costs a function call per op and
nothing else. A value is deleted right after its last use; `getitem`s stand directly behind what they take apart, so that a tuple
does not keep its other parts alive. In a text for lockstep every collective is a `yield` (see `lockstep`).

Memory. The first run is accounted: every instruction reports what it made and what died, on the device and in the tiers behind it. Shapes
do not change from step to step, so its peak is the peak of every step, and later steps run without the reports.
"""

from __future__ import annotations

import linecache
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import torch_compat
from . import collectives, tiers, update
from .collectives import Communicator
from .groups import AxisGroups
from .memory import Limits, MemoryAccount, MemoryLimitError, MemoryReport, pool_limits
from .program import STORED_KINDS, LocalProgram, Port
from .reuse import gathers_in_place
from .state import ProgramState
from .tiers import Parked, TierOptions, TierStore, Traffic

__all__ = ["Executor", "MemoryLimitError", "MemoryReport", "ProgramText", "program_axes"]

Overwrites = dict[fx.Node, dict[int, fx.Node]]  # as `reuse.gathers_in_place` returns
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

    def text(self) -> str:
        dying = _dying(self.order, self.into)
        placeholders = [node for node in self.order if node.op == "placeholder"]
        self.lines.append("def step(inputs, track, drop):" if self.tracked else "def step(inputs):")
        self._add("[" + ", ".join(map(self._name, placeholders)) + "] = inputs")
        self._add("del inputs[:]")
        for node in placeholders:
            self._report(node)
            self._delete([node] if not node.users else [])
        for node in self.order:
            if node.op == "call_function":
                self._instruction(node, dying.get(node, []))
            elif node.op == "output":
                self._add(f"return {self._value(node.args[0])}")
        if self.lockstep:
            self._add("yield")  # a generator even where the program has no collective
        return "\n".join(self.lines) + "\n"

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
        self.lines.append("    " + line)
        if node is not None:
            self.line_nodes[len(self.lines)] = node

    def _report(self, node: fx.Node) -> None:
        if self.tracked:
            self._add(f"track({self.slot[node]}, {self._name(node)})", node)

    def _delete(self, nodes: Sequence[fx.Node]) -> None:
        if nodes:
            self._add("del " + ", ".join(map(self._name, nodes)))
            if self.tracked:
                self._add(f"drop(({''.join(f'{self.slot[node]}, ' for node in nodes)}))")


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


def program_axes(graph: fx.Graph) -> list[tuple[int, ...]]:
    """The groups a graph communicates over, sorted: the same on every rank."""
    found = {tuple(_axes(node)) for node in graph.nodes if node.op == "call_function" and node.target in collectives.STARTS}
    return sorted(found)


def _axes(node: fx.Node) -> Any:
    return node.kwargs["axes"] if "axes" in node.kwargs else node.args[1]


def check_updates_last(graph: fx.Graph) -> None:
    """An update writes its inputs in place: an AssertionError where an instruction behind it still reads the old value."""
    updated: dict[fx.Node, fx.Node] = {}
    copied: dict[fx.Node, fx.Node] = {}  # parking → the value it still reads
    for node in graph.nodes:
        if node.op == "output":
            return
        for used in node.all_input_nodes:
            by = updated.get(used)
            assert by is None, f"{node.name} reads {used.name} after {by and by.name} has updated it in place"
            copied.pop(used, None)
        if node.op != "call_function":
            continue
        if node.target in (tiers.offload, tiers.write_back):
            copied[node] = node.all_input_nodes[-1]
        written = list(_overwritten(node))
        for parking, value in copied.items():
            assert value not in written, f"{node.name} updates {value.name} in place while {parking.name} still copies it"
        updated |= dict.fromkeys(written, node)


def _overwritten(node: fx.Node) -> Iterable[fx.Node]:
    """The values an instruction changes in place."""
    if node.target in (update.fused_update, tiers.host_update):
        return update.written(node)
    return node.all_input_nodes[:1] if node.target is tiers.write_back else ()


class Executor:
    """Runs a program step by step on this rank.

    program: what to run. groups: this rank's place and its process groups (made here where missing, on all ranks alike).
    device: where its tensors are. optimizer: whose `param_groups` give the hyper-parameters, read at every step; needed where the
    program updates something. state: the stored tensors; may also be set later. limit_bytes: most bytes at once, on the device or by pool.
    tiers: the memory behind the device, or options to make it.

    After a run `memory` says what the first one needed, `traffic` what was copied between the device and the tiers.
    """

    def __init__(
        self,
        program: LocalProgram,
        groups: AxisGroups,
        device: torch.device | str = "cpu",
        optimizer: torch.optim.Optimizer | None = None,
        *,
        state: ProgramState | None = None,
        limit_bytes: Limits = None,
        tiers: TierStore | TierOptions | None = None,
    ) -> None:
        pool_limits(limit_bytes)
        if groups.mesh != program.mesh:
            raise ValueError(f"the program is for the mesh {program.mesh}, the process groups are for {groups.mesh}")
        check_updates_last(program.graph)
        self.program = program
        self.groups = groups
        self.device = torch.device(device)
        self.optimizer = optimizer
        self.limit_bytes = limit_bytes
        self.store = tiers if isinstance(tiers, TierStore) else TierStore(tiers)
        self.memory: MemoryReport | None = None
        self.traffic = Traffic()
        self._state: ProgramState | None = None
        self._step: Callable[..., Any] | None = None
        groups.prepare(program_axes(program.graph))
        self._communicator = Communicator(groups)
        self._into = gathers_in_place(program)
        self._text = write(program.graph, into=self._into)
        if state is not None:
            self.state = state

    @property
    def state(self) -> ProgramState:
        """The stored tensors. Raises RuntimeError before they are set."""
        if self._state is None:
            raise RuntimeError("the executor has no state yet: set `executor.state = ProgramState.from_model(...)` before the first run")
        return self._state

    @state.setter
    def state(self, state: ProgramState) -> None:
        state.check(self.program)
        self._state = state
        self._step = self._text.bind(self._bindings())

    def _bindings(self) -> dict[Any, Any]:
        updater = update.Updater(self.state.steps, self.optimizer, self.program.optimizer)
        return self._communicator.bindings() | updater.bindings() | self.store.bindings(updater)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        """One step. inputs: this rank's piece of every input that is not stored, by port name.

        Returns the outputs that are not stored, in the program's order; the stored ones are in `state` afterwards. Raises
        ValueError for a missing or wrong input, MemoryLimitError where the first step exceeds the limit.
        """
        values = [self.groups.coords, *gather_inputs(self.program, self.state, inputs, self.device)]
        before = self.store.copied
        try:
            results = self._run_tracked(values) if self.memory is None else self._step(values)  # type: ignore[misc]
        except Exception as error:
            self._text.explain(error)
            raise
        self.traffic = self.traffic.then(before, self.store.copied)
        return store_outputs(self.program, self.state, results)

    def close(self) -> None:
        """End the threads and free the files of the tiers; what is stored there is lost."""
        self.store.close()

    def _run_tracked(self, values: list[Any]) -> Sequence[Any]:
        text = write(self.program.graph, tracked=True, into=self._into)
        account = MemoryAccount(slot_names(self.program), stored_slots(self.program), self.limit_bytes)
        step = text.bind(self._bindings())
        try:
            results = step(values, account.track, account.drop)
        except Exception as error:
            text.explain(error)
            raise
        self.memory = account.report()
        return results


def slot_names(program: LocalProgram) -> list[str]:
    """Slot number → name of its node."""
    return [node.name for node in program.graph.nodes]


def stored_slots(program: LocalProgram) -> set[int]:
    """Slots of inputs that outlive the step: the state holds them."""
    kinds = [None, *(port.kind for port in program.inputs)]
    placeholders = [i for i, node in enumerate(program.graph.nodes) if node.op == "placeholder"]
    return {slot for slot, kind in zip(placeholders, kinds, strict=True) if kind in STORED_KINDS}


def gather_inputs(program: LocalProgram, state: ProgramState, inputs: Mapping[str, Any], device: torch.device) -> list[Any]:
    """The program's inputs in order, from the state and the caller. Raises ValueError naming what does not fit."""
    given = dict(inputs)
    out = []
    for port in program.inputs:
        if port.kind in STORED_KINDS:
            out.append(state.tensors[port.key])
        elif port.name not in given:
            raise ValueError(f"the step needs the input {port.name!r} ({port.kind} {port.fqn}); given were {sorted(inputs)}")
        else:
            out.append(_checked_input(port, given.pop(port.name), device))
    if given:
        names = [port.name for port in program.inputs if port.kind not in STORED_KINDS]
        raise ValueError(f"the step has no inputs {sorted(given)}; it takes {names}")
    return out


def _checked_input(port: Port, value: Any, device: torch.device) -> Any:
    if port.spec is None:
        return value
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"the input {port.name!r} is a {type(value).__name__}; a tensor of shape {port.spec.local_shape()} is expected")
    if tuple(value.shape) != port.spec.local_shape() or value.dtype != port.dtype:
        raise ValueError(
            f"this rank's part of the input {port.fqn or port.name!r} is {value.dtype} of shape {tuple(value.shape)}; the program was "
            f"made for {port.dtype} of shape {port.spec.local_shape()} (global {port.spec.shape}). Give batches of the shape and "
            "dtype the step was compiled with, or compile it again for this one."
        )
    return value.to(device, non_blocking=True)


def store_outputs(program: LocalProgram, state: ProgramState, results: Sequence[Any]) -> list[Any]:
    """Put stored outputs into the state; return the others."""
    out = []
    for port, value in zip(program.outputs, results, strict=True):
        if port.kind in STORED_KINDS:
            assert (port.tier != "device") == isinstance(value, Parked), f"{port.name} is stored on the tier {port.tier}, it yields {value}"
            state.put(port.key, value)
        else:
            out.append(value)
    return out


