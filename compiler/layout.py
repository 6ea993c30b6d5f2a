"""Layouts: where the pieces of one tensor are, as small tuples of numbers.

A `Layout` has one code per mesh axis: the index of the tensor's atom (see `factors`) that the axis splits, or `REPLICATED`, or a
partial kind. Several axes may split one atom; they nest in axis order, the lowest axis outermost. Tuples, because the planner
handles millions of them.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ..runtime.sharding import ShardSpec, Split

Layout = tuple[int, ...]

REPLICATED = -1
PARTIAL = {"sum": -2, "max": -3, "min": -4}
PARTIAL_NAME = {code: name for name, code in PARTIAL.items()}


def is_partial(layout: Layout) -> bool:
    """Whether any axis holds partial results."""
    return any(code < REPLICATED for code in layout)


def fits(layout: Layout, atoms: tuple[int, ...], mesh: tuple[int, ...]) -> bool:
    """Whether every atom is divisible by the product of the axes that split it."""
    for code in set(layout):
        if code >= 0:
            pieces = math.prod(n for c, n in zip(layout, mesh, strict=True) if c == code)
            if atoms[code] % pieces:
                return False
    return True


@lru_cache(maxsize=1 << 16)
def num_pieces(layout: Layout, mesh: tuple[int, ...]) -> int:
    """Into how many parts the tensor's elements are cut: global bytes / this = local bytes."""
    return math.prod(n for c, n in zip(layout, mesh, strict=True) if c >= 0)


def replicated(num_axes: int) -> Layout:
    """Whole on every device."""
    return (REPLICATED,) * num_axes


def spec_of(
    layout: Layout, shape: tuple[int, ...], factors: tuple[tuple[int, ...], ...], splits: tuple[Split, ...], mesh: tuple[int, ...]
) -> ShardSpec:
    """The `ShardSpec` of a layout. splits: for each atom its (dim, factor index)."""
    axes = tuple(splits[c] if c >= 0 else PARTIAL_NAME.get(c) for c in layout)
    return ShardSpec(shape=shape, factors=factors, axes=axes, mesh=mesh)
