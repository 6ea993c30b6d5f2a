"""Bounds never exceed the optimum, and fixing by bounds keeps every selection that is good enough."""

import itertools
import math

import numpy as np
import pytest

from opweave.compiler.solver.lagrange import Dual
from opweave.compiler.solver.model import from_problem
from opweave.compiler.solver.presolve import presolve
from tests.compiler.solver.problems import model_optimum, random_problem


def models(count: int):
    for seed in range(count):
        reduced = presolve(from_problem(random_problem(seed)))
        if not reduced.infeasible and reduced.model.num_nodes:
            yield seed, reduced.model


@pytest.mark.parametrize("priced", [False, True])
def test_bound_is_below_the_optimum(priced) -> None:
    for seed, model in models(150):
        weight = np.full(model.num_streams, 0.4)
        dual = Dual(model, weight)
        dual.run_unpriced(5, math.inf)
        if priced and model.num_slots:
            dual.start_prices(20.0)
            dual.run(40, math.inf)
        assert dual.bound <= model_optimum(model) + 1e-6, seed


def test_fixing_keeps_all_selections_below_the_limit() -> None:
    for seed, model in models(100):
        best = model_optimum(model)
        if math.isinf(best):
            continue
        dual = Dual(model)
        if model.num_slots:
            dual.start_prices(20.0)
            dual.run(30, math.inf)
        else:
            dual.run_unpriced(10, math.inf)
        needless = dual.needless(best + 2.0)
        for choice in itertools.product(*(range(k) for k in model.sizes())):
            x = np.array(choice, dtype=np.int64)
            if model.objective(x) <= best + 2.0 and (model.loads(x) <= model.slot_limit).all():
                assert not needless[model.node_off[:-1] + x].any(), seed
