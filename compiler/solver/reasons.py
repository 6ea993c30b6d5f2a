"""Why a problem has no selection, in words that name the pool, the time and the bytes."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from ..problem import SelectionProblem
from .chain_dual import Dual, slot_usage
from .model import Model

FORBIDDEN_EVERYWHERE = "no selection avoids all forbidden entries"


def slot_reason(problem: SelectionProblem, model: Model, k: int, least: float) -> str:
    """Slot ``k`` of ``model`` needs ``least`` bytes."""
    pool = int(model.slot_pool[k])
    limit = problem.limits[pool]
    return f"pool {problem.pools[pool]!r} needs at least {least:.0f} bytes at time {model.slot_time[k]}, its limit is {limit:.0f}"


def least_memory(problem: SelectionProblem, model: Model) -> str:
    """Why even the smallest choices do not fit, or nothing."""
    least = model.least_loads()
    over = least - model.slot_limit
    if not (over > 0).any():
        return _least_together(problem, model)
    return slot_reason(problem, model, int(over.argmax()), float(least[over.argmax()]))


def _least_together(problem: SelectionProblem, model: Model) -> str:
    """Why no choice fits all pools together, whichever of them it takes, at a time when one of them is fullest; or nothing."""
    pools = np.unique(model.slot_pool)
    if len(pools) < 2:
        return ""
    share = model.least_loads() / np.maximum(model.slot_limit, 1.0)
    limit = float((problem.limits + problem.tolerance())[pools].sum())
    for pool in pools:
        here = np.flatnonzero(model.slot_pool == pool)
        at = int(model.slot_time[here[share[here].argmax()]])
        least = float(np.minimum.reduceat(_bytes_at(problem, pools, at), problem.node_offsets()[:-1]).sum())
        if least > limit:
            names = " and ".join(repr(problem.pools[p]) for p in pools)
            return f"pools {names} together need at least {least:.0f} bytes at time {at}, their limits are {limit:.0f}"
    return ""


def _bytes_at(problem: SelectionProblem, pools: np.ndarray, at: int) -> np.ndarray:
    """float64[strategies]: bytes in all of ``pools`` at a time."""
    live = np.isin(problem.usage_pool, pools) & (problem.usage_start <= at) & (at < problem.usage_end)
    length = np.diff(problem.usage_offsets())
    row = np.repeat(np.arange(len(length)), length)
    entry = problem.node_offsets()[problem.usage_node][row] + np.arange(len(row)) - problem.usage_offsets()[:-1][row]
    return np.bincount(entry[live[row]], problem.usage_bytes[live[row]], len(problem.node_cost))


def why_infeasible(problem: SelectionProblem, model: Model, deadline: float, seed: int) -> str:
    """The slot that cannot be met, with the least bytes any selection needs there; or what else is known."""
    if model.num_slots == 0:
        return FORBIDDEN_EVERYWHERE
    least = model.least_loads()
    order = np.argsort(-(least - model.slot_limit) / np.maximum(model.slot_limit, 1.0), kind="stable")
    for k in _apart(order, 10):
        if least[k] <= model.slot_limit[k]:
            least[k] = max(least[k], least_load(model, k, min(deadline, time.perf_counter() + 1.0), seed))
        if least[k] > model.slot_limit[k]:
            return slot_reason(problem, model, k, float(least[k]))
    k = int(order[0])
    tightest = slot_reason(problem, model, k, float(least[k]))
    return f"{FORBIDDEN_EVERYWHERE} and fits memory at every time; tightest: {tightest}"


def _apart(order: np.ndarray, most: int) -> list[int]:
    """The first entries of ``order`` that are no neighbours of each other."""
    picked: list[int] = []
    for k in order.tolist():
        if all(abs(k - other) > 3 for other in picked):
            picked.append(k)
        if len(picked) == most:
            break
    return picked


def least_load(model: Model, k: int, deadline: float, seed: int) -> float:
    """A lower bound on the bytes of slot ``k`` over all selections without forbidden entries: the dual with bytes as costs."""
    unit = max(float(model.slot_limit[k]), 1.0)
    bytes_of = slot_usage(model, k) / unit
    weightless = replace(
        model,
        cost=np.where(np.isfinite(model.cost), bytes_of, np.inf),
        edge_cost=np.where(np.isfinite(model.edge_cost), 0.0, np.inf),
        node_stream=np.zeros((0, len(model.cost))),
        edge_stream=np.zeros((0, len(model.edge_cost))),
        stream_constant=np.zeros(0),
        constant=0.0,
    )
    dual = Dual(weightless, lambda x, objective: None, deadline, seed)
    dual.trial(dual.best, 50, 1e-9, 1e-6)
    return max(0.0, (dual.bound - 1e-9) * unit)
