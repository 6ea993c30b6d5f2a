"""Exact reductions in rounds until nothing changes, with the way back.

Statement: every step replaces a model by a smaller one whose optimal value is the same, and ``Reduced.undo`` turns a selection of the
last model into one of the first with the same objective and loads. Steps are substitutions (see ``substitute``) and eliminations of
nodes with two neighbours (see ``fold_pairs``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .model import Model
from .reduce import (
    drop_separable,
    forbid_dominated,
    forbid_leaf_pairs,
    forbid_oversized,
    forbid_unsupported,
    tied_parents,
)
from .substitute import Substitution, bind, drop_slots, keep_strategies, substitute


class Step(Protocol):
    def undo(self, x: np.ndarray) -> np.ndarray: ...


@dataclass(slots=True)
class Reduced:
    """A model and the steps that led to it. ``infeasible`` is set (with a reason) when a node lost its last strategy."""

    model: Model
    steps: list[Step] = field(default_factory=list)
    infeasible: str = ""

    def undo(self, x: np.ndarray) -> np.ndarray:
        """The selection of the first model."""
        for step in reversed(self.steps):
            x = step.undo(x)
        return x

    def apply(self, sub: Substitution) -> None:
        self.model = substitute(self.model, sub)
        self.steps.append(sub)


def presolve(model: Model, *, max_rounds: int = 50) -> Reduced:
    """All reductions, to a fixpoint."""
    reduced = Reduced(_copy(model))
    before = (-1, -1, -1)
    for _ in range(max_rounds):
        if not _compact(reduced):
            return reduced
        forbid_leaf_pairs(reduced.model)
        _tie(reduced)
        reduced.model = drop_slots(reduced.model)
        if forbid_dominated(reduced.model) and not _compact(reduced):
            return reduced
        reduced.model = drop_separable(drop_slots(reduced.model))
        after = _measure(reduced.model)
        if after == before:
            break
        before = after
    return reduced


def _measure(model: Model) -> tuple[int, int, int]:
    return (len(model.cost), model.num_edges, int(np.isfinite(model.edge_cost).sum()))


def _compact(reduced: Reduced) -> bool:
    """Forbid what has no support or no room, drop it; False if a node has nothing left."""
    model = reduced.model
    forbid_oversized(model)
    forbid_unsupported(model)
    keep = np.isfinite(model.cost)
    if model.num_nodes:
        alive = np.add.reduceat(keep, model.node_off[:-1])
        if (alive == 0).any():
            reduced.infeasible = "no selection avoids all forbidden entries"
            return False
    if not keep.all() or (model.sizes() == 1).any():
        reduced.apply(keep_strategies(model.node_off, keep))
    return True


def _tie(reduced: Reduced) -> None:
    model = reduced.model
    parent, link_off, link = tied_parents(model.node_off, model.cost, model.edge_u, model.edge_v, model.edge_off, model.edge_cost)
    if (parent >= 0).any():
        reduced.apply(bind(model, parent, link_off, link))


def _copy(model: Model) -> Model:
    """Steps that forbid work in place; the caller's model stays as it is."""
    return copy.deepcopy(model)
