"""Seconds of a collective over one group of devices.

Formulas (ring algorithms; Thakur, Rabenseifner, Gropp 2005, and Chan et al. 2007), n devices, B = bytes of the whole (gathered) tensor of
the group, a = latency of a hop, r = bytes per second per device and direction:

    all_reduce      2 (n-1) a + 2 (n-1)/n B/r      (every device holds B before and after)
    all_gather        (n-1) a +   (n-1)/n B/r      (B/n before, B after)
    reduce_scatter    (n-1) a +   (n-1)/n B/r      (B before, B/n after)
    all_to_all        (n-1) a +   (n-1)/n B/n/r    (B/n before and after)
    broadcast         (n-1) a +           B/r      (pipelined chain)
    permute                 a +           B/n/r    (each device sends its B/n to one other)

plus the link's `start_s` once. A link with measured tables (from calibration) answers from them instead: interpolated inside the
measured range, continued along the last segment above it. One device needs no communication: 0 seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from .cluster import Link

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute"]
KINDS: tuple[str, ...] = get_args(Kind)

SPACING = "spacing"
"""A link's table beside those of the kinds: [seconds that ranks compute between two collectives, seconds on top of the price]."""

BUCKET_KINDS = ("all_reduce", "all_gather", "reduce_scatter")
AT_ONCE = (4, 16)


def many(kind: str, at_once: int) -> str:
    """The name of a link's table for one of so many messages of a kind that are under way at once, as those of a bucket."""
    return f"{kind}_of_{at_once}"


# kind -> n -> (hops, share of B that passes one device's link)
_RING: dict[str, Callable[[int], tuple[float, float]]] = {
    "all_reduce": lambda n: (2 * (n - 1), 2 * (n - 1) / n),
    "all_gather": lambda n: (n - 1, (n - 1) / n),
    "reduce_scatter": lambda n: (n - 1, (n - 1) / n),
    "all_to_all": lambda n: (n - 1, (n - 1) / (n * n)),
    "broadcast": lambda n: (n - 1, 1.0),
    "permute": lambda n: (1, 1 / n),
}


def collective_coefficients(kind: str, num_devices: int, link: Link) -> tuple[float, float]:
    """(seconds, seconds per byte of the whole tensor): a straight line for the planner's arrays.

    With a measured table, the line through its ends, so that small and large messages are both right. Raises ValueError for an
    unknown kind.
    """
    if kind not in _RING:
        raise ValueError(f"unknown collective {kind!r}; known are {', '.join(KINDS)}")
    if num_devices <= 1:
        return 0.0, 0.0
    points = _measured(kind, num_devices, link)
    if points:
        (x0, y0), (x1, y1) = points[0], points[-1]
        slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 > x0 else 0.0
        return max(0.0, y0 - slope * x0), slope
    hops, share = _RING[kind](num_devices)
    return link.start_s + hops * link.latency_s, share / link.rate_bytes_per_s


def collective_seconds(kind: str, num_bytes: float, num_devices: int, link: Link) -> float:
    """Seconds for `num_bytes` bytes of the whole (gathered) tensor of one group. Raises ValueError for an unknown kind."""
    if num_devices > 1 and kind in _RING:
        points = _measured(kind, num_devices, link)
        if points:
            return interpolate(points, num_bytes)
    fixed, per_byte = collective_coefficients(kind, num_devices, link)
    return fixed + per_byte * num_bytes


def bucket_seconds(kind: str, messages: Sequence[float], num_devices: int, link: Link) -> float:
    """Seconds for several messages that are started at once, each of so many bytes. They share their waits, but large ones also get in
    each other's way: both are in what was measured with `AT_ONCE`, and in between goes by the logarithm of their number. Where that was
    not measured, they count as one message."""
    tables: list[tuple[float, list[list[float]]]] = []
    for at_once in (1, *AT_ONCE):
        points = _measured(many(kind, at_once) if at_once > 1 else kind, num_devices, link)
        if points:
            tables.append((math.log(at_once), points))
    if len(tables) < 2 or len(messages) < 2:
        return collective_seconds(kind, sum(messages), num_devices, link)
    number = min(math.log(len(messages)), tables[-1][0])
    return sum(interpolate([[n, interpolate(points, num_bytes)] for n, points in tables], number) for num_bytes in messages)


def spaced_seconds(compute_s: float, num_devices: int, link: Link) -> float:
    """What a collective takes on top of its price, or less, where ranks have computed for `compute_s` since the one before: ranks drift
    apart, and find cold caches behind it. 0 where that was not measured; outside of what was measured as at its ends."""
    points = _measured(SPACING, num_devices, link)
    return interpolate(points, min(compute_s, points[-1][0])) if points else 0.0


def is_measured(kind: str, num_devices: int, link: Link) -> bool:
    """Whether the price of this collective comes from a measured table."""
    return bool(_measured(kind, num_devices, link))


def _measured(kind: str, num_devices: int, link: Link) -> list[list[float]] | None:
    return link.tables.get(kind, {}).get(str(num_devices)) if link.tables else None


def interpolate(points: list[list[float]], x: float) -> float:
    """Piecewise linear through `[x, y]` points by growing x; below the first point its y, above the last the last slope goes on."""
    if x <= points[0][0] or len(points) == 1:
        return points[0][1]
    at = min(bisect_right(points, x, key=lambda point: point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
