"""`solve` against brute force, its answers to infeasible problems, and repeatability."""

import itertools
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler import problem_io
from opweave.compiler.problem import ProblemBuilder, SelectionProblem
from opweave.compiler.solver import solve
from opweave.compiler.solver.command import solve_file
from opweave.compiler.solver.solve import ENGINES
from tests.compiler.solver.problems import brute_force, random_problem


def check(problem: SelectionProblem, engine: str = "auto", gap: float = 0.0) -> None:
    best = brute_force(problem)
    solution = solve(problem, gap=gap, time_limit_s=20.0, engine=engine)
    if math.isinf(best):
        assert solution.status == "infeasible"
        assert solution.reason
        return
    assert solution.status == "optimal" or gap > 0
    assert solution.objective == pytest.approx(best, abs=1e-6)
    assert best - 1e-5 * max(1.0, abs(best)) <= solution.lower_bound <= best + 1e-6
    assert problem.evaluate(solution.selection).feasible


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_equals_brute_force(seed: int) -> None:
    check(random_problem(seed))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_equals_brute_force_when_memory_is_ample(seed: int) -> None:
    check(random_problem(seed, most_nodes=7, tight=False))


OFTEN = int(os.environ.get("OPWEAVE_PROBLEMS", "500"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@settings(max_examples=OFTEN, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), tight=st.booleans())
def test_equals_brute_force_often(engine: str, seed: int, tight: bool) -> None:
    """The entry and each engine; more: ``OPWEAVE_PROBLEMS=2000 python -m pytest tests/compiler/solver/test_solve.py -k often``."""
    check(random_problem(seed, most_nodes=5, tight=tight), engine, gap=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_a_node_without_strategies_makes_any_problem_infeasible(seed: int) -> None:
    problem = random_problem(seed, most_nodes=5)
    empty = replace(problem, num_strategies=np.append(problem.num_strategies, 0).astype(np.int32))
    assert solve(empty).reason == f"node {problem.num_nodes} has no strategy"


def chain(num: int, sizes: int, limit: float, seed: int = 0, skips: bool = True) -> SelectionProblem:
    """A planner-like problem: a chain with skip connections, memory that binds, one side stream."""
    rng = np.random.default_rng(seed)
    b = ProblemBuilder(pools={"device": limit}, streams=("copy",))
    for n in range(num):
        cost = rng.random(sizes)
        b.add_node(cost, streams={"copy": rng.random(sizes) * 0.05})
        b.add_usage(n, "device", n, 2 * num - n, np.round((1.0 - cost) * 100))
        if n:
            b.add_edge(n - 1, n, rng.random((sizes, sizes)))
        if skips and n > 3 and n % 4 == 0:
            b.add_edge(n - 4, n, rng.random((sizes, sizes)))
    return b.build()


def test_planner_like_problem_closes_the_gap() -> None:
    problem = chain(30, 6, 30 * 35.0)
    solution = solve(problem, time_limit_s=60.0)
    assert solution.status == "optimal"
    assert solution.gap <= 1e-4


def test_reason_names_pool_time_and_bytes() -> None:
    b = ProblemBuilder(pools={"host": math.inf, "device": 10.0})
    for _ in range(3):
        b.add_usage(b.add_node([0.0, 1.0]), "device", 2, 5, [9, 4])
    solution = solve(b.build())
    assert solution.status == "infeasible"
    assert solution.reason == "pool 'device' needs at least 12 bytes at time 2, its limit is 10"
    assert solution.selection.size == 0


def test_infeasible_without_memory() -> None:
    b = ProblemBuilder()
    u, v, w = (b.add_node([0.0, 0.0]) for _ in range(3))
    differ = [[math.inf, 0.0], [0.0, math.inf]]
    for pair in ((u, v), (v, w), (w, u)):
        b.add_edge(*pair, differ)
    solution = solve(b.build())
    assert (solution.status, solution.reason) == ("infeasible", "no selection avoids all forbidden entries")


def test_node_without_strategies() -> None:
    b = ProblemBuilder()
    b.add_node([1.0])
    b.add_node([])
    assert solve(b.build()).reason == "node 1 has no strategy"


def test_empty_problem() -> None:
    solution = solve(ProblemBuilder().build())
    assert (solution.status, solution.objective, solution.selection.tolist()) == ("optimal", 0.0, [])


def test_same_seed_same_answer() -> None:
    problem = chain(40, 6, 40 * 30.0, seed=3)
    first, second = (solve(problem, gap=0.0, time_limit_s=600.0, seed=5, work_limit=1) for _ in range(2))
    assert first.selection.tolist() == second.selection.tolist()
    assert first.objective == second.objective


def test_history_improves_and_progress_sees_it() -> None:
    seen = []
    solution = solve(chain(40, 6, 40 * 30.0), progress=seen.append)
    assert tuple(seen) == solution.history
    objectives = [point.objective for point in seen]
    assert objectives == sorted(objectives, reverse=True)
    assert all(a.lower_bound <= b.lower_bound for a, b in itertools.pairwise(seen))
    assert objectives[-1] == pytest.approx(solution.objective)


def test_malformed_problem_is_an_error() -> None:
    problem = ProblemBuilder()
    problem.add_node([math.nan])
    with pytest.raises(ValueError, match="node 0 has cost nan"):
        solve(problem.build(verify=False))


def test_solve_file(tmp_path) -> None:
    problem_io.save(chain(10, 4, 10 * 50.0), tmp_path / "p.json.gz")
    answer = solve_file(tmp_path / "p.json.gz", time_limit_s=10.0, output=tmp_path / "solution.json")
    assert set(answer) >= {"solution", "cost", "lower_bound", "status", "seconds"}
    assert (tmp_path / "solution.json").exists()
    assert len(answer["solution"]) == 10
