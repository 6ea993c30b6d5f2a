"""Recombination: the best selection that can be made of the choices of several others, exactly.

Independent runs of the local search agree on most nodes, and what they disagree on is small: on a problem of 5,000 nodes and a million edge
entries, ten selections within one percent of each other leave 500 nodes with 2,000 entries after reduction. The exact solver takes all the
good parts of all of them in a second or two, where a search would have to come upon them one after the other.
"""

from __future__ import annotations

import time

import numpy as np

from .exact import Mip
from .model import Model
from .presolve import Reduced, presolve
from .substitute import keep_strategies, substitute

MOST_ENTRIES = 20_000
"""Finite edge entries of the recombined problem; more selections are not taken in."""


class Pool:
    """The best selections met, at most ``most``, cheapest first, no two of the same cost."""

    def __init__(self, most: int = 30) -> None:
        self.most = most
        self.members: list[tuple[float, np.ndarray]] = []
        self.fresh = 0  # added since the last recombination

    def add(self, energy: float, x: np.ndarray) -> None:
        if any(energy == other for other, _ in self.members):
            return
        self.members = sorted([*self.members, (energy, x.copy())], key=lambda member: member[0])[: self.most]
        self.fresh += 1

    def taken(self) -> list[np.ndarray]:
        """The members, for a recombination: what comes from now on is fresh."""
        self.fresh = 0
        return [x for _, x in self.members]


def combine(model: Model, selections: list[np.ndarray], deadline: float, gap: float, seed: int) -> np.ndarray | None:
    """The best selection of ``model`` with choices of ``selections`` (cheapest first) only; None if none was found by ``deadline``."""
    while len(selections) > 1 and time.perf_counter() < deadline:
        part = restricted(model, selections)
        if part.infeasible or part.model.constant == np.inf or (part.model.slot_limit < 0).any():
            return None
        if part.model.num_nodes == 0:
            return part.undo(np.zeros(0, dtype=np.int64))
        if np.isfinite(part.model.edge_cost).sum() <= MOST_ENTRIES:
            found = Mip(part.model).solve(deadline, gap, seed).selection
            return None if found is None else part.undo(found)
        selections = selections[: len(selections) // 2]
    return None


def restricted(model: Model, selections: list[np.ndarray]) -> Reduced:
    """``model`` with the choices of ``selections`` only, reduced."""
    keep = np.zeros(len(model.cost), dtype=bool)
    for x in selections:
        keep[model.node_off[:-1] + x] = True
    fixed = keep_strategies(model.node_off, keep)
    part = presolve(substitute(model, fixed))
    return Reduced(part.model, [fixed, *part.steps], part.infeasible)
