"""Small monotone models of measured times.

A class of ops has one curve: seconds as a function of the ideal seconds (`kernels.ideal_seconds`), piecewise linear in logarithms through
at most `KNOTS` points. More work never takes less time: the points go through isotonic regression (pool adjacent violators; Barlow et
al. 1972). How good a curve is, is said by its error on samples it was not fitted to.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cluster import Device
from .kernels import MATRIX_CLASSES, ideal_seconds, work_seconds
from .measure import Timing

KNOTS = 12
HALF_DIMS = (0, 2, 4, 8, 16, 32, 64)

Points = list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Relative error on held-out samples; None where there were too few to hold any out."""

    median: float | None
    p90: float | None
    num_samples: int


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest (least squares) sequence that never falls."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2], blocks[-1]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [value for value, length in blocks for _ in range(length)]


def fit_points(samples: Sequence[tuple[float, float]], knots: int = KNOTS) -> Points:
    """Monotone [x, seconds] knots through samples (x, seconds), all above 0. Raises ValueError without samples or for absurd ones."""
    if not samples:
        raise ValueError("there is nothing to fit: no samples")
    for x, y in samples:
        if min(x, y) <= 0 or not math.isfinite(x + y):
            raise ValueError(f"a sample of {y!r} s at {x!r} cannot be: both must be finite and above 0; measure again")
    ordered = sorted((math.log(x), math.log(y)) for x, y in samples)
    # Where there are many samples, a knot stands for at least two; few samples are knots themselves.
    count = min(knots, len(ordered) // 2 if len(ordered) > 2 * knots else len(ordered))
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)]
    groups = [ordered[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    xs = [statistics.fmean(x for x, _ in group) for group in groups]
    ys = isotonic([statistics.median(y for _, y in group) for group in groups])
    points: Points = []
    for x, y in zip(xs, ys, strict=True):
        if not points or x > math.log(points[-1][0]) + 1e-6:
            points.append([math.exp(x), math.exp(y)])
    return points


def fit_class(op_class: str, dtype: str, timings: Sequence[Timing], device: Device) -> tuple[dict[str, Any], Residual]:
    """The table of one class and dtype, and its error on every third sample, which the fit it is judged by did not see.

    device: with the measured peaks. The half_dim of matrix work is the one that leaves the least error.
    """
    ordered = sorted(timings, key=lambda t: ideal_seconds(t.work, device, dtype))
    held_out = ordered[1::3] if len(ordered) > 3 else []
    seen = [t for i, t in enumerate(ordered) if i % 3 != 1] if held_out else ordered
    candidates = HALF_DIMS if op_class in MATRIX_CLASSES else (0,)
    tables = [_table(op_class, dtype, seen, device, half_dim) for half_dim in candidates]
    best = min(tables, key=lambda table: _errors(op_class, dtype, seen, device, table).median or 0.0)
    residual = _errors(op_class, dtype, held_out, device, best)
    return _table(op_class, dtype, ordered, device, best["half_dim"]), residual


def _with_table(op_class: str, dtype: str, device: Device, table: dict[str, Any]) -> Device:
    return replace(device, tables={f"{op_class}/{dtype}": table})


def _table(op_class: str, dtype: str, timings: Sequence[Timing], device: Device, half_dim: float) -> dict[str, Any]:
    probe = _with_table(op_class, dtype, device, {"points": [[1.0, 1.0]], "half_dim": half_dim})
    return {"points": fit_points([(ideal_seconds(t.work, probe, dtype), t.seconds) for t in timings]), "half_dim": half_dim}


def _errors(op_class: str, dtype: str, timings: Sequence[Timing], device: Device, table: dict[str, Any]) -> Residual:
    if not timings:
        return Residual(median=None, p90=None, num_samples=0)
    fitted = _with_table(op_class, dtype, device, table)
    errors = sorted(abs(work_seconds(t.work, fitted, dtype) / t.seconds - 1) for t in timings)
    return Residual(median=statistics.median(errors), p90=errors[min(len(errors) - 1, int(0.9 * len(errors)))], num_samples=len(errors))


def line(points: Points) -> tuple[float, float]:
    """(seconds, seconds per byte) through [bytes, seconds]: least squares of relative errors, neither below 0."""
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread if spread else 0.0
    slope = max(slope, 1e-15)
    return max(0.0, mean_y - slope * mean_x), slope
