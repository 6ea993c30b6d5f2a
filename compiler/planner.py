"""From an analysed step to a plan: choices, prices and selection for each mesh, the best one recorded.

`plan_step` is called by `api` once the step is captured and analysed.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from ..cost_model.cluster import Cluster
from ..runtime.dry_run import dry_run
from ..runtime.memory import MemoryReport
from .analyse import Analysis
from .choices import ChoiceGraph, build_choices
from .force import restriction
from .lower import lower
from .naming import module_rows, usual_names
from .plan import Plan, decisions_of, fingerprint, to_assignment
from .pricing import SIDE, PricedProblem, Pricer
from .problem import ProblemBuilder, SelectionProblem

if TYPE_CHECKING:
    from .solver import Solution

GAP = 1e-4
"""Plans are proven to within this share of the best possible predicted time."""


_WAYS_OUT = "Ways out: a smaller batch, bf16 autocast, more devices, or a larger memory_limit."


class DoesNotFitError(ValueError):
    """No plan stays within the memory limit."""


@dataclass(slots=True)
class Candidate:
    """One mesh with its solved problem."""

    mesh: tuple[int, ...]
    priced: PricedProblem
    solution: Solution
    limit: float


def plan_step(
    analysis: Analysis, cluster: Cluster, *, mesh: tuple[int, ...] | None = None, force: str | None = None,
    memory_limit: float | None = None, time_limit_s: float = 60.0, capture_s: float = 0.0,
) -> Plan:  # fmt: skip
    """The cheapest plan over the mesh candidates that fits the memory.

    memory_limit: bytes per device (default: what the cluster's device has). Raises DoesNotFitError, and ValueError for a mesh that
    is not the cluster's size.
    """
    started = time.perf_counter()
    limit = float(cluster.device.usable_bytes) if memory_limit is None else _checked_limit(memory_limit)
    meshes = [_checked(mesh_of(mesh), cluster)] if mesh is not None else cluster.mesh_candidates()
    times = {"capture": capture_s, "strategies": 0.0, "pricing": 0.0, "solve": 0.0, "verify": 0.0}
    found: list[Candidate] = []
    refused: list[Solution] = []
    for candidate_mesh in meshes:
        candidate = _solve(analysis, cluster, candidate_mesh, force, limit, time_limit_s, times)
        if candidate.solution.status == "infeasible":
            refused.append(candidate.solution)
        else:
            found.append(candidate)
    if not found:
        raise DoesNotFitError(_why_not(analysis, cluster, meshes, limit, refused))
    best, memory = _within(analysis, cluster, found, force, limit, time_limit_s, times)
    plan = _record(analysis, cluster, best, found, force, times, memory)
    plan.planning_time_s["total"] = capture_s + time.perf_counter() - started
    return plan


def _within(
    analysis: Analysis, cluster: Cluster, found: list[Candidate], force: str | None, limit: float, time_limit_s: float,
    times: dict[str, float],
) -> tuple[Candidate, MemoryReport]:  # fmt: skip
    """The cheapest candidate whose *program* stays within the limit.

    The selection problem does not see copies of an instant (a tensor and its gathered form, buckets); the dry run of the lowered program
    does. Where it finds more than the limit, the problem is solved again with that much less.
    """
    todo = sorted(found, key=lambda c: c.solution.objective)
    over = ""
    for _ in range(_MAX_TRIES):
        best = todo[0]
        t0 = time.perf_counter()
        report = _dry_run(analysis, best)
        times["verify"] += time.perf_counter() - t0
        if report.peak_bytes <= limit:
            return best, report
        over = f"mesh {show_mesh(best.mesh)} needs {report.peak_bytes:,} bytes at {report.at}"
        tighter = best.limit - 1.05 * (report.peak_bytes - limit)
        todo[0] = _solve(analysis, cluster, best.mesh, force, tighter, time_limit_s, times)
        if todo[0].solution.status == "infeasible":
            todo.pop(0)
        if not todo:
            break
        todo.sort(key=lambda c: c.solution.objective)
    raise DoesNotFitError(f"{_head(analysis, cluster, limit)}; {over}. {_WAYS_OUT}")


_MAX_TRIES = 8


def _dry_run(analysis: Analysis, candidate: Candidate) -> MemoryReport:
    assignment = to_assignment(candidate.priced.graph, [int(i) for i in candidate.solution.selection])
    return dry_run(lower(analysis.step, analysis.factors, assignment, device="meta"))


def show_mesh(mesh: tuple[int, ...]) -> str:
    """(2, 4) as "2x4"."""
    return "x".join(map(str, mesh))


def mesh_of(mesh: Any) -> tuple[int, ...]:
    """Devices per mesh axis from a tuple, a list or one number. Raises ValueError for anything else."""
    sizes = (mesh,) if isinstance(mesh, int) else mesh
    if isinstance(sizes, (tuple, list)) and sizes and all(isinstance(n, int) and n > 0 for n in sizes):
        return tuple(sizes)
    raise ValueError(f"mesh is {mesh!r}; give devices per axis as a tuple of positive whole numbers, e.g. (2,) or (2, 4)")


def _checked_limit(limit: Any) -> float:
    if isinstance(limit, (int, float)) and limit > 0:
        return float(limit)
    raise ValueError(f"memory_limit is {limit!r}; give bytes per device, a number above 0, e.g. 10e9")


def _checked(mesh: tuple[int, ...], cluster: Cluster) -> tuple[int, ...]:
    if math.prod(mesh) != cluster.num_devices:
        raise ValueError(
            f"mesh {show_mesh(mesh)} has {math.prod(mesh)} devices, cluster {cluster.name!r} has {cluster.num_devices}; "
            f"candidates are {', '.join(map(show_mesh, cluster.mesh_candidates()))}"
        )
    return tuple(mesh)


def _solve(
    analysis: Analysis, cluster: Cluster, mesh: tuple[int, ...], force: str | None, limit: float, time_limit_s: float,
    times: dict[str, float],
) -> Candidate:  # fmt: skip
    t0 = time.perf_counter()
    limits = restriction(force, analysis.step, analysis.factors, mesh) if force else None
    graph = build_choices(analysis.step, analysis.factors, mesh, limits)
    t1 = time.perf_counter()
    priced = Pricer(graph, cluster, limit).price()
    t2 = time.perf_counter()
    solution = _solution(priced.problem, time_limit_s)
    t3 = time.perf_counter()
    for name, seconds in (("strategies", t1 - t0), ("pricing", t2 - t1), ("solve", t3 - t2)):
        times[name] += seconds
    return Candidate(mesh, priced, solution, limit)


@lru_cache(maxsize=1)
def _warm_up() -> None:
    """Compile the solver's kernels (once per machine: they are cached) before any time limit runs."""
    from .solver.structured import solve_structured

    builder = ProblemBuilder(pools={"device": 10.0}, streams=(SIDE,))
    nodes = [builder.add_node([1.0, 2.0, 3.0], [[-1.0, 0.0, 0.0]]) for _ in range(5)]
    for a, b in itertools.pairwise(nodes):
        builder.add_edge(a, b, np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [5.0, 6.0, 0.0]]), [np.ones((3, 3))])
    for i, node in enumerate(nodes):
        builder.add_usage(node, "device", i, i + 3, [8.0, 3.0, 2.0])
    solve_structured(builder.build(), time_limit_s=600.0, gap=GAP, seed=0)


def _solution(problem: SelectionProblem, time_limit_s: float) -> Solution:
    """Step graphs are nearly chains, for which there is an engine of its own; what it cannot close goes to the general one."""
    # Here and not above: running a plan that was made elsewhere needs no solver to be installed.
    from .solver import solve
    from .solver.structured import solve_structured

    _warm_up()
    structured = solve_structured(problem, time_limit_s=min(time_limit_s, 10.0), gap=GAP, seed=0)
    if structured is not None and structured.status != "feasible":
        return structured
    general = solve(problem, time_limit_s=time_limit_s, gap=GAP)
    if structured is None or general.status == "infeasible":
        return general
    best = min((structured, general), key=lambda s: s.objective if s.selection is not None and len(s.selection) else float("inf"))
    bound = max(structured.lower_bound, general.lower_bound)
    gap = (best.objective - bound) / max(abs(best.objective), 1e-12)
    return replace(best, lower_bound=bound, gap=gap, status="optimal" if gap <= GAP else "feasible")


def _record(
    analysis: Analysis, cluster: Cluster, best: Candidate, found: list[Candidate], force: str | None, times: dict[str, float],
    memory: MemoryReport,
) -> Plan:  # fmt: skip
    graph, solution, priced = best.priced.graph, best.solution, best.priced
    selection = [int(i) for i in solution.selection]
    names, counts = usual_names(graph, selection)
    decisions = decisions_of(graph, selection, priced.op_seconds, names)
    step = analysis.step
    return Plan(
        model={"name": step.model_name, "fingerprint": fingerprint(step), "num_parameters": num_parameters(graph)},
        cluster={"name": cluster.name, "fingerprint": cluster.fingerprint(), "num_devices": cluster.num_devices},
        mesh=best.mesh, decisions=decisions, predicted=_predicted(priced, solution, memory),
        solver={
            "objective_s": float(solution.objective),
            "lower_bound_s": float(solution.lower_bound),
            "gap": float(solution.gap),
            "status": solution.status,
            "num_nodes": priced.problem.num_nodes,
            "num_edges": priced.problem.num_edges,
        },
        planning_time_s=dict(times), patterns=counts, force=force, modules=module_rows(graph, selection, decisions),
        replicated_ops=[{"op": op, "reason": why, "count": n} for (op, why), n in sorted(analysis.replicated.items())],
        candidates=[{"mesh": list(c.mesh), "objective_s": float(c.solution.objective), "gap": float(c.solution.gap)} for c in found],
    )  # fmt: skip


def num_parameters(graph: ChoiceGraph) -> int:
    """Elements of all parameters."""
    placeholders = (n for n in graph.step.graph.nodes if n.op == "placeholder")
    return sum(int(n.meta["val"].numel()) for n, i in zip(placeholders, graph.step.inputs, strict=True) if i.kind == "param")


def _predicted(priced: PricedProblem, solution: Solution, memory: MemoryReport) -> dict[str, Any]:
    evaluation = priced.problem.evaluate(solution.selection)
    compute = sum(
        float(priced.op_seconds[c.index][int(i)]) * len(c.members)
        for c, i in zip(priced.graph.choices, solution.selection, strict=True)
        if c.kind == "op"
    )
    side = 0.0
    if SIDE in priced.problem.streams:
        edges = priced.problem.edge_stream[priced.problem.streams.index(SIDE)]
        side = _chosen_edges(priced, solution, edges)
    critical = evaluation.node_cost + evaluation.edge_cost
    return {
        "step_time_s": evaluation.objective,
        "streams": {"compute": compute, "collectives": critical - compute + side},
        "peak_bytes": {"device": memory.peak_bytes},
        "peak_at": memory.at,
        "peak_owner": [{"name": name, "bytes": num_bytes} for name, num_bytes in memory.owners[:10]],
    }


def _chosen_edges(priced: PricedProblem, solution: Solution, values: np.ndarray) -> float:
    problem, x = priced.problem, np.asarray(solution.selection, dtype=np.int64)
    widths = problem.num_strategies[problem.edges[:, 1]].astype(np.int64)
    at = problem.edge_offsets()[:-1] + x[problem.edges[:, 0]] * widths + x[problem.edges[:, 1]]
    return float(values[at].sum())


def _head(analysis: Analysis, cluster: Cluster, limit: float) -> str:
    name = analysis.step.model_name or "the model"
    return f"{name} does not fit on {cluster.name!r}: every device ({cluster.device.name}) has {int(limit):,} usable bytes"


_LEAST = re.compile(r"needs at least (\d+) bytes at time (\d+)")


def _reason(text: str, limit: float, nodes: list[fx.Node]) -> str:
    """The solver's reason with the op and its module in place of a time."""
    found = _LEAST.search(text)
    if found is None:
        return text
    least, node = int(found.group(1)), nodes[min(int(found.group(2)), len(nodes) - 1)]
    info = node.meta.get("op")
    where = f" of {info.path}" if info is not None and info.path else ""
    return f"the leanest plan needs {least:,} bytes, {least - int(limit):,} too many (at {node.name}{where})"


def _why_not(analysis: Analysis, cluster: Cluster, meshes: list[tuple[int, ...]], limit: float, refused: list[Solution]) -> str:
    nodes = list(analysis.step.graph.nodes)
    reasons = "; ".join(f"mesh {show_mesh(m)}: {_reason(s.reason, limit, nodes)}" for m, s in zip(meshes, refused, strict=False))
    return f"{_head(analysis, cluster, limit)}. {reasons}. " + _WAYS_OUT
