"""The linear relaxation of a model with row generation for memory, its safe bound, and the same rows as an integer program.

Program (``c``, ``stream`` scaled by one unit of cost; rows of ``places_rows`` for nodes and edges)
    minimise ``c x + z`` with ``z >= stream_s x + constant_s`` for each stream, ``z >= 0``, and, for slots once they are violated,
    ``sum bytes x <= limit``.
Safe bound
    Any prices of the rows give a lower bound: with ``d = c - prices * rows``, each node pays at least its least ``d``, each pair of
    groups at least ``min(0, d)``, ``z`` at least 0 where ``d_z >= 0``. So nothing depends on what the linear solver's tolerances are,
    nor on its having finished. ``d`` minus the least of its node is what a strategy costs at least above the bound: a selection that is
    better than ``bound + delta`` uses only strategies within ``delta``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from ortools.math_opt import callback_pb2, model_parameters_pb2, model_pb2, model_update_pb2, parameters_pb2, result_pb2
from ortools.math_opt.core.python import solver as mathopt
from pybind11_abseil.status import StatusNotOk

from .highs import run_highs
from .model import Model
from .places_rows import local_polytope

GLOP = parameters_pb2.SOLVER_TYPE_GLOP
DUAL_SIMPLEX = parameters_pb2.LP_ALGORITHM_DUAL_SIMPLEX
INFEASIBLE = (result_pb2.TERMINATION_REASON_INFEASIBLE, result_pb2.TERMINATION_REASON_INFEASIBLE_OR_UNBOUNDED)

NEW_SLOTS = 10
"""Slots of a pool added per round, at least ``APART`` slots from each other in the first round, ``NEAR`` in later ones."""
APART, NEAR = 50, 3

PASSED = 1e-9
"""Part of a slot's largest load by which a relaxed solution may pass its limit."""

LIMIT_UNIT = 1e3
"""Scaled limit of a memory row: the solvers' absolute tolerance of 1e-6 is then 1e-9 of the limit."""

ROUNDING = 1e-9
"""Part of a bound that is given up for rounding errors of sums."""

MIP_ROUNDING = 1e-7
"""The same for bounds of the integer solver, whose tolerances are not checked again."""


@dataclass(slots=True)
class Relaxed:
    """Where the relaxation ended. ``infeasible``: no selection exists; then the rest has no meaning."""

    x: np.ndarray  # float64[strategies]
    reduced: np.ndarray  # float64[strategies] cost above the bound, at least; inf = forbidden
    bound: float
    infeasible: bool
    slot_price: dict[int, float]  # price of a slot's scaled row, <= 0


@dataclass(slots=True)
class Integral:
    """Answer of the integer solver: ``x`` is None if there is none; ``bound`` is infinite if none exists."""

    x: np.ndarray | None
    bound: float


class Relaxation:
    """One model's program. With ``elastic`` (a pool) costs are nothing and ``z`` is the bytes by which that pool's slots may pass their
    limits, in units of its limit."""

    def __init__(self, model: Model, elastic: int | None = None) -> None:
        self.model, self.elastic, self.num_x = model, elastic, len(model.cost)
        polytope = local_polytope(model)
        self.rows, self.parts_sent = polytope.rows, 0
        cost, stream = polytope.channel[0], polytope.channel[1:]
        self.z = len(cost)
        self.allowed = np.isfinite(cost)
        finite = np.abs(np.where(self.allowed, cost, 0.0))
        self.unit = float(np.exp(np.log(finite[finite > 0]).mean())) if (finite > 0).any() and elastic is None else 1.0
        self.c = np.append(np.where(self.allowed, cost, 0.0) / self.unit, 1.0)
        if elastic is not None:
            self.c[:-1] = 0.0
        else:
            self._streams(stream)
        self.slots: dict[int, int] = {}  # slot → row
        self._entries()
        self.solver: mathopt.Solver | None = None

    def _streams(self, stream: np.ndarray) -> None:
        for values, constant in zip(stream, self.model.stream_constant, strict=True):
            used = np.flatnonzero((values != 0) & self.allowed)
            self._row(np.append(used, self.z), np.append(values[used] / self.unit, -1.0), -constant / self.unit)

    def _row(self, column: np.ndarray, value: np.ndarray, upper: float) -> None:
        self.rows.add(np.zeros(len(column), dtype=np.int64), column, value, np.array([-np.inf]), np.array([upper]))

    def _entries(self) -> None:
        """The strategy and the usage row of each value of ``row_bytes``."""
        m = self.model
        self.entry_row = np.repeat(np.arange(len(m.row_node)), np.diff(m.row_off))
        self.entry_x = m.node_off[m.row_node][self.entry_row] + np.arange(len(m.row_bytes)) - m.row_off[:-1][self.entry_row]

    def usage(self, k: int) -> np.ndarray:
        """float64[strategies]: bytes in slot ``k``."""
        live = ((self.model.row_start <= k) & (self.model.row_end > k))[self.entry_row]
        return np.bincount(self.entry_x[live], self.model.row_bytes[live], self.num_x)

    def loads(self, x: np.ndarray) -> np.ndarray:
        """Bytes per slot of a fractional selection."""
        m = self.model
        size = np.bincount(self.entry_row, m.row_bytes * x[self.entry_x], len(m.row_node))
        delta = np.bincount(m.row_start, size, m.num_slots + 1) - np.bincount(m.row_end, size, m.num_slots + 1)
        return np.cumsum(delta)[:-1]

    def add_slot(self, k: int) -> None:
        """The memory row of slot ``k``."""
        bytes_of = np.where(self.allowed[: self.num_x], self.usage(k), 0.0)
        used = np.flatnonzero(bytes_of)
        scale = LIMIT_UNIT / max(float(self.model.slot_limit[k]), float(bytes_of.max(initial=0.0)), 1.0)
        column, value = used, bytes_of[used] * scale
        if self.elastic == self.model.slot_pool[k]:
            column, value = np.append(used, self.z), np.append(value, -scale * self.stretch())
        self.slots[k] = self.rows.num
        self._row(column, value, float(self.model.slot_limit[k]) * scale)

    def stretch(self) -> float:
        """Bytes that one unit of ``z`` adds to the limits of the elastic pool."""
        return max(float(self.model.slot_limit[self.model.slot_pool == self.elastic].max(initial=0.0)), 1.0)

    def add_cover(self, x: np.ndarray, k: int) -> None:
        """The nodes with bytes in slot ``k`` cannot all choose as ``x``, which passes the limit by less than the solver can see."""
        nodes = np.unique(self.model.row_node[(self.model.row_start <= k) & (self.model.row_end > k)])
        self._row(self.model.node_off[nodes] + x[nodes], np.ones(len(nodes)), len(nodes) - 1.0)

    def add_initial_slots(self) -> None:
        """The slots that are fullest when every node takes its strategies in equal parts."""
        even = np.repeat(1.0 / self.model.sizes(), self.model.sizes())
        self._add_worst(self.loads(even), np.ones(self.model.num_slots, dtype=bool), APART)

    def _add_worst(self, loads: np.ndarray, violated: np.ndarray, apart: int) -> bool:
        """Add violated slots of each pool, the fullest first; False if there is none."""
        excess = loads - self.model.slot_limit
        before = len(self.slots)
        for pool in np.unique(self.model.slot_pool):
            slots = np.flatnonzero((self.model.slot_pool == pool) & violated)
            picked: list[int] = []
            for k in slots[np.argsort(-excess[slots], kind="stable")].tolist():
                if len(picked) == NEW_SLOTS:
                    break
                if k not in self.slots and all(abs(k - other) > apart for other in picked):
                    picked.append(k)
            for k in picked:
                self.add_slot(k)
        return len(self.slots) > before

    def relax(self, deadline: float) -> Relaxed | None:
        """Solve, adding slots until none is passed. None if the linear solver ends without prices."""
        slack = PASSED * np.maximum(self.loads(np.ones(self.num_x)), 1.0)
        best: Relaxed | None = None
        first = True
        while first or time.perf_counter() < deadline:
            result = self._linear(max(deadline - time.perf_counter(), 0.05))
            if result is not None and result.termination.reason in INFEASIBLE:
                return Relaxed(np.zeros(0), np.zeros(0), np.inf, True, {})
            if result is None or not result.solutions or not result.solutions[0].HasField("dual_solution"):
                break
            best = self._relaxed(result.solutions[0], best)
            loads = self.loads(best.x)
            over = loads - self.model.slot_limit - slack
            if self.elastic is not None:
                over[self.model.slot_pool == self.elastic] -= self.excess * self.stretch()
            if not self._add_worst(loads, over > 0, APART if first else NEAR):
                break
            first = False
        return best

    def _relaxed(self, solution: result_pb2.SolutionProto, before: Relaxed | None) -> Relaxed:
        values = np.zeros(self.z + 1)
        values[np.array(solution.primal_solution.variable_values.ids, dtype=np.int64)] = solution.primal_solution.variable_values.values
        price = np.zeros(self.rows.num)
        price[np.array(solution.dual_solution.dual_values.ids, dtype=np.int64)] = solution.dual_solution.dual_values.values
        self.excess = float(values[-1])
        bound, reduced = self.safe_bound(price)
        slot_price = {k: float(price[row]) for k, row in self.slots.items()}
        if before is not None and before.bound > bound:
            bound, reduced = before.bound, before.reduced
        return Relaxed(values[: self.num_x], reduced, bound, False, slot_price)

    def safe_bound(self, price: np.ndarray) -> tuple[float, np.ndarray]:
        """The bound that any prices prove and the strategies' costs above it, in the model's cost (see the module's text)."""
        m = self.model
        lower, upper = np.concatenate(self.rows.lower), np.concatenate(self.rows.upper)
        row, column, value = (np.concatenate(a) for a in (self.rows.row, self.rows.column, self.rows.value))
        price = np.where(np.isinf(lower), np.minimum(price, 0.0), price)
        price[: m.num_nodes] = 0.0  # each node pays its least anyway
        burden = np.bincount(column, price[row] * value, self.z + 1)
        if burden[-1] > 1.0:
            price, burden = price / burden[-1], burden / burden[-1]
        d = self.c - burden
        own = np.where(self.allowed[: self.num_x], d[: self.num_x], np.inf)
        least = np.minimum.reduceat(own, m.node_off[:-1])
        pairs = d[self.num_x : self.z]
        bound = float(price @ upper + least.sum() + np.minimum(pairs[self.allowed[self.num_x : self.z]], 0.0).sum())
        bound = bound * self.unit + (m.constant if self.elastic is None else 0.0)
        floor = np.repeat(np.where(np.isfinite(least), least, 0.0), m.sizes())
        return bound - ROUNDING * abs(bound), (own - floor) * self.unit

    # -- the solvers ------------------------------------------------------------------------------------------------------

    def _linear(self, seconds: float) -> result_pb2.SolveResultProto | None:
        """The linear program as it is, by the solver that goes on from the last basis; where that loses its way in rounding errors (it then
        ends "abnormally"), by the other one from nothing. None where neither has an answer."""
        try:
            return self._simplex(seconds)
        except StatusNotOk:
            self.solver = None
        params = _parameters(seconds)
        params.lp_algorithm = DUAL_SIMPLEX
        try:
            return run_highs(self._proto(False), params)
        except StatusNotOk:
            return None

    def _simplex(self, seconds: float) -> result_pb2.SolveResultProto:
        params = _parameters(seconds)
        params.lp_algorithm = DUAL_SIMPLEX
        params.glop.use_dual_simplex = True
        params.glop.use_preprocessing = False  # it would throw the basis away, and the next solve would begin from nothing
        if self.solver is None or not self.solver.update(self._update()):
            self.solver = mathopt.new(GLOP, self._proto(False), parameters_pb2.SolverInitializerProto())
        self.parts_sent = len(self.rows.row)
        nothing = callback_pb2.CallbackRegistrationProto()
        return self.solver.solve(params, model_parameters_pb2.ModelSolveParametersProto(), None, nothing, None, None)

    def _update(self) -> model_update_pb2.ModelUpdateProto:
        """The rows added since the last solve."""
        update, at = model_update_pb2.ModelUpdateProto(), self.parts_sent
        if at == len(self.rows.row):
            return update
        first = self.rows.num - sum(map(len, self.rows.upper[at:]))
        _fill_rows(update.new_linear_constraints, first, self.rows.lower[at:], self.rows.upper[at:])
        _fill_matrix(update.linear_constraint_matrix_updates, self.rows.triplets(at))
        return update

    def _proto(self, integer: bool) -> model_pb2.ModelProto:
        proto, num = model_pb2.ModelProto(), self.z + 1
        proto.variables.ids.extend(range(num))
        proto.variables.lower_bounds.extend(np.zeros(num))
        proto.variables.upper_bounds.extend(np.append(self.allowed.astype(np.float64), np.inf))
        proto.variables.integers.extend(((np.arange(num) < self.num_x) & integer).tolist())
        used = np.flatnonzero(self.c)
        proto.objective.linear_coefficients.ids.extend(used)
        proto.objective.linear_coefficients.values.extend(self.c[used])
        _fill_rows(proto.linear_constraints, 0, self.rows.lower, self.rows.upper)
        _fill_matrix(proto.linear_constraint_matrix, self.rows.triplets())
        return proto

    def integral(self, deadline: float, gap: float, seed: int, num_nodes: int) -> Integral:
        """The integer program with the slots that its solutions turn out to need; up to ``num_nodes`` branches per round."""
        m, bound = self.model, -np.inf
        while time.perf_counter() < deadline:
            params = _parameters(max(deadline - time.perf_counter(), 0.05))
            params.relative_gap_tolerance, params.absolute_gap_tolerance = gap, 0.0
            params.node_limit, params.random_seed = num_nodes, seed % (2**31 - 1)
            try:
                result = run_highs(self._proto(True), params)
            except StatusNotOk:
                break
            if result.termination.reason in INFEASIBLE:
                return Integral(None, np.inf)
            dual = result.termination.objective_bounds.dual_bound * self.unit
            if np.isfinite(dual):
                dual += m.constant if self.elastic is None else 0.0
                bound = max(bound, dual - MIP_ROUNDING * abs(dual))
            if not result.solutions:
                break
            x = self._selection(result.solutions[0])
            loads = m.loads(x)
            over = loads - m.slot_limit
            if self.elastic is not None:
                over[m.slot_pool == self.elastic] -= self.excess * self.stretch() * (1 + ROUNDING) + 1.0
            if (over <= 0).all():
                return Integral(x, bound)
            if not self._add_worst(loads, over > 0, NEAR):
                self.add_cover(x, int(over.argmax()))
        return Integral(None, bound)

    def _selection(self, solution: result_pb2.SolutionProto) -> np.ndarray:
        values = np.zeros(self.z + 1)
        values[np.array(solution.primal_solution.variable_values.ids, dtype=np.int64)] = solution.primal_solution.variable_values.values
        self.excess = float(values[-1])
        return argmax_per_node(self.model, np.where(self.allowed[: self.num_x], values[: self.num_x], -1.0))


def argmax_per_node(model: Model, values: np.ndarray) -> np.ndarray:
    """int64[N]: each node's strategy of the largest value, the first of equals."""
    most = np.repeat(np.maximum.reduceat(values, model.node_off[:-1]), model.sizes())
    at = np.flatnonzero(values == most)
    return at[np.searchsorted(at, model.node_off[:-1])] - model.node_off[:-1]


def _parameters(seconds: float) -> parameters_pb2.SolveParametersProto:
    params = parameters_pb2.SolveParametersProto()
    params.time_limit.FromNanoseconds(int(seconds * 1e9))
    return params


def _fill_rows(target, first: int, lower: list[np.ndarray], upper: list[np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    target.ids.extend(range(first, first + sum(map(len, upper))))
    target.lower_bounds.extend(np.concatenate(lower))
    target.upper_bounds.extend(np.concatenate(upper))


def _fill_matrix(target, triplets: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    target.row_ids.extend(triplets[0])
    target.column_ids.extend(triplets[1])
    target.coefficients.extend(triplets[2])
