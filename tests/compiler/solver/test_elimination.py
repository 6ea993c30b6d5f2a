"""The solver for structured problems against brute force on small random problems with every feature."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from opweave.compiler.problem import FORBIDDEN, SelectionProblem
from opweave.compiler.solver.elimination import solve_structured


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


def brute_force(problem: SelectionProblem) -> float:
    best = math.inf
    for x in itertools.product(*(range(int(s)) for s in problem.num_strategies)):
        score = problem.evaluate(x)
        if score.feasible:
            best = min(best, score.objective)
    return best


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equals_brute_force(seed: int) -> None:
    problem = random_problem(seed)
    problem.verify()
    best = brute_force(problem)
    answer = solve_structured(problem, gap=1e-9, time_limit_s=20.0)
    if answer is None:
        return
    assert answer.lower_bound <= best * (1 + 1e-9) + 1e-9
    if answer.status == "infeasible":
        assert best == math.inf and answer.reason
    else:
        assert answer.objective >= best - 1e-9
        if answer.status == "optimal":
            assert answer.objective <= best + 1e-6
