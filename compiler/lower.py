"""Lowering: step graph + assignment → the local program of a rank. The only code that writes graphs.

Each op is emitted on local tensors, its operands brought into the layouts its strategy wants (`lower_reshard`). The last collective of a
change starts where the tensor is ready and is waited for at its first use, so gradient reductions run beside the backward pass.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from ..runtime import micro_batches, tiers
from ..runtime.program import LocalProgram, Port
from ..runtime.sharding import ShardSpec
from . import local_ops
from .emit import Cut, Emitter
from .factors import BoundOp, FactorMap, is_getitem, result_values
from .layout import Layout, replicated, spec_of
from .lower_micro_batches import MicroBatchLowering, let_sums_take_over
from .lower_reshard import Later, Resharding, ready
from .lower_updates import UpdateQueue, sent_narrow
from .micro_batches import gradient_sums, is_sum
from .residency import DEVICE, DISK, HOST, KEEP, ON_DEVICE, SMALL_BYTES, StatePlace, Uses, results, unit_of
from .rule import tensor_args
from .rule_table import UPDATE, op_name, row_of
from .step_graph import GraphInput, StepGraph
from .strategies import OpStrategy

BUCKET_BYTES = 25 * 2**20
"""Gradients are sent together up to this many bytes (the default of torch's DistributedDataParallel, bucket_cap_mb=25)."""

# Where updates run as soon as they can, so that gradients may go, and where every micro-batch ends with the last of its gradients on their
# way: no more than this share of them waits for a bucket to fill.
_NUM_EARLY_BUCKETS = 16


Moves = list[tuple[str, str]]  # (instruction, the one before which it is to stand), in this order


@dataclass(slots=True)
class Assignment:
    """Every decision, by graph node. Values not in `kept` stay as produced; (value, phase) not in `reads` is read as kept."""

    mesh: tuple[int, ...]
    ops: dict[fx.Node, OpStrategy] = field(default_factory=dict)
    inputs: dict[fx.Node, Layout] = field(default_factory=dict)
    kept: dict[fx.Node, Layout] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, str], Layout] = field(default_factory=dict)
    # Forward ops whose results the backward pass does not simply find (see `residency`), and parameters not wholly on the device.
    residency: dict[fx.Node, str] = field(default_factory=dict)
    state: dict[fx.Node, StatePlace] = field(default_factory=dict)
    # Update each parameter as soon as its gradient is there, so that gradients need not wait for each other.
    early_updates: bool = False
    # Reordering of the instructions as lowered, by `schedule`.
    moves: Moves = field(default_factory=list)
    # Gradients and new parameters are sent together up to this many bytes; what is packed takes memory a second time.
    bucket_bytes: int = BUCKET_BYTES


class Lowering:
    """Lowers one step graph under one assignment."""

    def __init__(
        self, step: StepGraph, factors: FactorMap, assignment: Assignment, *, device: str = "cpu", optimizer: str = "",
        bucket_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.step, self.factors, self.plan = step, factors, assignment
        self.mesh = assignment.mesh
        self.e = Emitter(self.mesh, device)
        self._optimizer = optimizer
        self.layouts = Resharding(
            self.e, factors, self.spec, self._is_written, assignment.bucket_bytes if bucket_bytes is None else bucket_bytes
        )
        self._whole = replicated(len(self.mesh))
        self.uses = Uses(step)
        # By phase of the readers: what the backward pass fetches or makes again, it does not find where the forward pass did.
        self._raw: dict[tuple[fx.Node, str], tuple[fx.Node, Layout]] = {}
        self._kept: dict[tuple[fx.Node, str], Later] = {}
        self._parked: dict[fx.Node, fx.Node] = {}
        self._specs: dict[tuple[fx.Node, Layout], ShardSpec] = {}
        self._num_recomputed = 0
        self._clipped = False
        self._copies: dict[tuple[fx.Node, str, Layout], Later] = {}
        self._update_of: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self._gradients: set[fx.Node] = set()
        self._infos: dict[fx.Node, GraphInput] = {}
        self.micro_batches = MicroBatchLowering(self)
        # Casts of parameters that are not run: the narrow value is fetched. Update → its gradient before it is cast, where that is sent.
        self._fetched = {cast: p for p, cast in self.uses.casts.items() if assignment.state.get(p, ON_DEVICE).cast}
        self.narrow = {
            op: narrow for p, op in self.uses.parameters() if (place := assignment.state.get(p, ON_DEVICE)).cast and place.update == HOST
            if (narrow := sent_narrow(self.uses, assignment, op)) is not None
        }  # fmt: skip
        self._not_run = {tensor_args(op)[1] for op in self.narrow}

    def run(self) -> LocalProgram:
        """The whole program."""
        placeholders = [n for n in self.step.graph.nodes if n.op == "placeholder"]
        self._infos = dict(zip(placeholders, self.step.inputs, strict=True))
        for node in self.step.ops:
            if op_name(node) == UPDATE:
                param, grad, *state = tensor_args(node)
                self._gradients.add(grad)
                self._clipped |= grad.op == "call_function" and grad.meta["op"].phase == "update"
                for s in (param, *state):
                    self._update_of[s] = (node, param)
        sums = gradient_sums(self.step)
        self._gradients |= sums.keys() | set(sums.values())
        small_buckets = min(self.layouts.bucket_bytes, self._parameter_bytes() // _NUM_EARLY_BUCKETS)
        if self.plan.early_updates:
            self.layouts.bucket_bytes = small_buckets
        self.micro_batches.begin(small_buckets)
        inputs = tuple(self._input(node, info) for node, info in self._infos.items())
        updates = UpdateQueue(self)
        updates.resume()
        to_park = self._to_park()
        for node in self.step.ops:
            if is_getitem(node) or op_name(node) == UPDATE:
                continue
            if is_sum(node):
                self.micro_batches.add(node)
                continue
            if node.meta["op"].phase == "update":
                self.micro_batches.end()
            if node not in self._not_run:
                self.emit(node)
            for unit in to_park.get(node, ()):
                self._park(unit)
            updates.after(node)
        self.micro_batches.end()
        outputs, ports = self._outputs(updates.finish())
        self.e.graph.output(tuple(outputs))
        self.e.graph.eliminate_dead_code(lambda node: node.is_impure() or _has_effect(node))
        let_sums_take_over(self.e.graph)
        return LocalProgram(
            mesh=self.mesh, graph=self.e.graph, inputs=inputs, outputs=tuple(ports), optimizer=self._optimizer,
            num_recomputed=self._num_recomputed * self.step.num_micro_batches, num_micro_batches=self.step.num_micro_batches,
        )  # fmt: skip

    def _parameter_bytes(self) -> int:
        """Local bytes of all parameters."""
        params = [n for n, info in self._infos.items() if info.kind == "param"]
        shapes = [self.spec(n, self.plan.inputs.get(n, self._whole)).local_shape() for n in params]
        return sum(math.prod(shape) * n.meta["val"].element_size() for n, shape in zip(params, shapes, strict=True))

    # -- inputs and outputs -------------------------------------------------------------------------------------------

    def spec(self, value: fx.Node, layout: Layout) -> ShardSpec:
        """The ShardSpec of a value in a layout."""
        found = self._specs.get((value, layout))
        if found is None:
            shape = tuple(int(s) for s in value.meta["val"].shape)
            found = spec_of(layout, shape, self.factors.dims(value), self.factors.splits(value), self.mesh)
            self._specs[value, layout] = found
        return found

    def _input(self, node: fx.Node, info: GraphInput) -> Port:
        local = self.e.graph.placeholder(node.name)
        if info.kind == "state":
            update_op, _ = self._update_of[node]
            layout = self.plan.ops[update_op].operands[tensor_args(update_op).index(node)]
        else:
            layout = self.plan.inputs.get(node, self._whole)
        self._raw[node, "fwd"] = (local, layout)
        return Port(
            name=node.name, kind=info.kind, fqn=info.fqn, slot=info.slot, group=info.group, dtype=node.meta["val"].dtype,
            spec=self.spec(node, layout), tier=self.tier(node), cast=self._cast_type(node),
        )  # fmt: skip

    def _cast_type(self, stored: fx.Node) -> torch.dtype | None:
        """The narrower type in which an input is stored, too."""
        cast = self.uses.casts.get(stored)
        return cast.meta["val"].dtype if cast in self._fetched else None  # type: ignore[union-attr]

    def info(self, placeholder: fx.Node) -> GraphInput:
        """What an input is."""
        return self._infos[placeholder]

    def inputs(self, kind: str) -> list[fx.Node]:
        """The placeholders of a kind."""
        return [node for node, info in self._infos.items() if info.kind == kind]

    def stored_spec(self, stored: fx.Node) -> ShardSpec:
        """How an input is cut between steps."""
        return self.spec(stored, self._raw[stored, "fwd"][1])

    def local_input(self, stored: fx.Node) -> fx.Node:
        """The local node of an input: its placeholder, or what an update that the last step deferred makes of it."""
        return self._raw[stored, "fwd"][0]

    def replace_input(self, stored: fx.Node, local: fx.Node) -> None:
        """From here on an input is this."""
        self._raw[stored, "fwd"] = (local, self._raw[stored, "fwd"][1])

    def _is_written(self, value: fx.Node) -> bool:
        """Whether a value is stored and updated in place."""
        return value.op == "placeholder" and self._infos[value].kind in ("param", "state")

    def output(self, value: fx.Node) -> fx.Node:
        """A local value as it leaves the step, complete on every rank."""
        return self.get(value, "output", self._whole)

    def output_of_its_own(self, value: fx.Node) -> fx.Node:
        """`output`, where that is no input: the next micro-batch finds another value under the name of an input."""
        local = self.output(value)
        if local.op == "placeholder":
            local = self.e.op(torch.ops.aten.clone.default, local)
            self._copies[value, "output", self._whole] = ready(local)
        return local

    def loss(self) -> fx.Node:
        """The local loss, complete on every rank."""
        return self.output(self._step_loss)

    @cached_property
    def _step_loss(self) -> fx.Node:
        return self.step.output_values("loss")[0]

    def tier(self, stored: fx.Node) -> str:
        """Where an input lives between steps."""
        if stored not in self._update_of:
            return DEVICE
        place = self.plan.state.get(self._update_of[stored][1], ON_DEVICE)
        return place.param if self._infos[stored].kind == "param" else place.state

    def _outputs(self, new_values: dict[tuple[str, str, str], tuple[fx.Node, ShardSpec]]) -> tuple[list[fx.Node], list[Port]]:
        nodes: list[fx.Node] = []
        ports: list[Port] = []
        tiers_of: dict[tuple[str, str, str], str] = {(i.kind, i.fqn, i.slot): self.tier(node) for node, i in self._infos.items()}
        for value, info in zip(self.step.returned, self.step.outputs, strict=True):
            key = (info.kind, info.fqn, info.slot)
            if key in new_values:
                node, spec = new_values[key]
            else:
                node, spec = self.output(value), self.spec(value, self._whole)
            nodes.append(node)
            dtype = value.meta["val"].dtype
            tier = tiers_of.get(key, DEVICE)
            ports.append(Port(name=value.name, kind=info.kind, fqn=info.fqn, slot=info.slot, dtype=dtype, spec=spec, tier=tier))
        return nodes, ports

    # -- ops ------------------------------------------------------------------------------------------------------------

    def _op(self, node: fx.Node, phase: str) -> None:
        """Emit an op for the readers of a phase: its own, or a later one that makes its results again."""
        if node in self._fetched and not self._fetches_whole(self._fetched[node], phase):
            local_param, stored = self._raw[self._fetched[node], "fwd"]
            self._made(node, phase, self.e.op(tiers.arrive, self.e.op(tiers.fetch_cast, local_param)), stored)
            return
        bound = self.factors.bind(node)
        chosen = self.plan.ops[node]
        args = tensor_args(node)
        local: dict[int, fx.Node] = {i: self.get(v, phase, layout) for i, (v, layout) in enumerate(zip(args, chosen.operands, strict=True))}
        result = self.emit_op(node, bound, chosen, local)
        values = result_values(node)
        for index, value in enumerate(values):
            if value is None:
                continue
            if isinstance(result, (tuple, list)):
                piece = result[index]
            elif value is node:
                piece = result
            else:
                piece = self.e.op(operator.getitem, result, index)
            layout = chosen.results[index]
            assert layout is not None, f"result {index} of {node.name} has no layout"
            self._made(value, phase, piece, layout)

    def _made(self, value: fx.Node, phase: str, piece: fx.Node, layout: Layout) -> None:
        """A value is there, for the readers of a phase."""
        self._raw[value, phase] = (piece, layout)
        if not is_sum(value):  # which is not complete before all micro-batches are
            self.keep(value, phase)

    def made(self, value: fx.Node, local: fx.Node) -> None:
        """The result of an op of one result, which somebody else has emitted for it."""
        self._raw[value, value.meta["op"].phase] = (local, self.plan.ops[value].results[0])  # type: ignore[assignment]

    def emit(self, node: fx.Node) -> None:
        """Emit an op for the readers of its own phase."""
        self._op(node, node.meta["op"].phase)

    def keep(self, value: fx.Node, phase: str) -> None:
        """Start bringing a value that was just made into the layout in which it is kept."""
        piece, layout = self._raw[value, phase]
        if value in self.plan.kept and self.plan.kept[value] != layout:
            self._kept[value, phase] = self.layouts.reshard(value, piece, layout, self.plan.kept[value], bucket=value in self._gradients)

    def wait_for_kept(self, value: fx.Node) -> None:
        """Emit the wait for a value of the backward pass that is on its way into the layout in which it is kept."""
        if (value, "bwd") in self._kept:
            self._kept[value, "bwd"]()

    def travels(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether a value is exchanged between ranks on its way to an op that reads it alone."""
        phase = value.meta["op"].phase if value.op == "call_function" else "fwd"
        have = self._raw[value, phase][1]
        return (value, phase) in self._kept or self.plan.ops[reader].operands[0] != have

    def emit_op(self, node: fx.Node, bound: BoundOp, chosen: OpStrategy, local: dict[int, fx.Node]) -> Any:
        """One op on local operands (by operand index); the local result or a tuple of results."""
        return emit_op(self.e, self.spec, node, bound, chosen, local)

    # -- layouts ----------------------------------------------------------------------------------------------------------

    def get(self, value: fx.Node, phase: str, layout: Layout) -> fx.Node:
        """The local tensor of a value in a layout, for a reader of a phase."""
        found = self._copies.get((value, phase, layout))
        if found is None:
            found = self._copies[value, phase, layout] = self._read(value, phase, layout)
        return found()

    def _read(self, value: fx.Node, phase: str, layout: Layout) -> Later:
        at = self._available(value, phase)
        node, have = self._raw[value, at]
        if (value, at) in self._kept:
            kept = self._kept[value, at]
            have = self.plan.kept[value]
            if have == self.plan.reads.get((value, phase), have) == layout:
                return kept
            node = kept()
        read = self.plan.reads.get((value, phase), have)
        if read != have:
            key = (value, phase + "/read", read)
            if key not in self._copies:
                self._copies[key] = self.layouts.reshard(value, node, have, read)
            if read == layout:
                return self._copies[key]
            node = self._copies[key]()
        return self.layouts.reshard(value, node, read, layout)

    # -- tiers and recomputation ------------------------------------------------------------------------------------------

    def _available(self, value: fx.Node, phase: str) -> str:
        """The phase under which a reader finds a value, having fetched it or made it again where the plan says so."""
        if value.op == "placeholder":
            return self._input_for(value, phase)
        maker: fx.Node = value.args[0] if is_getitem(value) else value  # type: ignore[assignment]
        if maker.meta["op"].phase != "fwd":
            return maker.meta["op"].phase
        if phase == "fwd" or (value, "bwd") in self._raw:
            return "fwd" if phase == "fwd" else "bwd"
        unit = unit_of(value)
        if unit.op == "call_function" and self.plan.residency.get(unit, KEEP) == KEEP:
            return "fwd"
        if value in self._parked:
            _, layout = self._raw[value, "fwd"]
            fetched = self._fetch(self._parked[value])
            self._raw[value, "bwd"] = (fetched, self.plan.kept.get(value, layout))
        elif maker is unit and self.plan.residency[unit] in (HOST, DISK):
            return "fwd"  # too small to be worth a copy
        else:
            self._num_recomputed += maker is unit and maker not in self._fetched
            self._op(maker, "bwd")
        return "bwd"

    def _input_for(self, value: fx.Node, phase: str) -> str:
        """An input as a phase finds it: fetched for each phase where it does not live on the device. An early update takes what the
        backward pass has fetched just before."""
        if self.tier(value) == DEVICE:
            return "fwd"
        early = phase == "update" and self._updates_early()
        name = f"fetched for {'bwd' if early and (value, 'fetched for bwd') in self._raw else phase}"
        if (value, name) not in self._raw:
            local, layout = self._raw[value, "fwd"]
            self._raw[value, name] = (self._fetch(local), layout)
        return name

    def _updates_early(self) -> bool:
        """Whether parameters are updated as soon as their gradients are there."""
        return self.plan.early_updates and not self._clipped and self.step.num_micro_batches == 1

    def _fetches_whole(self, param: fx.Node, phase: str) -> bool:
        """Whether a parameter that has a narrow form is fetched whole in a phase: for an update that follows there."""
        return phase == "bwd" and self.plan.state[param].update == DEVICE and self._updates_early()

    def _fetch(self, parked: fx.Node) -> fx.Node:
        return self.e.op(tiers.arrive, self.e.op(tiers.fetch, parked))

    def _to_park(self) -> dict[fx.Node, list[fx.Node]]:
        """Forward op → the units to copy to their tier once it has run: it is the last to read them."""
        out: dict[fx.Node, list[fx.Node]] = {}
        for unit, choice in self.plan.residency.items():
            if choice in (HOST, DISK):
                out.setdefault(self.uses.last_fwd[unit], []).append(unit)
        return out

    def _park(self, unit: fx.Node) -> None:
        for value in results(unit):
            local, layout = self._raw[value, "fwd"]
            if (value, "fwd") in self._kept:
                local, layout = self._kept[value, "fwd"](), self.plan.kept[value]
            num_bytes = math.prod(self.spec(value, layout).local_shape()) * value.meta["val"].element_size()
            if num_bytes >= SMALL_BYTES:
                self._parked[value] = self.e.op(tiers.settle, self.e.op(tiers.offload, local, self.plan.residency[unit]))

def emit_op(
    e: Emitter, spec: Callable[[fx.Node, Layout], ShardSpec], node: fx.Node, bound: BoundOp, chosen: OpStrategy, local: dict[int, fx.Node]
) -> Any:
    """Write one op on local operands (by operand index), as it is cut; the local result or a tuple of results. spec: how a value is cut in
    a layout."""
    serial = iter(range(len(local)))

    def replace(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            assert isinstance(arg.meta["val"], torch.Tensor), f"{arg.name} is no tensor"
            return local[next(serial)]
        if isinstance(arg, (list, tuple)):
            return [replace(a) for a in arg]
        return arg

    args = [replace(a) for a in node.args]
    kwargs = {k: replace(v) for k, v in node.kwargs.items()}
    row = row_of(node)
    cut = Cut(
        node=node, bound=bound, strategy=chosen, mesh=e.mesh,
        operands=[spec(v, layout) for v, layout in zip(tensor_args(node), chosen.operands, strict=True)],
        results=[
            spec(v, layout) if v is not None and layout is not None else None
            for v, layout in zip(result_values(node), chosen.results, strict=False)
        ],
    )  # fmt: skip
    form = row.local if row is not None and row.local is not None else local_ops.plain
    return form(e, cut, args, kwargs)


def _has_effect(node: fx.Node) -> bool:
    """Whether an instruction does something although nobody reads its result."""
    return node.target is micro_batches.end or (node.target is tiers.settle and node.all_input_nodes[0].target is tiers.write_back_cast)


def lower(
    step: StepGraph, factors: FactorMap, assignment: Assignment, *, device: str = "cpu", optimizer: str = "",
    bucket_bytes: int | None = None,
) -> LocalProgram:  # fmt: skip
    """The local program of every rank (see the module docstring). bucket_bytes: in place of the assignment's. Raises ValueError where a
    move names no instruction of it."""
    program = Lowering(step, factors, assignment, device=device, optimizer=optimizer, bucket_bytes=bucket_bytes).run()
    move(program.graph, assignment.moves)
    return program


def move(graph: fx.Graph, moves: Moves) -> Moves:
    """Reorder the instructions of a graph; returns the moves that take it back."""
    if not moves:
        return []
    nodes = {node.name: node for node in graph.nodes}
    back: Moves = []
    for name, before in moves:
        if name not in nodes or before not in nodes:
            raise ValueError(f"the plan's schedule moves {name!r} before {before!r}, which the program does not have; it is damaged")
        back.append((name, nodes[name].next.name))
        nodes[before].prepend(nodes[name])
    graph.lint()
    return back[::-1]
