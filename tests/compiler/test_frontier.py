"""Time against memory: the bisection and the points, with a planner that is a formula; then with the real one."""

import itertools
import types

import pytest
import torch

from opweave import zoo
from opweave.compiler import frontier as module
from opweave.compiler.frontier import Trials, frontier, smallest
from opweave.compiler.limits import memory_limits
from opweave.compiler.planner import DoesNotFitError
from opweave.compiler.suggestions import Request
from opweave.cost_model.cluster import Cluster

LEAST, MOST = 1_234_567, 9_876_543


@pytest.fixture
def formula(monkeypatch):
    """A planner of steps that need LEAST bytes and use up to MOST; `asked` has the device limits. `slower` at a limit: a planner's gap."""
    asked, slower = [], {}

    def plan_step(analysis, cluster, *, memory_limit):
        limit = memory_limit["device"]
        asked.append(limit)
        if limit < LEAST:
            raise DoesNotFitError("too small")
        peak = int(min(limit, MOST))
        predicted = {"step_time_s": 1e6 / peak * slower.get(int(limit), 1.0), "peak_bytes": {"device": peak, "host": 0}}
        return types.SimpleNamespace(limits=memory_limit, predicted=predicted, mesh=(1,), residency={}, state={})

    monkeypatch.setattr(module, "plan_step", plan_step)
    return types.SimpleNamespace(asked=asked, slower=slower)


def trials(**options):
    return Trials(analysis=None, cluster=None, limits={"device": 5.0, "host": 7.0}, **options)


def test_smallest_is_found_to_one_percent(formula):
    found = smallest(trials())
    assert LEAST <= found.limit_bytes <= LEAST * 1.01 and found.refused_bytes < LEAST and found.unlimited_bytes == MOST
    assert found.plan.limits["device"] == found.limit_bytes and len(formula.asked) < 14
    finer = smallest(trials(), share=1e-4)
    assert LEAST <= finer.limit_bytes <= LEAST * 1.0001


def test_smallest_stops_when_the_time_is_over(formula):
    found = smallest(trials(), deadline=0.0)
    assert (found.limit_bytes, found.refused_bytes, len(formula.asked)) == (MOST, 0, 1), "what is known is returned"


def test_points_are_spaced_in_equal_ratios_between_both_ends(formula):
    points = frontier(trials(), 5)
    limits = [p.limit_bytes for p in points]
    assert limits[0] <= LEAST * 1.01 and limits[-1] == MOST and len(limits) == 5
    ratios = [b / a for a, b in itertools.pairwise(limits)]
    assert max(ratios) / min(ratios) == pytest.approx(1.0, rel=1e-5)
    assert all(p.plan.predicted["peak_bytes"]["device"] <= p.limit_bytes for p in points)


def test_a_point_takes_the_faster_plan_of_less_memory_and_says_so(formula):
    limits = [p.limit_bytes for p in frontier(trials(), 5)]
    formula.slower[limits[2]] = 10.0
    points = frontier(trials(), 5)
    times = [p.plan.predicted["step_time_s"] for p in points]
    assert times == sorted(times, reverse=True)
    assert points[2].made_for_bytes < points[2].limit_bytes == limits[2]
    assert points[1].row()["made_for_bytes"] == limits[1]


def test_too_few_points():
    with pytest.raises(ValueError, match="a frontier has at least 2 points, 1 was asked for"):
        frontier(trials(), 1)


def test_a_real_step():
    model, batch = zoo.load("mlp-tiny")
    cluster = Cluster.resolve("cpu:1")
    optimizer = torch.optim.AdamW(model.parameters())
    request = Request(model=model, cluster=cluster, batch=batch, limits=memory_limits("disk=1GB", cluster), optimizer=optimizer)
    seen = Trials(analysis=request.analysis(), cluster=cluster, limits=request.limits)
    points = frontier(seen, 3)
    times = [p.plan.predicted["step_time_s"] for p in points]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    assert seen.at(0.97 * points[0].limit_bytes) is None, "1 % below the smallest nothing was found, 3 % below neither"
    assert points[0].plan.predicted["peak_bytes"]["disk"] > 0 == points[-1].plan.predicted["peak_bytes"]["disk"]
    assert seen.best({"device": points[-1].limit_bytes}) is points[-1].plan
    with pytest.raises(ValueError, match="stays within"):
        seen.best({"device": 1.0})
