"""The solver for structured problems against brute force on small random problems with every feature."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opweave.compiler.problem import FORBIDDEN, SelectionProblem
from opweave.compiler.solver import solve, structured
from opweave.compiler.solver.chain_dual import Dual, Point
from opweave.compiler.solver.model import from_problem
from opweave.compiler.solver.solve import ENGINES
from tests.compiler.solver.problems import brute_force, check_proof


def random_problem(seed: int) -> SelectionProblem:
    """Up to 7 nodes of up to 4 strategies on a chain with skips, self and parallel edges, several pools, rows and streams."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 8))
    sizes = rng.integers(1, 5, num)
    chain = [(i, i + 1) for i in range(num - 1) if rng.random() < 0.9]
    extra = [tuple(int(v) for v in rng.integers(0, num, 2)) for _ in range(int(rng.integers(0, 4)))]
    edges = np.array(chain + extra, dtype=np.int32).reshape(-1, 2)
    entries = int((sizes[edges[:, 0]] * sizes[edges[:, 1]]).sum())
    node_cost, edge_cost = rng.integers(0, 10, int(sizes.sum())).astype(float), rng.integers(0, 10, entries).astype(float)
    if rng.random() < 0.5:
        node_cost, edge_cost = node_cost + rng.random(len(node_cost)), edge_cost * rng.random(entries)
    edge_cost[rng.random(entries) < rng.choice([0.0, 0.1, 0.4])] = rng.choice([FORBIDDEN, np.inf])
    node_cost[rng.random(len(node_cost)) < 0.03] = FORBIDDEN
    pools = ("device", "host")[: int(rng.integers(0, 3))]
    rows = int(rng.integers(0, 3 * num)) if pools else 0
    usage_node, start = rng.integers(0, num, rows), rng.integers(0, 12, rows)
    streams = ("collectives", "copies")[: int(rng.integers(0, 3))]
    return SelectionProblem(
        num_strategies=sizes.astype(np.int32),
        node_cost=node_cost,
        edges=edges,
        edge_cost=edge_cost,
        pools=pools,
        limits=rng.integers(0, 25, len(pools)).astype(float),
        usage_node=usage_node,
        usage_pool=rng.integers(0, max(len(pools), 1), rows),
        usage_start=start,
        usage_end=start + rng.integers(0, 6, rows),
        usage_bytes=rng.integers(0, 10, int(sizes[usage_node].sum())).astype(float),
        streams=streams,
        node_stream=rng.integers(-8, 12, (len(streams), len(node_cost))).astype(float),
        edge_stream=rng.integers(-3, 6, (len(streams), entries)).astype(float),
    )


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_brute_force(seed: int) -> None:
    check_proof(random_problem(seed), "structured")


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(50042)  # nothing but a node is left, and the gap is small: nothing to forbid, nothing to branch on
@example(3176044)  # the mixture of a part used strategies the part forbids: the same split again and again
def test_equals_brute_force_by_branching(seed: int) -> None:
    with mock.patch.object(structured, "EXACT_ENTRIES", -1):
        check_proof(random_problem(seed), "structured")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_dual_and_forbidding_keep_better_selections(seed: int) -> None:
    """At any prices the bound holds, and what is forbidden is used by no selection below the cutoff."""
    problem = random_problem(seed)
    if (problem.num_strategies < 1).any():
        return
    model, rng = from_problem(problem), np.random.default_rng(seed)
    dual = Dual(model, lambda x, objective: None, math.inf, 0)
    for k in range(min(3, model.num_slots)):
        dual.add_slot(k)
    weight = rng.random(model.num_streams) / max(model.num_streams, 1)
    point = Point(rng.random(len(dual.slots)) * 10, weight)
    dual.trial(point, 5, 0.0, 0.0)
    best = brute_force(problem)
    assert dual.bound <= best + 1e-9 * abs(best)
    if best < math.inf:
        cutoff = best + rng.choice([0.0, 1.0, 5.0])
        left = dual.forbid([point], cutoff)
        for x in itertools.product(*(range(int(s)) for s in problem.num_strategies)):
            score = problem.evaluate(x)
            if score.feasible and score.objective <= cutoff:
                assert left.objective(np.array(x)) < math.inf


def test_no_selection_fits() -> None:
    """Each node alone fits, forbidden pairs leave nothing that fits together; the least bytes are those of a permitted selection."""
    problem = SelectionProblem(
        num_strategies=np.array([2, 2], dtype=np.int32),
        node_cost=np.zeros(4),
        edges=np.array([[0, 1]], dtype=np.int32),
        edge_cost=np.array([np.inf, 0.0, 0.0, np.inf]),
        pools=("device",),
        limits=np.array([11.0]),
        usage_node=np.array([0, 1]),
        usage_pool=np.array([0, 0]),
        usage_start=np.array([3, 4]),
        usage_end=np.array([8, 7]),
        usage_bytes=np.array([4.0, 9.0, 5.0, 8.0]),
    )
    answer = solve(problem, engine="structured")
    assert answer.status == "infeasible"
    assert answer.reason == "pool 'device' needs at least 12 bytes at time 4, its limit is 11"


def test_engines_by_name() -> None:
    problem = SelectionProblem(num_strategies=np.array([2], dtype=np.int32), node_cost=np.array([3.0, 1.0]))
    assert [solve(problem, engine=name).objective for name in ENGINES] == [1.0] * 3
    with pytest.raises(ValueError, match="unknown engine 'exact'; the engines are 'auto', 'places', 'structured', 'general'"):
        solve(problem, engine="exact")


def test_too_large_is_left_to_others() -> None:
    num = structured.MOST_NODES + 1
    problem = SelectionProblem(num_strategies=np.full(num, 2, dtype=np.int32), node_cost=np.zeros(2 * num))
    assert not structured.fits(from_problem(problem))
