"""Small monotone models of measured times.

A class of ops, or an op, has one curve: seconds as a function of the ideal seconds (`kernels.ideal_seconds`), piecewise linear in
logarithms with knots at quantiles of the samples, by least squares. More work never takes less time: the knots go through isotonic
regression (pool adjacent violators; Barlow et al. 1972). How many knots, and what the ideal seconds are made of, is decided by the error
on samples left out in turn; how good a curve is, is said by its error on further ones that had no part in that either.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .cluster import Device
from .kernels import MATRIX_CLASSES, Floats, curve
from .measure import Timing
from .work import class_of

EVENNESS = 0.3  # how much a change of slope counts beside a sample's error, both in logarithms
KNOTS = (3, 5, 8, 12)
HALF_DIMS = (0, 2, 4, 8, 16, 32, 64)
BYTE_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

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


def fit_points(samples: Sequence[tuple[float, float]], knots: int = max(KNOTS)) -> Points:
    """Monotone [x, seconds] knots by samples (x, seconds), all above 0. Raises ValueError without samples or for absurd ones."""
    if not samples:
        raise ValueError("there is nothing to fit: no samples")
    for x, y in samples:
        if min(x, y) <= 0 or not math.isfinite(x + y):
            raise ValueError(f"a sample of {y!r} s at {x!r} cannot be: both must be finite and above 0; measure again")
    xs, ys = np.log(np.array(sorted(samples))).T
    places = _spaced(np.quantile(xs, np.linspace(0, 1, min(knots, len(xs)))).tolist())
    # Each row says how near a sample is to the knots around it: np.interp of the unit vectors. Further rows ask for an even slope.
    units = np.eye(len(places))
    near = np.stack([np.interp(xs, places, unit) for unit in units], axis=1)
    bends = EVENNESS * np.diff(np.diff(units, axis=0) / np.diff(places)[:, None], axis=0)
    wanted = np.concatenate([ys, np.zeros(len(bends))])
    heights = isotonic(np.linalg.lstsq(np.concatenate([near, bends]), wanted, rcond=None)[0].tolist())
    return [[math.exp(x), math.exp(y)] for x, y in zip(places, heights, strict=True)]


def _spaced(places: list[float]) -> list[float]:
    """Without those that lie closer than a tenth (in logarithms) behind another: no sample could tell them apart."""
    kept = places[:1]
    for place in places[1:]:
        if place > kept[-1] + 0.1:
            kept.append(place)
    return kept


class _Shape(NamedTuple):
    """What a curve is drawn over and how finely, see `kernels`."""

    half_dim: float
    byte_weight: float
    knots: int


def _shapes(op_class: str) -> list[_Shape]:
    matrix, scatter = class_of(op_class) in MATRIX_CLASSES, class_of(op_class) == "scatter"
    return [
        _Shape(half_dim, weight, knots)
        for half_dim in (HALF_DIMS if matrix else (0,))
        for weight in (BYTE_WEIGHTS if matrix or scatter else (0.0,))
        for knots in KNOTS
    ]


class _Samples(NamedTuple):
    """Measurements of one class as arrays: seconds at the device's peaks for the arithmetic and for the bytes, and what was measured."""

    computing: Floats
    moving: Floats
    min_dim: Floats
    seconds: Floats

    def ideal(self, shape: _Shape) -> Floats:
        """As `kernels.ideal_seconds`."""
        computing = self.computing * (1 + shape.half_dim / self.min_dim)
        return computing + shape.byte_weight * self.moving if shape.byte_weight else np.maximum(computing, self.moving)

    def chosen(self, where: npt.NDArray[np.bool_]) -> _Samples:
        return _Samples(*(column[where] for column in self))


def _samples(op_class: str, dtype: str, timings: Sequence[Timing], device: Device) -> _Samples:
    """By growing ideal seconds."""
    c = curve(device, op_class, dtype)
    rows = [(t.work.flops * c.seconds_per_flop, t.work.bytes * c.seconds_per_byte, t.work.min_dim, t.seconds) for t in timings]
    columns = np.array(sorted(rows, key=lambda row: max(row[:2]))).T
    return _Samples(*columns)


def fit_class(op_class: str, dtype: str, timings: Sequence[Timing], device: Device) -> tuple[dict[str, Any], list[float]]:
    """The table of one class or op and dtype, and its relative errors on every third sample, which the fit they judge did not see.

    device: with the measured peaks, without tables. Of all shapes of curves the one is taken that best predicts samples it was not fitted
    to. Raises ValueError without samples or for absurd ones.
    """
    _check(timings)
    samples = _samples(op_class, dtype, timings, device)
    left: list[float] = []
    if len(timings) > 3:
        seen, held_out = _parted(samples, 3, 1)
        shape = _best(op_class, seen)
        left = _errors(_points(seen, shape), held_out, shape).tolist()
    shape = _best(op_class, samples)
    return {"points": _points(samples, shape), "half_dim": shape.half_dim, "byte_weight": shape.byte_weight}, left


def _check(timings: Sequence[Timing]) -> None:
    for t in timings:
        if not (t.seconds > 0 and math.isfinite(t.seconds)):
            raise ValueError(f"a measurement of {t.seconds!r} s for {t.work} cannot be: it must be finite and above 0; measure again")


def _parted(samples: _Samples, folds: int, fold: int) -> tuple[_Samples, _Samples]:
    """(the others, every `folds`-th sample)."""
    out = np.arange(len(samples.seconds)) % folds == fold
    return samples.chosen(~out), samples.chosen(out)


def _points(samples: _Samples, shape: _Shape) -> Points:
    return fit_points(list(zip(samples.ideal(shape).tolist(), samples.seconds.tolist(), strict=True)), shape.knots)


def _errors(points: Points, samples: _Samples, shape: _Shape) -> Floats:
    """Relative errors of a curve, continued as `kernels` does."""
    xs, ys = np.log(np.array(points)).T
    x = np.log(samples.ideal(shape))
    return np.abs(np.exp(np.interp(x, xs, ys) + np.maximum(0.0, x - xs[-1])) / samples.seconds - 1)


def _best(op_class: str, samples: _Samples) -> _Shape:
    """The shape with the least error on samples left out in turn; with few samples the plainest one."""
    if len(samples.seconds) < 6:
        return _Shape(0, 0.0, max(KNOTS))
    parts = [_parted(samples, 3, fold) for fold in range(3)]

    def error(shape: _Shape) -> float:
        return float(np.concatenate([_errors(_points(seen, shape), left, shape) for seen, left in parts]).mean())

    return min(_shapes(op_class), key=error)


def residual(errors: Sequence[float]) -> Residual:
    """Median and 90th percentile of relative errors."""
    if not errors:
        return Residual(median=None, p90=None, num_samples=0)
    ordered = sorted(errors)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return Residual(median=statistics.median(ordered), p90=p90, num_samples=len(ordered))


def line(points: Points) -> tuple[float, float]:
    """(seconds, seconds per byte) through the first and the last of [bytes, seconds] by growing bytes, neither below 0.

    Small messages say what every message takes, large ones the rate. Sizes in between would only mislead: behind switches and token
    buckets they pass faster than the rate allows.
    """
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = max((y1 - y0) / (x1 - x0), 1e-15) if x1 > x0 else 1e-15
    return max(0.0, y0 - slope * x0), slope
