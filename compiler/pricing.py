"""Prices: the choice graph in seconds and bytes, as a `SelectionProblem`.

- An op costs its kernel's time on local sizes (`cost_model.work`, `cost_model.kernels`), or that of the ops it becomes (`price_local`).
- A link costs the collectives of `reshard.steps` and the copies around them (`price_collectives`). Gradient reduction and parameter
  gathers ("side" links) go into a stream of their own where the cluster can overlap: only what exceeds the computation that hides it
  counts. At both ends of the step nothing hides them.
- Where energy is minimised, a second of computing counts 1 + `busy_weight` (`cost_model.energy`): waiting for a message is cheaper.
- What runs once per micro-batch is priced as often (`micro_batches`); the sums over micro-batches are there all the time until then.
- Memory, pool "device": stored parameters and optimizer state over the whole step; a tensor from the op that makes it to its last
  reader, through views of it; kept and read copies over their own intervals; what an op takes for itself while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.kernels import MATRIX_CLASSES, kernel_seconds
from ..cost_model.work import class_of, op_class, op_work
from ..runtime.communicator import DirectTransport
from ..runtime.workspace import WORKSPACE_BYTES
from .choices import Choice, ChoiceGraph, Link, readers_by_value
from .factors import is_getitem, result_values
from .layout import REPLICATED, Layout, num_pieces, spec_of
from .lower import BUCKET_BYTES
from .micro_batches import first_behind, is_sum, num_runs
from .overlap import Overlap
from .place_nodes import Copies, PlaceNode
from .place_recipes import AUTO
from .price_collectives import FORBIDDEN, CollectivePrices, Moved
from .price_local import LocalPrices
from .price_places import PlacePricer
from .problem import ProblemBuilder, SelectionProblem
from .residency import DEVICE, DISK, HOST, Uses
from .rule import results_of, tensor_args
from .rule_table import UPDATE, op_name
from .strategies import OpStrategy
from .views import aliased_operand

SIDE = "collectives"
TIERS = (HOST, DISK)
_SEVERAL_OPS = ("*", "#")  # flags of letters whose split makes an op several


def tensor_bytes(value: torch.Tensor) -> int:
    """Global bytes of a tensor."""
    return value.numel() * value.element_size()


@dataclass(slots=True)
class PricedProblem:
    """The selection problem of a choice graph; node i of the problem is choice i, behind them are the places."""

    problem: SelectionProblem
    graph: ChoiceGraph
    op_seconds: dict[int, np.ndarray] = field(default_factory=dict)  # choice index -> seconds per option, one member in a whole step
    places: list[PlaceNode] = field(default_factory=list)
    uses: Uses | None = None  # where there are places
    copies: list[Copies] = field(default_factory=list)


class Pricer:
    """Turns a choice graph into numbers."""

    def __init__(
        self, graph: ChoiceGraph, cluster: Cluster, limits: Mapping[str, float], *, places: bool = False, recipe: str = AUTO,
        copies_hidden: float = 1.0, prefetch: bool = True, busy_weight: float = 0.0,
    ) -> None:  # fmt: skip
        """limits: bytes per pool. places: also choose where tensors live, on the device or in the other pools there are limits for, as far
        as the recipe leaves a choice (`place_recipes`). copies_hidden: share of a phase's computation that copies between tiers may take.
        prefetch: whether copies have time to be made before their results are needed. busy_weight: what a second of computing counts beside
        its second of the step."""
        self.graph = graph
        self.cluster = cluster
        self.mesh = graph.mesh
        self.prices = CollectivePrices(cluster, graph.mesh)
        self.local_prices = LocalPrices(graph.factors, cluster, graph.mesh)
        self.op_seconds: dict[int, np.ndarray] = {}
        self.op_costs: dict[int, np.ndarray] = {}
        self._busy_weight = busy_weight
        tiers = [tier for tier in TIERS if limits.get(tier)] if places else []
        overlap = cluster.overlap if math.prod(graph.mesh) > 1 else 0.0
        # What one second of computation hides: of collectives, and of copies between tiers.
        self._side_hidden = overlap
        self.overlap = Overlap(tiers, copies_hidden)
        self.prefetch = prefetch
        pools = {pool: limits[pool] for pool in (DEVICE, *tiers)}
        streams = ((SIDE,) if overlap else ()) + self.overlap.streams
        self.builder = ProblemBuilder(graph.step.model_name or "step", pools=pools, streams=streams)
        self._workspaces: dict[int, np.ndarray] = {}  # by choice
        self._order = {node: i for i, node in enumerate(graph.step.graph.nodes)}
        self._readers = readers_by_value(graph.step)
        self._end = len(self._order)
        self.last_use: dict[fx.Node, int] = {}  # time after which a tensor is needed no more, where nothing is made again
        self._behind = first_behind(graph.step)
        products = [self._order[node] for node in graph.step.ops if class_of(op_class(op_name(node))) in MATRIX_CLASSES]
        self._first_product, self._last_product = (products[0], products[-1]) if products else (self._end, -1)
        self._buffers = set(graph.step.output_values("buffer"))
        self._places = PlacePricer(self, tiers, recipe) if places else None

    def price(self) -> PricedProblem:
        """Nodes, links, memory."""
        output_values = self._whole_outputs()
        for choice in self.graph.choices:
            self._node(choice, output_values)
        for link in self.graph.links:
            self._edge(link)
        self._memory()
        places = self._places.add() if self._places is not None else []
        uses = self._places.uses if self._places is not None else None
        seconds = {index: costs * self.num_runs(self.graph.choices[index].phase) for index, costs in self.op_seconds.items()}
        copies = self._places.copies if self._places is not None else []
        return PricedProblem(
            problem=self.builder.build(), graph=self.graph, op_seconds=seconds, places=places, uses=uses, copies=copies
        )

    def num_runs(self, phase: str) -> int:
        """How often the ops of a phase run in a step."""
        return num_runs(self.graph.step, phase)

    def cost_of(self, seconds: np.ndarray) -> np.ndarray:
        """What so many seconds of computing cost."""
        return (1 + self._busy_weight) * seconds

    def hidden_behind(self, seconds: np.ndarray, phase: str) -> dict[str, np.ndarray] | None:
        """What computation of so many seconds in a phase takes off each stream."""
        side = {SIDE: -self._side_hidden * seconds} if self._side_hidden else {}
        return side | self.overlap.hidden_behind(seconds, phase) or None

    # -- time -----------------------------------------------------------------------------------------------------------

    def _node(self, choice: Choice, outputs: dict[fx.Node, int]) -> None:
        count = len(choice.members)
        costs = np.zeros(len(choice.options))
        streams = None
        if choice.kind == "op":
            kernel, exchange = self._op_prices(choice)
            seconds = self.op_seconds[choice.index] = kernel + exchange
            self.op_costs[choice.index] = seconds + self._busy_weight * kernel
            count *= self.num_runs(choice.phase)
            costs = self.op_costs[choice.index] * count
            if choice.phase != "update":
                streams = self.hidden_behind(seconds * count, choice.phase)
        for node in choice.members:
            if node in outputs or any(v in outputs for v in (result_values(node) if choice.kind == "op" else [])):
                costs = costs + self._output_costs(choice, node, outputs)
        self.builder.add_node(costs, streams)

    def _op_prices(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """float64[options] seconds of one member: of the kernel on local sizes, and of what its local form exchanges."""
        node = choice.members[0]
        operands = [a.meta["val"] for a in tensor_args(node)]
        made = results_of(node)
        results = [r for r in made if r is not None]
        work = op_work(
            op_name(node), [tuple(v.shape) for v in operands], [None if r is None else tuple(r.shape) for r in made], _plain_args(node),
            in_itemsize=[v.element_size() for v in operands], out_itemsize=[0 if r is None else r.element_size() for r in made],
        )  # fmt: skip
        dtype = str((results or operands)[0].dtype).removeprefix("torch.") if results or operands else "float32"
        options: list[OpStrategy] = choice.options
        flops = np.array([work.flops / self._divisor(s) for s in options])
        share = self._moved_bytes(options, operands, made)
        moved = share * (work.bytes / max(self._moved_bytes([_whole_of(options[0], len(self.mesh))], operands, made)[0], 1))
        seconds = np.array(kernel_seconds(flops, moved, work.op_class, self.cluster.device, dtype, work.min_dim), dtype=float)
        exchange = np.zeros(len(options))
        for k, strategy in enumerate(options):
            if choice.op is not None and any(code >= 0 and choice.op.flags[code] in _SEVERAL_OPS for code in strategy.codes):
                seconds[k], exchange[k] = self.local_prices.seconds(node, choice.op, strategy)
        return seconds, exchange

    def _divisor(self, s: OpStrategy) -> int:
        return math.prod(n for c, n in zip(s.codes, self.mesh, strict=True) if c >= 0)

    def _moved_bytes(self, options: list[OpStrategy], operands: list[torch.Tensor], results: list[torch.Tensor | None]) -> np.ndarray:
        """float64[options]: local bytes of all operands and results."""
        sizes = [tensor_bytes(v) for v in operands] + [0 if r is None else tensor_bytes(r) for r in results]
        out = np.zeros(len(options))
        for k, s in enumerate(options):
            layouts = (*s.operands, *s.results)
            out[k] = sum(b / num_pieces(layout, self.mesh) for b, layout in zip(sizes, layouts, strict=False) if layout is not None)
        return out

    def _whole_outputs(self) -> dict[fx.Node, int]:
        """Values that leave the step whole on every rank, with their global bytes: loss, extras, buffers, gradients asked for. Of several
        micro-batches each gives the buffers to the next."""
        return {
            value: tensor_bytes(value.meta["val"])
            for value, info in zip(self.graph.step.returned, self.graph.step.outputs, strict=True)
            if isinstance(value, fx.Node) and info.kind not in ("param", "state")
        }

    def _output_costs(self, choice: Choice, node: fx.Node, outputs: dict[fx.Node, int]) -> np.ndarray:
        whole = (REPLICATED,) * len(self.mesh)
        total = np.zeros(len(choice.options))
        values = [node] if choice.kind != "op" else [v for v in result_values(node) if v is not None]
        for value in values:
            if value not in outputs or (choice.kind == "op" and value in self.graph.kept):
                continue
            index = value.args[1] if is_getitem(value) else 0
            layouts = [s.results[index] for s in choice.options] if choice.kind == "op" else choice.options
            times = self.num_runs("bwd") if value in self._buffers else 1
            messages, copies = self.prices.matrices(layouts, [whole], outputs[value], self._moved(value))
            total += times * (messages + copies)[:, 0]
        return total

    def _edge(self, link: Link) -> None:
        value = link.value.meta["val"]
        if isinstance(value, (list, tuple)):
            value = value[0]
        num_bytes = tensor_bytes(value)
        share = self._latency_share(num_bytes) if link.bucketed else 1.0
        moved = self._moved(link.value, packed=link.bucketed and self._packs(num_bytes))
        messages, copies = self.prices.matrices(link.source_layouts, link.target_layouts, num_bytes, moved, share)
        messages, copies = messages * (link.count * link.num_runs), copies * (link.count * link.num_runs)
        matrix = messages + copies
        target = link.target
        if target.kind == "read":
            # An alias exists exactly where the kept tensor has that very layout.
            same = np.array([[a == b for b in target.options] for a in link.source_layouts])
            matrix = np.where(np.array(target.alias)[None, :] != same, FORBIDDEN, matrix)
            own = self.graph.own_reads
            if own and link.source.kind == "input":
                agree = np.array([[all(a[x] == b[x] for x in own) for b in target.options] for a in link.source_layouts])
                matrix = np.where(agree, matrix, FORBIDDEN)
        if link.side and self._side_hidden and not self._is_exposed(link):
            finite = np.isfinite(matrix)
            sent = np.where(finite, messages, 0.0)
            # What runs beside it slows the computation down by what the two take from each other (`Cluster.overlap`).
            costs = np.where(finite, copies + (1 - self._side_hidden) * sent, FORBIDDEN)
            self.builder.add_edge(link.source.index, target.index, costs, {SIDE: self._side_hidden * sent})
        elif np.any(matrix):
            self.builder.add_edge(link.source.index, target.index, matrix)

    def _is_exposed(self, link: Link) -> bool:
        """Whether there is no computation left that could hide a side link: a new parameter's way back behind the last update, a gradient
        that is made last, a parameter that is read first. Of equal layers the computation of the others hides what one exchanges."""
        if link.target.kind == "input":
            return self._places is None  # else each parameter is updated in the backward pass, as soon as that can be
        if link.count > 1 or link.value not in self._order:
            return False
        if link.target.kind == "value":
            return self._order[link.value] >= self._last_product
        readers = [self._order[op] for op, _ in self._readers[link.value]]
        return link.target.kind == "read" and link.target.phase == "fwd" and min(readers, default=0) <= self._first_product

    def _moved(self, value: fx.Node, *, packed: bool = False) -> Moved:
        """How a value lies in memory."""
        dims = self.graph.factors.splits(value)
        atoms = self.graph.factors.atoms(value)
        outermost = next((i for i, size in enumerate(atoms) if size > 1), 0)
        in_place = value.op == "placeholder" and value in self.graph.updates
        whole_dims = frozenset(i for i, (_, inner) in enumerate(dims) if inner == 0) if in_place else frozenset()
        return Moved(outermost, whole_dims, packed)

    def _packs(self, num_bytes: int) -> bool:
        """Whether a tensor of a bucket is copied into a buffer with the others."""
        return self.cluster.device.kind != "cpu" or num_bytes < DirectTransport.SOLO_BYTES

    def _latency_share(self, num_bytes: int) -> float:
        """A gradient's share of the latency of the messages it travels in: they are full, but there is at least one for all."""
        return min(1.0, max(num_bytes / BUCKET_BYTES, 1 / max(1, len(self.graph.updates))))

    # -- memory ---------------------------------------------------------------------------------------------------------

    def _memory(self) -> None:
        rows: dict[tuple[int, int, int], np.ndarray] = {}

        def add(choice: Choice, start: int, end: int, num_bytes: np.ndarray) -> None:
            if end > start and num_bytes.any():
                key = (choice.index, start, end)
                rows[key] = rows[key] + num_bytes if key in rows else num_bytes

        last_use = self.last_use = self._last_uses()
        for node in self.graph.step.graph.nodes:
            if node.op == "placeholder" and node in self.graph.input_choice:
                self._stored_memory(node, add)
            elif node.op == "call_function" and not is_getitem(node):
                self._op_memory(node, add, last_use)
        for (value, _phase), choice in self.graph.reads.items():
            self._read_memory(value, _phase, choice, add, last_use)
        for (index, start, end), num_bytes in rows.items():
            self.builder.add_usage(index, "device", start, end, num_bytes)

    def _last_uses(self) -> dict[fx.Node, int]:
        """Time after which a tensor is needed no more, itself or through views of it."""
        last: dict[fx.Node, int] = {}
        for node in reversed(self.graph.step.graph.nodes):
            if node.op == "output":
                for value in node.args[0]:
                    if isinstance(value, fx.Node):
                        last[value] = self._end
                continue
            end = last.get(node, self._order[node]) + 1 if node not in last else last[node]
            last[node] = max(end, self._order[node] + 1)
            if node.op == "call_function":
                alias = aliased_operand(node)
                for arg in node.all_input_nodes:
                    reach = last[node] if arg is alias or is_getitem(node) else self._order[node] + 1
                    last[arg] = max(last.get(arg, 0), reach)
        return last

    def _local(self, value: fx.Node, layouts: list[Layout]) -> np.ndarray:
        num_bytes = tensor_bytes(value.meta["val"])
        return np.array([num_bytes / num_pieces(layout, self.mesh) for layout in layouts])

    def _stored_memory(self, node: fx.Node, add) -> None:  # type: ignore[no-untyped-def]
        if self._places is not None and node in self._places.parameters.of:
            return
        choice = self.graph.input_choice[node]
        add(choice, 0, self._end, self._local(node, choice.options))
        update = self.graph.updates.get(node)
        if update is None:
            return
        chosen = self.graph.op_choice[update]
        for i, state in enumerate(tensor_args(update)[2:]):
            add(chosen, 0, self._end, self._local(state, [s.operands[2 + i] for s in chosen.options]))

    def _op_memory(self, node: fx.Node, add, last_use) -> None:  # type: ignore[no-untyped-def]
        if aliased_operand(node) is not None or op_name(node) == UPDATE:
            return
        choice = self.graph.op_choice[node]
        at = self._order[node]
        if node.target in WORKSPACE_BYTES and self.cluster.device.kind == "cpu":
            add(choice, at, at + 1, self._workspace(choice))
        if self._places is not None and (node in self._places.units or node in self._places.parameters.sums.values()):
            return
        start, until = (0, self._behind) if is_sum(node) else (at, at + 1)
        for index, value in enumerate(result_values(node)):
            if value is None:
                continue
            local = self._local(value, [s.results[index] for s in choice.options])
            kept = self.graph.kept.get(value)
            if kept is None:
                add(choice, start, last_use[value], local)
            else:
                add(choice, start, until, local)
                end = self._places.parameters.gradient_end.get(value, last_use[value]) if self._places is not None else last_use[value]
                add(kept, until, end, self._local(value, kept.options))

    def _workspace(self, choice: Choice) -> np.ndarray:
        """float64[options]: what the op takes for itself."""
        if choice.index not in self._workspaces:
            self._workspaces[choice.index] = np.array([float(self._workspace_of(choice.members[0], s)) for s in choice.options])
        return self._workspaces[choice.index]

    def _workspace_of(self, node: fx.Node, s: OpStrategy) -> int:
        operands = iter([self._without_data(value, layout) for value, layout in zip(tensor_args(node), s.operands, strict=True)])
        args = [next(operands) if isinstance(arg, fx.Node) else arg for arg in node.args]
        result = self._without_data(node, s.results[0]) if isinstance(node.meta["val"], torch.Tensor) and s.results[0] is not None else None
        return WORKSPACE_BYTES[node.target](result, *args)

    def _without_data(self, value: fx.Node, layout: Layout) -> torch.Tensor:
        """A device's piece of a tensor."""
        whole: torch.Tensor = value.meta["val"]
        spec = spec_of(layout, tuple(whole.shape), self.graph.factors.dims(value), self.graph.factors.splits(value), self.mesh)
        return torch.empty(spec.local_shape(), dtype=whole.dtype, device="meta")

    def _read_memory(self, value, phase, choice, add, last_use) -> None:  # type: ignore[no-untyped-def]
        users = [op for op, _ in self._readers[value] if op.meta["op"].phase == phase]
        if not users:
            return
        copies = self._local(value, choice.options) * ~np.array(choice.alias)
        ends = [last_use[op] if aliased_operand(op) is value else self._order[op] + 1 for op in users]
        add(choice, min(self._order[op] for op in users), max(ends), copies)


def _whole_of(s: OpStrategy, num_axes: int) -> OpStrategy:
    """The strategy that splits nothing."""
    whole = (REPLICATED,) * num_axes
    return OpStrategy(whole, (whole,) * len(s.operands), tuple(r and whole for r in s.results))


def _plain_args(node: fx.Node) -> list[object]:
    """The arguments that are no tensors, in order."""

    def has_node(arg: object) -> bool:
        return isinstance(arg, fx.Node) or (isinstance(arg, (list, tuple)) and any(isinstance(x, fx.Node) for x in arg))

    return [a for a in node.args if not has_node(a)]
