"""Folding equal sub-graphs: the colours are equitable, bounds are those of the whole model, messages go to the whole and back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.problem import ProblemBuilder, SelectionProblem
from opweave.compiler.solver.chain_dual import Dual, Point
from opweave.compiler.solver.fold import collapse, expand, fold
from opweave.compiler.solver.graph import Graph, build_graph
from opweave.compiler.solver.model import Model, from_problem
from opweave.compiler.solver.trws import backward, forward, new_messages
from tests.compiler.solver.problems import brute_force, random_problem


def copies(seed: int, num_copies: int, *, uneven: bool = False, forbidden: float = 0.2) -> SelectionProblem:
    """A random problem over shared nodes and ``num_copies`` equal random parts that hang on them, each alive at a time of its own."""
    rng = np.random.default_rng(seed)
    b = ProblemBuilder(pools={"device": float(rng.integers(8, 8 * num_copies))}, streams=("a", "b")[: int(rng.integers(0, 3))])
    streams = len(b.streams)
    shared = [b.add_node(rng.integers(0, 9, 2), rng.integers(-4, 5, (streams, 2))) for _ in range(2)]
    b.add_edge(*shared, rng.integers(0, 9, (2, 2)))
    costs, seconds = rng.integers(0, 9, (2, 2)), rng.integers(-4, 5, (2, streams, 2))
    within, ties, num_bytes = rng.integers(0, 9, (2, 2)).astype(float), rng.integers(0, 9, (2, 2, 2)), rng.integers(0, 9, 2)
    within[rng.random((2, 2)) < forbidden] = 1e18
    for copy in range(num_copies):
        part = [b.add_node(costs[k] + (copy if uneven else 0), seconds[k]) for k in range(2)]
        b.add_edge(*part, within)
        for k in range(2):
            b.add_edge(shared[k], part[k], ties[k])
        b.add_usage(part[0], "device", copy, num_copies + 1, num_bytes)
    return b.build()


def partition(model: Model) -> list[list[int]]:
    folded = fold(model)
    assert folded is not None
    return [np.flatnonzero(folded.colour == c).tolist() for c in range(len(folded.count))]


def test_equal_parts_become_one() -> None:
    model = from_problem(copies(1, 4))
    assert partition(model) == [[0], [1], [2, 4, 6, 8], [3, 5, 7, 9]]
    folded = fold(model)
    assert folded is not None and folded.small.num_edges == 4


def test_unequal_parts_stay() -> None:
    assert fold(from_problem(copies(1, 4, uneven=True))) is None


def test_bytes_in_a_slot_with_a_price_tell_them_apart() -> None:
    model = from_problem(copies(1, 4))
    usage = np.zeros(len(model.cost))
    usage[model.node_off[2] : model.node_off[3]] = 1.0
    before, folded = fold(model), fold(model, [usage])
    assert before is not None and folded is not None
    assert folded.colour[2] not in folded.colour[[4, 6, 8]] and folded.colour[4] == folded.colour[6]
    assert not before.is_even(usage) and folded.is_even(usage)


def test_a_ring_of_equal_nodes_is_not_folded() -> None:
    """All its nodes have one colour, and edges within a colour would become a loop."""
    b = ProblemBuilder()
    ring = [b.add_node([0.0, 1.0]) for _ in range(6)]
    for u, v in zip(ring, ring[1:] + ring[:1], strict=True):
        b.add_edge(min(u, v), max(u, v), [[0.0, 3.0], [3.0, 1.0]])
    assert fold(from_problem(b.build())) is None


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_bound_holds(seed: int, num_copies: int) -> None:
    """At any prices, with few and many of them, folded and unfolded."""
    problem = copies(seed, num_copies)
    model, rng = from_problem(problem), np.random.default_rng(seed)
    best = brute_force(problem)
    dual = Dual(model, lambda x, objective: None, math.inf, 0, folded=True)
    for k in [None, *range(model.num_slots)]:
        if k is not None:
            dual.add_slot(k)
        weight = rng.random(model.num_streams) / max(model.num_streams, 1)
        dual.trial(Point(rng.random(len(dual.slots)) * 10, weight), 5, 0.0, 0.0)
        assert dual.bound <= best + 1e-9 * abs(best)
    dual.unfold()
    dual.trial(dual.best, 5, 0.0, 0.0)
    assert dual.bound <= best + 1e-9 * abs(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_messages_of_the_whole_model(seed: int, num_copies: int) -> None:
    """Expanded messages give the same minima, sum over sum; collapsed again they are what they were. (What stands for "forbidden" depends
    on a model's costs.)"""
    model = from_problem(copies(seed, num_copies, forbidden=0.0))
    folded = fold(model)
    if folded is None:
        return
    small, whole = build_graph(folded.small), build_graph(model)
    off, msg = new_messages(small)
    for _ in range(3):
        forward(small.cost, off, msg, small, np.zeros(folded.small.num_nodes, dtype=np.int64))
        backward(small.cost, off, msg, small)
    whole_off, _ = new_messages(whole)
    wide = expand(folded, small, off, msg, whole, whole_off)
    assert collapse(folded, small, off, whole, whole_off, wide) == pytest.approx(msg)
    assert _reparametrised(model, whole, whole_off, wide) == pytest.approx(_reparametrised(folded.small, small, off, msg), abs=1e-6)


def _reparametrised(model: Model, g: Graph, off: np.ndarray, msg: np.ndarray) -> float:
    """The sum of the least node costs and edge entries under messages: a bound by itself."""
    total = 0.0
    for v in range(model.num_nodes):
        a, b = g.node_off[v], g.node_off[v + 1]
        own = g.cost[a:b].copy()
        for h in range(g.half_off[v], g.half_off[v + 1]):
            back, t = g.back[h], g.neighbor[h]
            own += msg[off[back] : off[back + 1]]
            if t > v:
                matrix = g.matrix[g.at[h] : g.at[h] + (b - a) * (g.node_off[t + 1] - g.node_off[t])].reshape(b - a, -1)
                total += float((matrix - msg[off[back] : off[back + 1]][:, None] - msg[off[h] : off[h + 1]][None, :]).min())
        total += float(own.min())
    return total


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_problems(seed: int) -> None:
    """Colours of any model are equitable: members agree in themselves and in what they see."""
    problem = random_problem(seed, most_nodes=8)
    if (problem.num_strategies < 1).any():
        return
    model = from_problem(problem)
    folded = fold(model)
    if folded is None:
        return
    for u, v in itertools.combinations(range(model.num_nodes), 2):
        if folded.colour[u] == folded.colour[v]:
            a, b = (slice(model.node_off[n], model.node_off[n + 1]) for n in (u, v))
            assert np.array_equal(model.cost[a], model.cost[b])
            assert sorted(folded.colour[_neighbours(model, u)].tolist()) == sorted(folded.colour[_neighbours(model, v)].tolist())


def _neighbours(model: Model, n: int) -> np.ndarray:
    return np.concatenate([model.edge_v[model.edge_u == n], model.edge_u[model.edge_v == n]])
