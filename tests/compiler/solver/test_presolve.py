"""Every reduction alone keeps the optimum, and the way back gives a selection of the same value."""

import copy
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.solver.model import Model, from_problem
from opweave.compiler.solver.presolve import presolve
from opweave.compiler.solver.reduce import (
    drop_separable,
    forbid_dominated,
    forbid_leaf_pairs,
    forbid_oversized,
    forbid_unsupported,
    tied_parents,
)
from opweave.compiler.solver.substitute import bind, drop_slots, keep_strategies, substitute
from tests.compiler.solver.problems import brute_force, model_optimum, random_problem

SEEDS = range(120)


def unsupported(model: Model) -> Model:
    forbid_unsupported(model)
    return model


def oversized(model: Model) -> Model:
    forbid_oversized(model)
    return model


def dominated(model: Model) -> Model:
    forbid_dominated(model)
    return model


def leaf_pairs(model: Model) -> Model:
    forbid_leaf_pairs(model)
    return model


def tied(model: Model) -> Model:
    parents = tied_parents(model.node_off, model.cost, model.edge_u, model.edge_v, model.edge_off, model.edge_cost)
    return substitute(model, bind(model, *parents))


def allowed(model: Model) -> Model:
    keep = np.isfinite(model.cost)
    return substitute(model, keep_strategies(model.node_off, keep)) if np.logical_or.reduceat(keep, model.node_off[:-1]).all() else model


@pytest.mark.parametrize("reduction", [unsupported, oversized, dominated, leaf_pairs, tied, allowed, drop_slots, drop_separable])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_each_reduction_keeps_the_optimum(reduction, seed: int) -> None:
    model = from_problem(random_problem(seed, most_nodes=5))
    best = model_optimum(model)
    assert model_optimum(reduction(copy.deepcopy(model))) == pytest.approx(best)


def test_working_form_has_the_same_optimum() -> None:
    for seed in SEEDS:
        problem = random_problem(seed, most_nodes=5)
        assert model_optimum(from_problem(problem)) == pytest.approx(brute_force(problem)), seed


def test_all_reductions_and_the_way_back() -> None:
    for seed in range(300):
        problem = random_problem(seed, most_nodes=6)
        model = from_problem(problem)
        best, reduced = model_optimum(model), presolve(model)
        if reduced.infeasible:
            assert math.isinf(best), seed
            continue
        assert model_optimum(reduced.model) == pytest.approx(best), seed
        x = np.random.default_rng(seed).integers(0, 1 << 30, reduced.model.num_nodes) % np.maximum(reduced.model.sizes(), 1)
        back = reduced.undo(x)
        if math.isfinite(reduced.model.objective(x)):
            assert problem.evaluate(back).objective == pytest.approx(reduced.model.objective(x)), seed


def test_chain_of_equal_choices_becomes_one_node() -> None:
    from opweave.compiler.problem import ProblemBuilder

    b = ProblemBuilder()
    nodes = [b.add_node([1.0, 2.0, 0.5 * n]) for n in range(20)]
    same = np.where(np.eye(3) > 0, 0.0, math.inf)
    for u, v in itertools.pairwise(nodes):
        b.add_edge(u, v, same)
    reduced = presolve(from_problem(b.build()))
    assert reduced.model.num_nodes == 0
    assert len(set(reduced.undo(np.zeros(0, dtype=np.int64)).tolist())) == 1
