"""Strategies: every way an op can be split over the mesh, derived from its bound rule.

One code per mesh axis: an atom of the op to split, `REPLICATED` (every device along the axis does the whole op), or `pass_code(g)`:
the operands of linear group g arrive as partial sums and the results leave as such. Operand and result layouts follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .factors import BoundOp
from .layout import PARTIAL, REPLICATED, Layout, fits

Codes = tuple[int, ...]
AxisFilter = Callable[[int, list[int]], list[int]]  # (axis, codes) -> those allowed

# More options than this for one op are thinned out: those that split with inner factors go first.
MAX_OPTIONS = 160


def pass_code(group: int) -> int:
    """The axis code for "linear group `group` passes partial sums through"."""
    return -2 - group


def is_pass(code: int) -> bool:
    """Whether an axis code is a linear pass-through."""
    return code <= -2


@dataclass(frozen=True, slots=True)
class OpStrategy:
    """One way to run an op: axis codes, and the layouts of its operands and results that follow."""

    codes: Codes
    operands: tuple[Layout, ...]
    results: tuple[Layout | None, ...]


def axis_codes(op: BoundOp, axis_size: int) -> list[int]:
    """What one mesh axis of a given size can do with an op; an axis of one device does all of it."""
    if axis_size == 1:
        return [REPLICATED]
    used = {a for dims in (*op.operands, *(r for r in op.results if r is not None)) for a in dims}
    codes = [REPLICATED]
    codes += [a for a in range(len(op.sizes)) if a in used and op.flags[a] != "!" and op.sizes[a] % axis_size == 0]
    codes += [pass_code(g) for g in range(len(op.linear))]
    return codes


def enumerate_strategies(op: BoundOp, mesh: tuple[int, ...], allowed: AxisFilter | None = None) -> list[OpStrategy]:
    """All strategies of an op on a mesh. `allowed` leaves out codes of an axis (forced plans); where what it leaves does not fit the
    mesh (a batch too small for all axes), axes may stay whole after all."""
    per_axis = [axis_codes(op, n) for n in mesh]
    if allowed is not None:
        per_axis = [allowed(axis, codes) for axis, codes in enumerate(per_axis)]
    return [strategy(op, codes) for codes in _combinations(per_axis, op.sizes, mesh)]


def _combinations(per_axis: list[list[int]], sizes: tuple[int, ...], mesh: tuple[int, ...]) -> list[Codes]:
    for choices in (per_axis, [codes if REPLICATED in codes else [REPLICATED, *codes] for codes in per_axis]):
        options = [codes for codes in itertools.product(*choices) if fits(codes, sizes, mesh)]
        if options:
            return thin_out(options, MAX_OPTIONS)
    raise AssertionError("the replicated strategy always fits")


def thin_out(options: list[Codes], limit: int) -> list[Codes]:
    """At most `limit` options, those with the highest atom indices (innermost factors) dropped first."""
    if len(options) <= limit:
        return options
    ranked = sorted(range(len(options)), key=lambda i: (max(options[i]), i))[:limit]
    return [options[i] for i in sorted(ranked)]


def strategy(op: BoundOp, codes: Codes) -> OpStrategy:
    """The layouts that follow from axis codes."""
    return OpStrategy(
        codes,
        tuple(tuple(_operand_code(op, i, atoms, c) for c in codes) for i, atoms in enumerate(op.operands)),
        tuple(None if atoms is None else tuple(_result_code(op, atoms, c) for c in codes) for atoms in op.results),
    )


def _operand_code(op: BoundOp, index: int, atoms: tuple[int, ...], code: int) -> int:
    if is_pass(code):
        return PARTIAL["sum"] if index in op.linear[-2 - code] else REPLICATED
    return atoms.index(code) if code >= 0 and code in atoms else REPLICATED


def _result_code(op: BoundOp, atoms: tuple[int, ...], code: int) -> int:
    if is_pass(code):
        return PARTIAL["sum"]
    if code == REPLICATED:
        return REPLICATED
    if code in atoms:
        return atoms.index(code)
    # Split, but not in this result: a reduction, complete already where the local form exchanges ("#").
    return REPLICATED if op.flags[code] == "#" else PARTIAL[op.reduce]


def value_layouts(atoms: tuple[int, ...], mesh: tuple[int, ...], allowed: AxisFilter | None = None) -> list[Layout]:
    """All layouts without partials of a tensor with these atoms (stored state)."""
    per_axis = [[REPLICATED] + [a for a, size in enumerate(atoms) if n > 1 and size % n == 0] for n in mesh]
    if allowed is not None:
        per_axis = [allowed(axis, codes) for axis, codes in enumerate(per_axis)]
    return _combinations(per_axis, atoms, mesh)


def unique(layouts: Iterable[Layout]) -> list[Layout]:
    """Layouts without repeats, in order."""
    return list(dict.fromkeys(layouts))
