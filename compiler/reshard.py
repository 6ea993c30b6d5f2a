"""How a tensor gets from one layout to another: the list of steps both the pricing and the lowering use.

Steps change one mesh axis each. Order: slices first (they are free and shrink what follows), then reduce-scatters, all-to-alls,
all-reduces, and all-gathers last. Axes that split the same atom nest in axis order, so an axis can enter or leave an atom only
when no higher axis is on that atom; a higher axis that is in the way is gathered first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .layout import PARTIAL, REPLICATED, Layout

StepKind = Literal["slice", "reduce_scatter", "all_to_all", "all_reduce", "all_gather", "zero"]


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one axis.

    kind: "slice" (R → atom), "reduce_scatter" (partial → atom), "all_to_all" (atom → atom), "all_reduce" (partial → R), "all_gather"
    (atom → R), "zero" (R → partial sum: all but the first device hold zeros).
    source, target: codes of the axis before and after. before: the layout the step starts from.
    fraction: bytes of the tensor one group works on, over the global bytes (the gathered side of the step).
    """

    kind: StepKind
    axis: int
    source: int
    target: int
    before: Layout
    fraction: float


class ReshardError(ValueError):
    """No sequence of steps leads from one layout to the other."""


def _blocked_by(layout: Layout, axis: int, atom: int) -> int | None:
    """The innermost higher axis on an atom, which keeps `axis` from entering or leaving it."""
    for other in range(len(layout) - 1, axis, -1):
        if layout[other] == atom:
            return other
    return None


def _kind(source: int, target: int) -> StepKind:
    if source == REPLICATED:
        if target >= 0:
            return "slice"
        if target == PARTIAL["sum"]:
            return "zero"
        raise ReshardError(f"a replicated tensor has no use as partial code {target}")
    if source < REPLICATED:
        if target == REPLICATED:
            return "all_reduce"
        if target >= 0:
            return "reduce_scatter"
        raise ReshardError(f"partial code {source} cannot become partial code {target}")
    if target == REPLICATED:
        return "all_gather"
    if target >= 0:
        return "all_to_all"
    raise ReshardError("a split tensor is gathered before it can be partial")


_PRIORITY: dict[str, int] = {"slice": 0, "reduce_scatter": 1, "all_to_all": 2, "all_reduce": 3, "all_gather": 4, "zero": 5}


@lru_cache(maxsize=1 << 20)
def steps(source: Layout, target: Layout, mesh: tuple[int, ...]) -> tuple[Step, ...]:
    """The steps from `source` to `target`, in order. Raises ReshardError where there is no way (into a partial max, say)."""
    current = list(source)
    out: list[Step] = []

    def fraction(codes: list[int], without: int) -> float:
        share = 1.0
        for axis, code in enumerate(codes):
            if code >= 0 and axis != without:
                share /= mesh[axis]
        return share

    def take(axis: int, code: int) -> None:
        kind = _kind(current[axis], code)
        out.append(Step(kind, axis, current[axis], code, tuple(current), fraction(current, axis)))
        current[axis] = code

    def legal(axis: int, code: int) -> bool:
        if any(a >= 0 and _blocked_by(tuple(current), axis, a) is not None for a in (current[axis], code)):
            return False
        # Entering an atom waits for the lower axes that still have to enter or leave it.
        return code < 0 or all((current[a] == code) == (target[a] == code) for a in range(axis))

    while True:
        todo = [axis for axis in range(len(mesh)) if current[axis] != target[axis]]
        if not todo:
            return tuple(out)
        # A split axis that must become partial goes through replicated.
        moves = []
        for axis in todo:
            code = target[axis]
            if current[axis] >= 0 and code < REPLICATED:
                code = REPLICATED
            moves.append((_PRIORITY[_kind(current[axis], code)], axis, code))
        moves.sort()
        chosen = next(((axis, code) for _, axis, code in moves if legal(axis, code)), None)
        if chosen is None:
            # The lowest axis can only be blocked by a higher one: clear the innermost that is in the way.
            _, axis, code = min(moves, key=lambda move: move[1])
            atom = next(a for a in (current[axis], code) if a >= 0 and _blocked_by(tuple(current), axis, a) is not None)
            blocker = _blocked_by(tuple(current), axis, atom)
            assert blocker is not None
            chosen = (blocker, REPLICATED)
        take(*chosen)
        assert len(out) <= 6 * len(mesh), f"no end of steps from {source} to {target}"
