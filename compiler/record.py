"""A solved candidate as a plan: decisions, predictions, and the report a person reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.energy import step_joules, step_price
from ..cost_model.simulate import COMPUTE, Simulation
from ..runtime.memory import MemoryReport, Owners
from .analyse import Analysis
from .choices import ChoiceGraph
from .layout import num_pieces
from .lower import BUCKET_BYTES, Assignment, Moves
from .lower_updates import sent_narrow
from .naming import module_rows, usual_names
from .plan import Decision, Plan, decisions_of, dtype_name, fingerprint, to_assignment
from .pricing import PricedProblem
from .residency import DEVICE, HOST, KEEP, ON_DEVICE, RECOMPUTE, StatePlace, Uses, results
from .rule import tensor_args
from .rule_table import UPDATE, op_name

if TYPE_CHECKING:
    from .solver import Solution


_NUM_OWNERS = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the program of a candidate is predicted to need: memory, exactly, and time, simulated."""

    memory: MemoryReport
    simulation: Simulation


@dataclass(slots=True)
class Candidate:
    """One mesh with its solved problem. with_places: whether it also chose where tensors live. moves, deferred: its schedule (see
    `schedule`, `defer`). bucket_bytes: as in `lower.Assignment`."""

    mesh: tuple[int, ...]
    priced: PricedProblem
    solution: Solution
    with_places: bool = False
    moves: Moves = field(default_factory=list)
    deferred: frozenset[str] = frozenset()
    bucket_bytes: int = BUCKET_BYTES

    def assignment(self) -> Assignment:
        """What lowering needs."""
        selection = [int(i) for i in self.solution.selection]
        out = to_assignment(self.priced.graph, selection[: len(self.priced.graph.choices)])
        out.early_updates, out.bucket_bytes = self.with_places, self.bucket_bytes
        for node in self.priced.places:
            _, place = node.options[selection[node.index]]
            if isinstance(place, StatePlace):
                assert self.priced.uses is not None, "places were priced"
                place = possible(out, self.priced.uses, node.member, replace(place, deferred=node.member.name in self.deferred))
                if place != ON_DEVICE:
                    out.state[node.member] = place
            elif place != KEEP:
                # What nobody asks for again is made again for nobody.
                out.residency[node.member] = place if place in self.tiers else RECOMPUTE
        return out

    def expected_peaks(self) -> dict[str, float]:
        """Bytes per pool as the problem adds them up."""
        problem = self.priced.problem
        return dict(zip(problem.pools, problem.evaluate(self.solution.selection).peak_bytes.tolist(), strict=True))

    @property
    def tiers(self) -> tuple[str, ...]:
        """Pools beside the device's."""
        return tuple(pool for pool in self.priced.problem.pools if pool != DEVICE)


def possible(assignment: Assignment, uses: Uses, param: fx.Node, place: StatePlace) -> StatePlace:
    """The place, or the next to it that the layouts allow: the CPU updates a parameter in the very layout in which it is stored, and what
    is fetched in a narrower type is read in that layout."""
    update, stored = next(user for user in param.users if op_name(user) == UPDATE), assignment.inputs[param]
    cast = uses.casts.get(param) if place.cast else None
    if cast is None or not assignment.ops[cast].operands[0] == assignment.ops[cast].results[0] == stored:
        place = StatePlace(place.param, place.state, place.update)
    if place.update == HOST and assignment.ops[update].operands[0] != stored:
        return StatePlace(place.param, place.state, DEVICE, place.cast)
    return replace(place, deferred=place.deferred and sent_narrow(uses, assignment, update) is not None)


def record(
    analysis: Analysis, cluster: Cluster, best: Candidate, found: list[Candidate], force: str | None, times: dict[str, float],
    outcome: Outcome,
) -> Plan:  # fmt: skip
    """The plan of a candidate. found: what else was considered."""
    graph, solution, priced = best.priced.graph, best.solution, best.priced
    selection = [int(i) for i in solution.selection[: len(graph.choices)]]
    names, counts = usual_names(graph, selection)
    decisions = decisions_of(graph, selection, priced.op_seconds, names)
    assignment = best.assignment()
    step = analysis.step
    return Plan(
        model={"name": step.model_name, "fingerprint": fingerprint(step), "num_parameters": num_parameters(graph)},
        cluster={"name": cluster.name, "fingerprint": cluster.fingerprint(), "num_devices": cluster.num_devices},
        mesh=best.mesh, decisions=decisions + place_decisions(assignment), predicted=_predicted(outcome, cluster),
        solver={
            "objective_s": float(solution.objective),
            "lower_bound_s": float(solution.lower_bound),
            "gap": float(solution.gap),
            "status": solution.status,
            "num_nodes": priced.problem.num_nodes,
            "num_edges": priced.problem.num_edges,
        },
        planning_time_s=dict(times), patterns=counts, force=force, autocast=dtype_name(step.autocast),
        modules=module_rows(graph, selection, decisions),
        replicated_ops=[{"op": op, "reason": why, "count": n} for (op, why), n in sorted(analysis.replicated.items())],
        candidates=[{"mesh": list(c.mesh), "objective_s": float(c.solution.objective), "gap": float(c.solution.gap)} for c in found],
        accumulate=step.num_micro_batches, early_updates=assignment.early_updates, bucket_bytes=best.bucket_bytes, moves=best.moves,
        residency=residency_summary(analysis, assignment), state=state_summary(analysis, assignment),
    )  # fmt: skip


def num_parameters(graph: ChoiceGraph) -> int:
    """Elements of all parameters."""
    placeholders = (n for n in graph.step.graph.nodes if n.op == "placeholder")
    return sum(int(n.meta["val"].numel()) for n, i in zip(placeholders, graph.step.inputs, strict=True) if i.kind == "param")


def place_decisions(assignment: Assignment) -> list[Decision]:
    """Residency and state as plan entries; those alike in one entry."""
    alike: dict[tuple[str, str], list[str]] = {}
    for node, place in assignment.residency.items():
        alike.setdefault(("residency", place), []).append(node.name)
    for node, where in assignment.state.items():
        alike.setdefault(("state", where.text), []).append(node.name)
    return [Decision(kind=kind, nodes=tuple(nodes), codes=(), text=text) for (kind, text), nodes in alike.items()]


def residency_summary(analysis: Analysis, assignment: Assignment) -> dict[str, dict[str, int]]:
    """What becomes of the forward pass's results that the backward pass could read: count and local bytes per choice."""
    uses, count, size = Uses(analysis.step), Counter[str](), Counter[str]()
    again = _made_again(uses, assignment)
    for unit in uses.units:
        place = assignment.residency.get(unit, KEEP)
        if place == KEEP and not uses.later[unit]:
            continue
        name = {"host": "offload_host", "disk": "offload_disk"}.get(place, place)
        if place == RECOMPUTE and unit not in again:
            name = "drop"
        count[name] += 1
        for value in results(unit):
            strategy = assignment.ops[unit]
            index = value.args[1] if value is not unit else 0
            layout = assignment.kept.get(value) or strategy.results[index]  # type: ignore[index]
            val = value.meta["val"]
            size[name] += val.numel() * val.element_size() // num_pieces(layout, assignment.mesh)  # type: ignore[arg-type]
    names = ("keep", "offload_host", "offload_disk", "recompute", "drop")
    return {name: {"count": count[name], "bytes": int(size[name])} for name in names}


def _made_again(uses: Uses, assignment: Assignment) -> set[Any]:
    """Units that are run a second time: asked for behind the forward pass, or by another that is."""
    again: set[Any] = set()
    for unit in reversed(uses.units):
        if assignment.residency.get(unit) == RECOMPUTE and (uses.later[unit] or any(c in again for c in uses.consumers[unit])):
            again.add(unit)
    return again


def state_summary(analysis: Analysis, assignment: Assignment) -> dict[str, dict[str, int]]:
    """Local bytes of parameters and their optimizer state per place (see `StatePlace.text`)."""
    out: dict[str, dict[str, int]] = {}
    for param, op in Uses(analysis.step).parameters():
        row = out.setdefault(assignment.state.get(param, ON_DEVICE).text, {"count": 0, "bytes": 0})
        row["count"] += 1
        operands = [(param, assignment.inputs[param]), *_state_layouts(op, assignment)]
        row["bytes"] += sum(v.meta["val"].numel() * v.meta["val"].element_size() // num_pieces(a, assignment.mesh) for v, a in operands)
    return out


def _state_layouts(op: Any, assignment: Assignment) -> list[tuple[Any, Any]]:
    return list(zip(tensor_args(op)[2:], assignment.ops[op].operands[2:], strict=True))


def _predicted(outcome: Outcome, cluster: Cluster) -> dict[str, Any]:
    """joules, price: of one step of the whole cluster; None where its file lacks the figures."""
    memory, simulation = outcome.memory, outcome.simulation
    others = [pool for pool, num_bytes in memory.pools.items() if num_bytes and pool != DEVICE]
    return {
        "step_time_s": simulation.step_time_s,
        "streams": {name: float(seconds) for name, seconds in simulation.busy_s.items()},
        "exposed": {name: float(seconds) for name, seconds in simulation.exposed_s.items()},
        "peak_bytes": dict(memory.pools),
        "peak_at": memory.at,
        "peak_owner": _owner_rows(memory.owners),
        "pool_at": {pool: memory.pool_at[pool] for pool in others},
        "pool_owner": {pool: _owner_rows(memory.pool_owners[pool]) for pool in others},
        "joules": step_joules(cluster, simulation.step_time_s, simulation.busy_s.get(COMPUTE, 0.0)),
        "price": step_price(cluster, simulation.step_time_s),
    }


def _owner_rows(owners: Owners) -> list[dict[str, Any]]:
    """The largest of what was alive at a peak."""
    return [{"name": name, "bytes": num_bytes} for name, num_bytes in owners[:_NUM_OWNERS]]
