"""Random small problems with every feature, and the truth by brute force."""

import itertools
import math

import numpy as np

from opweave.compiler.problem import ProblemBuilder, SelectionProblem
from opweave.compiler.solver import solve


def random_problem(seed: int, *, most_nodes: int = 6, tight: bool = True) -> SelectionProblem:
    """Forbidden entries, parallel and self edges, two pools, streams of both signs, equal strategies; often tight, sometimes infeasible."""
    rng = np.random.default_rng(seed)
    high = int(rng.choice([15, 40, 80])) if tight else 1000
    pools = {"device": float(rng.integers(5, high)), "host": float(rng.integers(5, high))}
    b = ProblemBuilder(pools=pools, streams=("a", "b")[: int(rng.integers(0, 3))])
    num, streams = int(rng.integers(1, most_nodes + 1)), len(b.streams)
    sizes = [int(rng.integers(1, 5)) for _ in range(num)]
    forbid = rng.choice([0.0, 0.1, 0.4])
    for size in sizes:
        cost = rng.integers(-3, 20, size).astype(float)
        cost[rng.random(size) < forbid / 2] = 1e18
        if size > 2 and rng.random() < 0.3:
            cost[1] = cost[0]
        b.add_node(cost, rng.integers(-5, 10, (streams, size)))
    for _ in range(int(rng.integers(0, 2 * num))):
        u, v = (int(n) for n in rng.integers(0, num, 2))
        matrix = rng.integers(-2, 20, (sizes[u], sizes[v])).astype(float)
        matrix[rng.random(matrix.shape) < forbid] = 1e18
        b.add_edge(u, v, matrix, rng.integers(-3, 6, (streams, matrix.size)))
    for _ in range(int(rng.integers(0, 2 * num))):
        node, start = int(rng.integers(0, num)), int(rng.integers(0, 10))
        b.add_usage(node, int(rng.integers(0, 2)), start, start + int(rng.integers(0, 6)), rng.integers(0, 20, sizes[node]))
    return b.build()


def brute_force(problem: SelectionProblem) -> float:
    """The optimal value, infinity if there is none."""
    best = math.inf
    for x in itertools.product(*(range(k) for k in problem.num_strategies)):
        result = problem.evaluate(x)
        if result.feasible:
            best = min(best, result.objective)
    return best


def check_proof(problem: SelectionProblem, engine: str, *, gap: float = 1e-6) -> str:
    """An engine alone proves the optimum, or that there is none; the status."""
    problem.verify()
    best = brute_force(problem)
    answer = solve(problem, gap=gap, time_limit_s=60.0, engine=engine)
    if best == math.inf:
        assert answer.status == "infeasible" and answer.reason
        return answer.status
    assert answer.status == "optimal"
    assert problem.evaluate(answer.selection).feasible
    assert answer.lower_bound <= best + 1e-9 * max(abs(best), 1.0)
    assert best - 1e-9 <= answer.objective <= best + gap * abs(best) + 1e-9
    return answer.status


def model_optimum(model) -> float:
    """The optimal value of the solver's working form."""
    best = math.inf
    for x in itertools.product(*(range(k) for k in model.sizes())):
        selection = np.array(x, dtype=np.int64)
        if (model.loads(selection) <= model.slot_limit).all() if model.num_slots else True:
            best = min(best, model.objective(selection))
    return best
