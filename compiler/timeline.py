"""The lowered program on paper: every node as an instruction of `cost_model.simulate`, with its seconds, stream and buffers.

Shapes come from running the local graph once on fake tensors. Compute runs in one stream and collectives in another, with a lane for each
process group (NCCL's have a stream each); both use the device, the collectives as much of it as the cluster says cannot be hidden
(`Cluster.overlap`). A value is freed at its last use, as the executor does; parameters, buffers and optimizer state stay.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..cost_model.cluster import Cluster
from ..cost_model.collectives import bucket_seconds, spaced_seconds
from ..cost_model.kernels import work_seconds
from ..cost_model.simulate import COMPUTE, Buffer, Instruction, Simulation, simulate
from ..cost_model.work import NO_WORK, Work, class_of, is_known, op_work
from ..cost_model.work import op_class as work_class
from ..runtime import collectives, micro_batches, tiers, update
from ..runtime.communicator import Communicator, DirectTransport, NativeTransport
from ..runtime.groups import PaperGroups
from ..runtime.meta_ops import MetaOps
from ..runtime.program import STORED_KINDS, LocalProgram
from ..runtime.reuse import gathers_in_place
from ..runtime.workspace import WORKSPACE_BYTES
from ..torch_compat import FakeTensorMode, OpOverload
from . import timeline_tiers
from .analyse import analyse
from .capture import capture
from .lower import lower
from .plan import Plan
from .rule_table import op_name
from .step_graph import StepGraph

Stage = Callable[[str], contextlib.AbstractContextManager[None]]
"""What is entered, by the name of a stage, while that stage lasts: a stopwatch."""

COLLECTIVES = "collectives"
POOL = "device"
# A function of the runtime that makes views (take_shard) takes as long as so many views: 16 us where one takes 4.
_VIEWS_IN_A_FUNCTION = 4
_VIEWS_OF_A_PACKED_TENSOR = 4  # what the host dispatches to put it into a bucket and to take it out again


def _untimed(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(slots=True)
class _Started:
    """A collective or copy on its way: what its wait gives (of a collective: how to have it), and what must live until then."""

    result: Any
    held: list[torch.Tensor]

    @classmethod
    def of(cls, pending: Any) -> _Started:
        """A collective as the runtime starts it, or the operand itself in a group of one device."""
        if not isinstance(pending, collectives.Pending):
            return cls(pending, _tensors(pending))
        return cls(pending, list(pending.held))


@dataclass(slots=True)
class Timeline:
    """A program ready to be simulated. resident: what is there before the step. held_bytes: per copy out of the device, by name, the bytes
    that it holds there until it is waited for."""

    instructions: list[Instruction]
    resident: list[Buffer]
    held_bytes: dict[str, int] = field(default_factory=dict)

    def simulate(self) -> Simulation:
        """Step time, streams and peaks."""
        return simulate(self.instructions, resident=self.resident)


def timeline_of_plan(
    plan: Plan, model: nn.Module, batch: Any, cluster: Cluster, *, optimizer: torch.optim.Optimizer | None = None, loss_fn: Any = None,
    stage: Stage = _untimed,
) -> Timeline:  # fmt: skip
    """The timeline of a plan, the model captured and lowered anew. Raises PlanError where the plan is of another model or step.

    stage: entered around "capture", "lowering" and "prices"."""
    with stage("capture"):
        made_with: dict[str, Any] = {"autocast": plan.autocast_dtype, "accumulate": plan.accumulate}
        analysis = analyse(capture(model, batch, loss_fn=loss_fn, optimizer=optimizer, **made_with))
        plan.check(analysis.step)
    with stage("lowering"):
        name = type(optimizer).__name__ if optimizer is not None else ""
        assignment = plan.assignment(analysis.step, analysis.factors)
        program = lower(analysis.step, analysis.factors, assignment, device="meta", optimizer=name)
    with stage("prices"):
        return timeline(program, cluster, device="meta")


class _AnyPrecision(Plan):
    """A plan whose decisions are applied to the step in another precision, where the same ops have the same names."""

    def check(self, step: StepGraph, cluster: Any = None) -> None:
        """Nothing: `in_any_precision` has checked the step it was made for. Ops that differ are found by `assignment`."""


def in_any_precision(plan: Plan, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None) -> Plan:
    """The plan for verification in float64. Raises PlanError where it was made for another model, batch or optimizer."""
    plan.check(capture(model, batch, optimizer=optimizer, autocast=plan.autocast_dtype, accumulate=plan.accumulate))
    return _AnyPrecision(**{item.name: getattr(plan, item.name) for item in fields(Plan)})


def timeline(program: LocalProgram, cluster: Cluster, *, device: str = "cpu", ops: MetaOps | None = None) -> Timeline:
    """The program of one rank as instructions, priced for `cluster`. device: for which the program was lowered, "cpu" or "meta". ops: what
    is known of ops on "meta" already."""
    values = _fake_values(program, cluster, device, ops)
    return _Writer(program, cluster, values).write()


def backend_of(cluster: Cluster) -> str:
    """What carries the collectives of a cluster's devices."""
    return "gloo" if cluster.device.kind == "cpu" else "nccl"


# -- shapes ---------------------------------------------------------------------------------------------------------------


def _fake_values(program: LocalProgram, cluster: Cluster, device: str, ops: MetaOps | None = None) -> dict[fx.Node, Any]:
    """What every node yields, as tensors without data."""
    values: dict[fx.Node, Any] = {}
    ports = {port.name: port for port in program.inputs}
    into = gathers_in_place(program)
    groups = PaperGroups(program.mesh, backend=backend_of(cluster))
    starts = Communicator(groups).bindings()
    ops = (ops or MetaOps()) if device == "meta" else None
    without_data = contextlib.nullcontext() if device == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    with without_data, torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                port = ports.get(node.name)
                shape = port.spec.local_shape() if port is not None and port.spec is not None else ()
                values[node] = torch.empty(shape, dtype=port.dtype, device=device) if port is not None else groups.coords
                if port is not None and port.tier != POOL:
                    values[node] = timeline_tiers.InTier.of(values[node], port.tier, port.cast)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                if node in into:
                    old = {i: values[placeholder] for i, placeholder in into[node].items()}
                    kwargs = {**kwargs, "into": old[0] if node.target is collectives.all_gather else old}
                values[node] = _fake_call(node.target, starts, args, kwargs, ops)
    return values


def _fake_call(target: Any, starts: Mapping[Any, Any], args: Any, kwargs: dict[str, Any], ops: MetaOps | None) -> Any:
    if target in starts:
        return _Started.of(starts[target](*args, **kwargs))
    if target in timeline_tiers.STARTS:
        return _Started(*timeline_tiers.STARTS[target](*args))
    if target in timeline_tiers.DEFERRED:
        return timeline_tiers.DEFERRED[target](*args)
    if target is collectives.wait:
        return collectives.wait(args[0].result)
    if target in timeline_tiers.WAITS:
        return args[0].result
    if target is micro_batches.accumulate:
        return torch.empty_like(args[0])
    if target is micro_batches.end:
        return None
    if target is tiers.add_up:
        return replace(args[0], dtype=args[1])
    if target is update.fused_update:
        return update.update_on_paper(*args)
    return (ops.of(target) if ops is not None else target)(*args, **kwargs)


# -- instructions ---------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, _Started):
        return [*_tensors(value.result), *value.held]  # of a pending collective: what it holds
    if isinstance(value, list | tuple):
        return [t for part in value for t in _tensors(part)]
    return []


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _storages(value: Any) -> dict[int, int]:
    """Storage → bytes of all tensors of a value."""
    return {StorageWeakRef(t.untyped_storage()).cdata: t.untyped_storage().nbytes() for t in _tensors(value)}


def _results(value: Any) -> list[torch.Tensor | None]:
    """The results of an op, None for those that are not computed."""
    if isinstance(value, list | tuple) and all(part is None or isinstance(part, torch.Tensor) for part in value):
        return list(value)
    return list(_tensors(value))


def _kernel(node: fx.Node, operands: list[torch.Tensor]) -> str:
    """What runs for a node that makes new memory. Copies go in rows, or element by element where rows lie apart ("contiguous")."""
    if not isinstance(node.target, OpOverload):
        own = f"opweave::{getattr(node.target, '__name__', '')}"
        return own if is_known(own) else "clone"
    name = op_name(node)
    if work_class(name) == "view" or name == "aten.clone.default":
        return "clone" if not operands or operands[0].dim() == 0 or operands[0].stride(-1) <= 1 else "contiguous"
    return name


class _Writer:
    def __init__(self, program: LocalProgram, cluster: Cluster, values: dict[fx.Node, Any]) -> None:
        self.program, self.cluster, self.values = program, cluster, values
        self.storages = {node: _storages(value) for node, value in values.items()}
        self.dying_at: dict[fx.Node, list[int]] = {}
        for storage, node in self._last_uses().items():
            self.dying_at.setdefault(node, []).append(storage)
        self.made_at: dict[fx.Node, int] = {}
        self.live: set[int] = set()
        self.instructions: list[Instruction] = []
        self.links: dict[tuple[int, ...], Any] = {}
        self.held: dict[str, int] = {}
        self.last_compute: int | None = None
        self.computed_s = 0.0  # since the last collective
        self.num_runs = program.num_micro_batches  # of the instructions that are written now

    def write(self) -> Timeline:
        resident = self._from_earlier_micro_batches()
        ports = {port.name: port for port in self.program.inputs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in ports:
                resident += self._buffers(node, ports[node.name].kind)
            elif node.target is micro_batches.end:
                self.num_runs = 1
                self._free_carried(node)
            elif node.op == "call_function":
                self._instruction(node)
        return Timeline(instructions=self.instructions, resident=resident, held_bytes=self.held)

    def _from_earlier_micro_batches(self) -> list[Buffer]:
        """What a micro-batch that is not the first finds: the sums, and buffers as the one before has left them."""
        out: list[Buffer] = []
        for node in self.program.graph.nodes:
            if node.target is micro_batches.accumulate:
                out += self._buffers(node, "summed gradients")
            elif node.target is micro_batches.end:
                out += [Buffer(f"carried {new.name}", POOL, _num_bytes([self.values[new]]), "buffer") for new in node.args[2]]
        return out

    def _free_carried(self, end: fx.Node) -> None:
        last = self.instructions[-1]
        self.instructions[-1] = last._replace(frees=last.frees + tuple(f"carried {new.name}" for new in end.args[2]))  # type: ignore[union-attr]

    def _last_uses(self) -> dict[int, fx.Node]:
        """Storage → the node after which nothing refers to it; stored and returned ones are not in it."""
        last: dict[int, fx.Node] = {}
        for node in self.program.graph.nodes:
            for user in (*node.all_input_nodes, node):
                last.update(dict.fromkeys(self.storages.get(user, ()), node))
        stored = {port.name for port in self.program.inputs if port.kind in STORED_KINDS}
        for node in self.program.graph.nodes:
            if (node.op == "placeholder" and node.name in stored) or node.op == "output":
                for kept in (node, *node.all_input_nodes):
                    for storage in self.storages.get(kept, ()):
                        last.pop(storage, None)
        return last

    def _buffers(self, node: fx.Node, owner: str) -> list[Buffer]:
        """Storages that appear with this node."""
        fresh = {s: n for s, n in self.storages[node].items() if s not in self.live}
        self.live.update(fresh)
        return [Buffer(f"storage{s}", POOL, n, owner) for s, n in fresh.items()]

    def _instruction(self, node: fx.Node) -> None:
        waits = tuple(sorted({self.made_at[n] for n in node.all_input_nodes if n in self.made_at}))
        freed = tuple(f"storage{s}" for s in self.dying_at.get(node, ()) if s in self.live or s in self.storages[node])
        if node.target is operator.getitem and self.instructions:
            self.made_at[node] = max(waits, default=len(self.instructions) - 1)
            previous = self.instructions[-1]
            self.instructions[-1] = previous._replace(frees=previous.frees + freed)
            return
        if (node.target in timeline_tiers.STARTS or node.target in collectives.STARTS) and self.last_compute is not None:
            # It starts where the program says, not as soon as its stream is free: its memory is counted from there.
            waits = tuple(sorted({*waits, self.last_compute}))
        stream, seconds, op_class = self._price(node)
        info = node.meta.get("op")
        owner = getattr(info, "path", "") or node.name
        uses: tuple[tuple[str, float], ...] = ((POOL, 1.0),) if stream == COMPUTE else ()
        lane = ""
        if stream == COLLECTIVES:
            axes: Any = node.args[1]
            lane = f"axis {','.join(map(str, axes))}"
            uses = ((POOL, 1.0 - self.cluster.overlap), (self._wire(axes), 1.0))
        if node.target in timeline_tiers.STARTS:
            self.held[node.name] = timeline_tiers.copied_bytes(node.target, self._arguments(node))
        self.made_at[node] = len(self.instructions)
        made = tuple(self._buffers(node, owner))
        workspace = self._workspace(node)
        if workspace:
            made += (Buffer(f"workspace of {node.name}", POOL, workspace, "workspace"),)
            freed += (f"workspace of {node.name}",)
        if stream == COMPUTE:
            self.last_compute = len(self.instructions)
            self.computed_s += seconds
        self.instructions.append(
            Instruction(node.name, stream, seconds, waits, made, freed, uses, op_class, self.num_runs, lane)
        )

    def _workspace(self, node: fx.Node) -> int:
        of = WORKSPACE_BYTES.get(node.target) if self.cluster.device.kind == "cpu" else None
        return of(self.values[node], *self._arguments(node)) if of is not None else 0

    def _price(self, node: fx.Node) -> tuple[str, float, str]:
        """(stream, seconds, class) of a node."""
        target: Any = node.target
        if target in collectives.STARTS:
            kind = target.__name__.removesuffix("_bucket")
            return COLLECTIVES, self._collective_seconds(kind, node), kind
        if target in timeline_tiers.STARTS or target in timeline_tiers.DEFERRED or target is tiers.add_up:
            return timeline_tiers.price(target, self._arguments(node), self.cluster)
        if target in timeline_tiers.WAITS:
            return COMPUTE, 0.0, timeline_tiers.WAIT
        if target is collectives.wait:
            return COMPUTE, self._copy_seconds(self._rearranged(node.args[0])[1]), timeline_tiers.WAIT
        works, dtype = self._works(node)
        return COMPUTE, sum(work_seconds(work, self.cluster.device, dtype) for work in works), class_of(works[0].op_class)

    def _arguments(self, node: fx.Node) -> tuple[Any, ...]:
        """The values a node is called with."""
        return fx.map_arg(node.args, lambda n: self.values[n])  # type: ignore[return-value]

    def _collective_seconds(self, kind: str, node: fx.Node) -> float:
        axes: Any = node.args[1]
        n = math.prod(self.program.mesh[axis] for axis in axes)
        if axes not in self.links:
            self.links[axes] = self.cluster.group_link(self.program.mesh, axes)
        grown = n if kind in ("all_gather", "all_to_all") else 1
        solo, packed = self._messages(node, self._transport.solo_bytes(kind, n))
        messages = [grown * num_bytes for num_bytes in ([*solo, sum(packed)] if packed else solo)]
        seconds = bucket_seconds(kind, messages, n, self.links[axes]) + spaced_seconds(self.computed_s, n, self.links[axes])
        self.computed_s = 0.0
        dispatching = _VIEWS_OF_A_PACKED_TENSOR * len(packed) * self.cluster.device.view_s if len(packed) > 1 else 0.0
        return max(0.0, seconds) + dispatching + self._copy_seconds(self._rearranged(node)[0])

    def _messages(self, node: fx.Node, alone_from: float) -> tuple[list[int], list[int]]:
        """Bytes of the tensors of a collective that are a message each, and of those that go in one: the small ones of a bucket."""
        sizes = [_num_bytes([x]) for x in _tensors(self._arguments(node)[0])]
        return [size for size in sizes if size >= alone_from], [size for size in sizes if size < alone_from]

    @property
    def _transport(self) -> type[DirectTransport | NativeTransport]:
        return DirectTransport if backend_of(self.cluster) == "gloo" else NativeTransport

    def _wire(self, axes: tuple[int, ...]) -> str:
        """What groups along these axes send over: groups of different axes may share it."""
        inside = self.cluster.devices_of_group_on_a_node(self.program.mesh, axes) >= math.prod(self.program.mesh[axis] for axis in axes)
        return "link inside a node" if inside else "link between nodes"

    def _copy_seconds(self, num_bytes: int) -> float:
        work = op_work("clone", [(num_bytes,)], [(num_bytes,)], (), 1, 1)
        return work_seconds(work, self.cluster.device) if num_bytes else 0.0

    def _rearranged(self, node: Any) -> tuple[int, int]:
        """Bytes that a collective copies before it sends and after it has received.

        Small tensors of a bucket are packed; a cut that is not of the first dim has to be brought into pieces, and back.
        """
        name = node.target.__name__
        kind, bucket = name.removesuffix("_bucket"), name.endswith("_bucket")
        tensors = _tensors(fx.map_arg(node.args[0], lambda n: self.values[n]))
        num_devices = math.prod(self.program.mesh[axis] for axis in node.args[1])
        grown = num_devices if kind == "all_gather" else 1
        packs = bucket and not self._transport.copies_anyway(kind, num_devices)
        packed_below = self._transport.solo_bytes(kind, num_devices) if packs else 0
        before = after = 0.0
        for i, x in enumerate(tensors):
            num_bytes = _num_bytes([x])
            cuts = [(d[i], o[i]) if bucket else (d, o) for d, o in zip(node.args[2:-1:2], node.args[3::2], strict=False)]
            apart = [math.prod(x.shape[:dim]) * outer > 1 for dim, outer in cuts] if kind != "all_reduce" else [False]
            if num_bytes < packed_below:
                before += num_bytes
                after += num_bytes * grown if kind == "all_gather" else 0
            before += num_bytes if kind in ("reduce_scatter", "all_to_all") and apart[0] else 0
            after += num_bytes * grown if kind in ("all_gather", "all_to_all") and apart[-1] else 0
        return int(before), int(after)

    def _works(self, node: fx.Node) -> tuple[list[Work], str]:
        """What a node does, and in which dtype. An update goes through its parameters one by one."""
        made = _tensors(self.values[node])
        if node.target is update.fused_update:
            params: Any = fx.map_arg(node.args[0], lambda n: self.values[n])
            shapes = [tuple(p.shape) for p in params]
            states = len(made) // max(1, len(params)) - 1
            return [op_work("opweave::update", [s] * (2 + states), [s] * (1 + states)) for s in shapes], "float32"
        used = [t for n in node.all_input_nodes for t in _tensors(self.values[n])]
        if made and self.storages[node].keys() <= self._used_storages(node):
            return [NO_WORK] * (1 if isinstance(node.target, OpOverload) else _VIEWS_IN_A_FUNCTION), "float32"
        plain = [arg for arg in (*node.args, *node.kwargs.values()) if not isinstance(arg, fx.Node)]
        results = _results(self.values[node])
        work = op_work(
            _kernel(node, used), [tuple(t.shape) for t in used], [None if t is None else tuple(t.shape) for t in results], plain,
            [t.element_size() for t in used], [0 if t is None else t.element_size() for t in results],
        )  # fmt: skip
        return [work], str((made or used)[0].dtype).removeprefix("torch.") if made or used else "float32"

    def _used_storages(self, node: fx.Node) -> set[int]:
        return {s for n in node.all_input_nodes for s in self.storages.get(n, ())}
