"""Exact solution of a (reduced) model as a mixed integer program, through ortools MathOpt (HiGHS).

Variables
    ``x[n, i]`` in {0, 1}: node ``n`` takes strategy ``i`` (forbidden ones have no variable);
    ``y[e, i, j]`` >= 0: edge ``e`` takes the pair (i, j) (forbidden pairs have no variable);
    ``z`` >= 0: seconds that the busiest side stream adds.
Objective
    ``sum cost x + sum edge_cost y + z``, scaled so that typical coefficients are near one.
Constraint families
    (pick)    sum_i x[n, i] = 1 for each node
    (local)   sum_j y[e, i, j] = x[u, i] and sum_i y[e, i, j] = x[v, j]: the local polytope, ``y`` is integral when ``x`` is
    (memory)  sum of bytes of the rows that cover slot k <= limit of k; added only once a solution violates them
    (cover)   an integral solution that passes (memory) only by the solver's tolerance is cut off by its own set of choices
    (stream)  z >= sum of the stream's seconds over x and y
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from ortools.math_opt import model_pb2, parameters_pb2, result_pb2

from .highs import run_highs
from .model import Model, slot_sums

RELAXED_SHARE = 0.3
"""Of the time left, for one solve of the linear relaxation."""


@dataclass(slots=True, kw_only=True)
class ExactResult:
    """``selection`` is None if no solution was found in time; ``infeasible`` only if that is proven."""

    selection: np.ndarray | None
    objective: float
    lower_bound: float
    infeasible: bool
    finished: bool = False  # solved to the asked gap


@dataclass(slots=True)
class Rows:
    """Sparse rows ``lower <= sum value x[column] <= upper`` under construction, as triplets."""

    lower: list[np.ndarray] = field(default_factory=list)
    upper: list[np.ndarray] = field(default_factory=list)
    row: list[np.ndarray] = field(default_factory=list)
    column: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    num: int = 0

    def add(self, row: np.ndarray, column: np.ndarray, value: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        """Rows numbered from zero in ``row``; they are appended behind those already there."""
        self.row.append(row + self.num)
        self.column.append(column)
        self.value.append(value)
        self.lower.append(lower)
        self.upper.append(upper)
        self.num += len(lower)

    def triplets(self, first_part: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, column, value of all entries from the given part on, sorted by row and column."""
        row, column, value = (np.concatenate(a[first_part:]) for a in (self.row, self.column, self.value))
        order = np.lexsort((column, row))
        return row[order], column[order], value[order]


class Mip:
    """The program of one model; ``solve`` adds memory rows until a solution fits."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.rows = Rows()
        self.node_var = _number(np.isfinite(model.cost))
        self.num_x = int(self.node_var.max(initial=-1)) + 1
        owner = np.repeat(np.arange(model.num_edges), np.diff(model.edge_off))
        local = np.arange(len(model.edge_cost)) - model.edge_off[owner]
        width = model.sizes()[model.edge_v][owner]
        self.left = model.node_off[model.edge_u][owner] + local // np.maximum(width, 1)
        self.right = model.node_off[model.edge_v][owner] + local % np.maximum(width, 1)
        allowed = np.isfinite(model.edge_cost) & (self.node_var[self.left] >= 0) & (self.node_var[self.right] >= 0)
        self.entry = np.flatnonzero(allowed)
        self.owner = owner
        self.num_vars = self.num_x + len(self.entry) + (1 if model.num_streams else 0)
        self._pick()
        self._local()
        self._stream()
        self.slots_in: set[int] = set()

    def _pick(self) -> None:
        """(pick)"""
        owner = np.repeat(np.arange(self.model.num_nodes), self.model.sizes())
        some = self.node_var >= 0
        one = np.ones(self.model.num_nodes)
        self.rows.add(owner[some], self.node_var[some], np.ones(int(some.sum())), one, one)

    def _local(self) -> None:
        """(local) one row per edge and strategy of either end."""
        y = self.num_x + np.arange(len(self.entry))
        for end in (self.left, self.right):
            key = self.owner[self.entry] * (len(self.model.cost) + 1) + end[self.entry]
            nodes = self.model.edge_u if end is self.left else self.model.edge_v
            pairs = _edge_strategies(self.model, nodes)
            pairs = pairs[self.node_var[pairs % (len(self.model.cost) + 1)] >= 0]
            row = np.searchsorted(pairs, key)
            x = self.node_var[pairs % (len(self.model.cost) + 1)]
            zero = np.zeros(len(pairs))
            self.rows.add(
                np.concatenate([row, np.arange(len(pairs))]),
                np.concatenate([y, x]),
                np.concatenate([np.ones(len(row)), -np.ones(len(pairs))]),
                zero,
                zero,
            )

    def _stream(self) -> None:
        """(stream)"""
        for s in range(self.model.num_streams):
            x, y = self.node_var >= 0, self.num_x + np.arange(len(self.entry))
            column = np.concatenate([self.node_var[x], y, [self.num_vars - 1]])
            value = np.concatenate([self.model.node_stream[s][x], self.model.edge_stream[s][self.entry], [-1.0]])
            used = value != 0
            upper = np.array([-self.model.stream_constant[s]])
            self.rows.add(np.zeros(int(used.sum()), dtype=np.int64), column[used], value[used], np.array([-np.inf]), upper)

    def add_slot(self, k: int) -> None:
        """(memory) for slot ``k``, scaled to a limit of one."""
        m = self.model
        self.slots_in.add(k)
        usage = np.zeros(len(m.cost))
        for r in np.flatnonzero((m.row_start <= k) & (m.row_end > k)):
            at = m.node_off[m.row_node[r]]
            usage[at : at + m.row_off[r + 1] - m.row_off[r]] += m.row_bytes[m.row_off[r] : m.row_off[r + 1]]
        used = np.flatnonzero((usage > 0) & (self.node_var >= 0))
        scale = max(float(m.slot_limit[k]), 1.0)
        upper = np.array([m.slot_limit[k] / scale])
        self.rows.add(np.zeros(len(used), dtype=np.int64), self.node_var[used], usage[used] / scale, np.array([-np.inf]), upper)

    def add_cover(self, x: np.ndarray, k: int) -> None:
        """(cover) the nodes with bytes in slot ``k`` cannot all choose as ``x`` does."""
        m = self.model
        nodes = np.unique(m.row_node[(m.row_start <= k) & (m.row_end > k)])
        column = self.node_var[m.node_off[nodes] + x[nodes]]
        row = np.zeros(len(nodes), dtype=np.int64)
        self.rows.add(row, column, np.ones(len(nodes)), np.array([-np.inf]), np.array([len(nodes) - 1.0]))

    def solve(self, deadline: float, gap: float, seed: int, work_limit: int | None = None, target: float = -np.inf) -> ExactResult:
        """Best solution within ``deadline`` (``time.perf_counter`` seconds), or the first that costs ``target`` or less."""
        bound = -np.inf
        self._relax(deadline, seed)
        while True:
            remaining = deadline - time.perf_counter()
            if remaining <= 0:
                return ExactResult(selection=None, objective=np.inf, lower_bound=bound, infeasible=False)
            result = self._run(remaining, gap, seed, work_limit, target)
            reason = result.termination.reason
            if reason in (result_pb2.TERMINATION_REASON_INFEASIBLE, result_pb2.TERMINATION_REASON_INFEASIBLE_OR_UNBOUNDED):
                return ExactResult(selection=None, objective=np.inf, lower_bound=np.inf, infeasible=True)
            dual = result.termination.objective_bounds.dual_bound
            if np.isfinite(dual):
                bound = max(bound, dual * self.scale + self.model.constant)
            if not result.solutions:
                return ExactResult(selection=None, objective=np.inf, lower_bound=bound, infeasible=False)
            x = self._selection(result)
            over = self.model.loads(x) - self.model.slot_limit
            if (over <= 0).all():
                objective = self.model.objective(x)
                finished = reason == result_pb2.TERMINATION_REASON_OPTIMAL
                return ExactResult(selection=x, objective=objective, lower_bound=min(bound, objective), infeasible=False, finished=finished)
            self._cut(x, over)

    def _relax(self, deadline: float, seed: int, rounds: int = 8) -> None:
        """Add the slots that the linear relaxation passes, which is cheaper than meeting them one integral solution at a time."""
        for _ in range(rounds if self.model.num_slots else 0):
            remaining = deadline - time.perf_counter()
            if remaining <= 0:
                break
            result = self._run(RELAXED_SHARE * remaining, 0.0, seed, None, relaxed=True)
            if result.termination.reason != result_pb2.TERMINATION_REASON_OPTIMAL:
                break
            over = slot_sums(self.model, self._row_bytes(result)) - self.model.slot_limit
            if (over <= 1e-6 * np.maximum(self.model.slot_limit, 1.0)).all():
                break
            self._cut(None, over)

    def _row_bytes(self, result: result_pb2.SolveResultProto) -> np.ndarray:
        """Bytes of every usage row under a fractional solution."""
        m = self.model
        share = np.where(self.node_var >= 0, self._values(result)[np.maximum(self.node_var, 0)], 0.0)
        length = np.diff(m.row_off)
        first = np.repeat(m.node_off[m.row_node] - m.row_off[:-1], length)
        return np.add.reduceat(share[first + np.arange(len(first))] * m.row_bytes, m.row_off[:-1]) if len(length) else np.zeros(0)

    def _cut(self, x: np.ndarray | None, over: np.ndarray) -> None:
        """Add the worst violated slots, well apart, or cover cuts where their rows are in already."""
        picked: list[int] = []
        for k in np.argsort(-over / np.maximum(self.model.slot_limit, 1.0), kind="stable"):
            if over[k] <= 0 or len(picked) >= 20:
                break
            if all(abs(int(k) - other) > 3 for other in picked):
                picked.append(int(k))
        for k in picked:
            if k not in self.slots_in:
                self.add_slot(k)
            elif x is not None:
                self.add_cover(x, k)

    def _values(self, result: result_pb2.SolveResultProto) -> np.ndarray:
        values = np.zeros(self.num_vars)
        primal = result.solutions[0].primal_solution.variable_values
        values[np.array(primal.ids, dtype=np.int64)] = np.array(primal.values)
        return values

    def _selection(self, result: result_pb2.SolveResultProto) -> np.ndarray:
        m, values = self.model, self._values(result)
        per_strategy = np.where(self.node_var >= 0, values[np.maximum(self.node_var, 0)], -1.0)
        return np.array([int(per_strategy[a:b].argmax()) for a, b in zip(m.node_off[:-1], m.node_off[1:], strict=True)], dtype=np.int64)

    def _run(
        self, seconds: float, gap: float, seed: int, work_limit: int | None, target: float = -np.inf, relaxed: bool = False
    ) -> result_pb2.SolveResultProto:
        params = parameters_pb2.SolveParametersProto()
        params.time_limit.FromNanoseconds(int(max(seconds, 0.01) * 1e9))
        params.relative_gap_tolerance = gap
        params.absolute_gap_tolerance = 0.0
        params.random_seed = seed % (2**31 - 1)
        if work_limit is not None:
            params.node_limit = work_limit
        program = self._proto(relaxed)
        if target > -np.inf:  # MathOpt's own objective_limit is for programs without integers
            params.highs.double_options["objective_target"] = (target - self.model.constant) / self.scale
        return run_highs(program, params)

    def _proto(self, relaxed: bool = False) -> model_pb2.ModelProto:
        proto = model_pb2.ModelProto()
        upper = np.ones(self.num_vars)
        objective = np.zeros(self.num_vars)
        m = self.model
        objective[self.node_var[self.node_var >= 0]] = m.cost[self.node_var >= 0]
        objective[self.num_x : self.num_x + len(self.entry)] = m.edge_cost[self.entry]
        positive = np.abs(objective[objective != 0])
        self.scale = float(np.exp(np.mean(np.log(positive)))) if len(positive) else 1.0
        objective /= self.scale
        if m.num_streams:
            upper[-1] = np.inf
            objective[-1] = 1.0 / self.scale
        proto.variables.ids.extend(range(self.num_vars))
        proto.variables.lower_bounds.extend(np.zeros(self.num_vars))
        proto.variables.upper_bounds.extend(upper)
        proto.variables.integers.extend((np.arange(self.num_vars) < (0 if relaxed else self.num_x)).tolist())
        used = np.flatnonzero(objective)
        proto.objective.linear_coefficients.ids.extend(used)
        proto.objective.linear_coefficients.values.extend(objective[used])
        proto.linear_constraints.ids.extend(range(self.rows.num))
        proto.linear_constraints.lower_bounds.extend(np.concatenate(self.rows.lower))
        proto.linear_constraints.upper_bounds.extend(np.concatenate(self.rows.upper))
        row, column, value = (np.concatenate(part) for part in (self.rows.row, self.rows.column, self.rows.value))
        order = np.lexsort((column, row))
        proto.linear_constraint_matrix.row_ids.extend(row[order])
        proto.linear_constraint_matrix.column_ids.extend(column[order])
        proto.linear_constraint_matrix.coefficients.extend(value[order])
        return proto


def _number(mask: np.ndarray) -> np.ndarray:
    """Consecutive numbers where ``mask`` holds, -1 elsewhere."""
    return np.where(mask, np.cumsum(mask) - 1, -1)


def _edge_strategies(model: Model, nodes: np.ndarray) -> np.ndarray:
    """Sorted keys ``edge * (strategies + 1) + strategy`` of every strategy of ``nodes[edge]``."""
    sizes = model.sizes()[nodes]
    edge = np.repeat(np.arange(len(nodes)), sizes)
    first = np.cumsum(sizes) - sizes
    strategy = np.arange(len(edge)) - first[edge] + model.node_off[nodes][edge]
    return edge * (len(model.cost) + 1) + strategy
