"""Runs a `LocalProgram` on one rank.

The graph is turned once into the text of a Python function (`program_text`), whose collectives and copies are bound to this rank's.

Memory. The first run is accounted: every instruction reports what it made and what died, on the device and in the tiers behind it. Shapes
do not change from step to step, so its peak is the peak of every step, and later steps run without the reports. On a CPU without a limit
the process keeps what it frees, for speed; with one it is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import collectives, tiers, update
from .communicator import Communicator
from .groups import AxisGroups
from .memory import Limits, MemoryAccount, MemoryLimitError, MemoryReport, pool_limits
from .program import STORED_KINDS, Inputs, LocalProgram, Port, each_micro_batch
from .program_text import ProgramText, write
from .resident import keep_unless_returned
from .reuse import gathers_in_place
from .state import ProgramState
from .tiers import Parked, TierOptions, TierStore, Traffic
from .workspace import NOT_COUNTED

__all__ = ["Executor", "MemoryLimitError", "MemoryReport", "ProgramText", "program_axes", "write"]

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
        if node.target in (tiers.offload, tiers.write_back, tiers.write_back_cast, tiers.send_gradient):
            copied[node] = node.all_input_nodes[-1]
        written = list(_overwritten(node))
        for parking, value in copied.items():
            assert value not in written, f"{node.name} updates {value.name} in place while {parking.name} still copies it"
        updated |= dict.fromkeys(written, node)


def _overwritten(node: fx.Node) -> Iterable[fx.Node]:
    """The values an instruction changes in place."""
    if node.target in (update.fused_update, tiers.host_update, tiers.defer_update):
        return update.written(node)
    if node.target is tiers.start_deferred:
        return node.all_input_nodes
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
        is_limited = "device" in pool_limits(limit_bytes)
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
        if self.device.type == "cpu" and not is_limited:
            keep_unless_returned()
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
    def run(self, inputs: Inputs) -> list[Any]:
        """One step. inputs: this rank's piece of every input that is not stored, by port name; one mapping per micro-batch if several.

        Returns the outputs that are not stored, in the program's order; the stored ones are in `state` afterwards. Raises
        ValueError for a missing or wrong input, MemoryLimitError where the first step exceeds the limit.
        """
        values = [self.groups.coords, *gather_inputs(self.program, self.state, inputs, self.device)]
        before = self.store.copied
        try:
            results = self._run_tracked(values) if self.memory is None else self._step(values)  # type: ignore[misc]
        except Exception as error:
            self._text.explain(error)
            self.state.restore_casts()
            raise
        self.traffic = self.traffic.then(before, self.store.copied)
        return store_outputs(self.program, self.state, results)

    def close(self) -> None:
        """End the threads and free the files of the tiers; what is stored there is lost."""
        self.store.close()

    def _run_tracked(self, values: list[Any]) -> Sequence[Any]:
        text = write(self.program.graph, tracked=True, into=self._into)
        account = MemoryAccount(slot_names(self.program), stored_slots(self.program), self.limit_bytes)
        step = text.bind(self._bindings() | ({} if self.device.type == "cpu" else NOT_COUNTED))
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


def gather_inputs(program: LocalProgram, state: ProgramState, inputs: Inputs, device: torch.device) -> list[Any]:
    """What the program's text takes behind the coordinates: its inputs in order, from the state and the caller; where it runs several
    micro-batches the stored ones, then what gives the others' for each. Raises ValueError naming what does not fit."""
    batches = [_checked_inputs(program, given) for given in each_micro_batch(program, inputs)]
    if program.num_micro_batches > 1:
        stored = [state.tensors[port.key] for port in program.inputs if port.kind in STORED_KINDS]
        return [*stored, _one_by_one(batches, device)]
    values = batches[0]
    return [state.tensors[port.key] if port.kind in STORED_KINDS else _moved(values[port.name], device) for port in program.inputs]


def _one_by_one(batches: list[dict[str, Any]], device: torch.device) -> Iterator[list[Any]]:
    """The inputs of one micro-batch after the other, copied when their turn comes: the whole batch need not be on the device."""
    for values in batches:
        yield [value.to(device, copy=True, non_blocking=True) if isinstance(value, torch.Tensor) else value for value in values.values()]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _checked_inputs(program: LocalProgram, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of the inputs that are not stored, in the program's order."""
    given = dict(inputs)
    out = {}
    for port in program.inputs:
        if port.kind in STORED_KINDS:
            continue
        if port.name not in given:
            raise ValueError(f"the step needs the input {port.name!r} ({port.kind} {port.fqn}); given were {sorted(inputs)}")
        out[port.name] = _checked_input(port, given.pop(port.name))
    if given:
        raise ValueError(f"the step has no inputs {sorted(given)}; it takes {list(out)}")
    return out


def _checked_input(port: Port, value: Any) -> Any:
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
    return value


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


