"""What every engine starts from, and what it answers with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..problem import SelectionProblem
from .model import Model, from_problem
from .presolve import Reduced, presolve
from .substitute import drop_slots

Offer = Callable[[float, float], None]
"""Called with the best objective and the bound whenever one of them improves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A problem, its working form, and that reduced."""

    problem: SelectionProblem
    model: Model
    reduced: Reduced
    reduction_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """An engine's answer in terms of the problem. ``infeasible``: there is no selection, for the ``reason`` if the engine knows one."""

    selection: np.ndarray | None
    bound: float
    infeasible: bool = False
    reason: str = ""


def reduced_start(problem: SelectionProblem) -> Start:
    """Every node must have a strategy."""
    model = from_problem(problem)
    before = time.perf_counter()
    reduced = presolve(drop_slots(model))
    return Start(problem=problem, model=model, reduced=reduced, reduction_s=time.perf_counter() - before)
