"""Local search: forests are induced and solved exactly, loads by differences agree with the definition."""

import itertools
import math
import time

import numpy as np

from opweave.compiler.solver.combine import Pool, combine
from opweave.compiler.solver.forest import clear_forest, energy, grow_forest, new_scratch, solve_forest
from opweave.compiler.solver.graph import build_flows, build_graph, build_rows
from opweave.compiler.solver.improve import Incumbent, Searcher
from opweave.compiler.solver.memory import fill_loads, load_change
from opweave.compiler.solver.model import from_problem
from tests.compiler.solver.problems import random_problem


def test_forest_is_solved_exactly_given_the_rest() -> None:
    for seed in range(60):
        model = from_problem(random_problem(seed))
        g = build_graph(model)
        s = new_scratch(g, seed)
        rng = np.random.default_rng(seed)
        x = rng.integers(0, 1 << 30, model.num_nodes) % model.sizes()
        count = grow_forest(rng.permutation(model.num_nodes), model.num_nodes, g, s)
        inside = s.sequence[:count].copy()
        best = math.inf
        for choice in itertools.product(*(range(int(model.sizes()[v])) for v in inside)):
            y = x.copy()
            y[inside] = choice
            best = min(best, energy(y, g))
        solve_forest(count, x, 0.0, g, s)
        clear_forest(count, s)
        assert energy(x, g) == best, seed
        edges = sum(1 for u, v in zip(model.edge_u, model.edge_v, strict=True) if u in inside and v in inside)
        assert edges < count
        assert (s.tree == -1).all()
        assert (s.mark == -1).all()


def test_loads_in_full_and_by_differences() -> None:
    for seed in range(60):
        model = from_problem(random_problem(seed))
        rows = build_rows(model)
        rng = np.random.default_rng(seed)
        x = rng.integers(0, 1 << 30, model.num_nodes) % model.sizes()
        load, diff = np.zeros(model.num_slots), np.zeros(model.num_slots + 1)
        fill_loads(x, rows, load)
        assert np.array_equal(load, model.loads(x))
        v = int(rng.integers(model.num_nodes))
        new = int(rng.integers(model.sizes()[v]))
        load_change(v, int(x[v]), new, rows, diff)
        x[v] = new
        assert np.array_equal(load + np.cumsum(diff)[:-1], model.loads(x))


def test_searcher_returns_only_feasible_selections_with_their_energy() -> None:
    for seed in range(40):
        model = from_problem(random_problem(seed))
        g, rows = build_graph(model), build_rows(model)
        searcher = Searcher(g, rows, build_flows(model), seed, 1.0)
        start = Incumbent(np.zeros(model.num_nodes, dtype=np.int64), math.inf, np.zeros(model.num_slots))
        cycles = [searcher.cycle(start, 1.0, 20, 200, math.inf, blocks=blocks) for blocks in (False, True)]
        for found in (searcher.descend(start, 200, math.inf), *cycles):
            if found.energy < g.big:
                assert (model.loads(found.x) <= model.slot_limit).all()
                assert np.isclose(model.objective(found.x) - model.constant, found.energy)  # streams included


def test_kicks_keep_what_is_feasible_and_never_make_it_worse() -> None:
    better = 0
    for seed in range(40):
        model = from_problem(random_problem(seed))
        g, rows = build_graph(model), build_rows(model)
        searcher = Searcher(g, rows, build_flows(model), seed, 1.0)
        x = np.random.default_rng(seed).integers(0, 1 << 30, model.num_nodes) % model.sizes()
        value = model.objective(x) - model.constant
        if math.isfinite(value) and (model.loads(x) <= model.slot_limit).all():
            kicked = searcher.kicks(Incumbent(x, value, np.zeros(model.num_slots)), 30, 1.0, math.inf)
            assert (model.loads(kicked.x) <= model.slot_limit).all()
            assert np.isclose(model.objective(kicked.x) - model.constant, kicked.energy)
            assert kicked.energy <= value + 1e-9
            better += kicked.energy < value
    assert better


def test_combination_is_the_best_of_the_choices() -> None:
    for seed in range(40):
        model = from_problem(random_problem(seed))
        rng = np.random.default_rng(seed)
        parents = [rng.integers(0, 1 << 30, model.num_nodes) % model.sizes() for _ in range(3)]
        best = math.inf
        for choice in itertools.product(*({int(x[n]) for x in parents} for n in range(model.num_nodes))):
            if (model.loads(x := np.array(choice)) <= model.slot_limit).all():
                best = min(best, model.objective(x))
        found = combine(model, parents, time.perf_counter() + 60.0, 0.0, seed)
        assert (found is None) == math.isinf(best), seed
        if found is not None:
            assert (model.loads(found) <= model.slot_limit).all()
            assert np.isclose(model.objective(found), best), seed


def test_pool_keeps_the_cheapest_of_different_cost() -> None:
    pool = Pool(most=2)
    for cost in (3.0, 1.0, 3.0, 2.0):
        pool.add(cost, np.array([int(cost)]))
    assert pool.fresh == 3
    assert [x.tolist() for x in pool.taken()] == [[1], [2]]
    assert pool.fresh == 0
