"""Seconds of one kernel on one device.

    ideal   = max(flops * (1 + half_dim / min_dim) / peak, bytes / memory bandwidth)     (or their weighted sum, see below)
    seconds = launch + ramp + ideal / efficiency

- peak: of the dtype for matrix work, of float32 for all else (elementwise work in half precision is done in float32).
- half_dim: a product whose result has half_dim as its smaller side runs at half the rate (tiles are partly empty).
- ramp: what filling and draining the device costs, so small kernels are less efficient than large ones.
- efficiency: share of the binding peak that large kernels reach, per class; the cluster file's `device.efficiency` first.

The defaults below are assumptions of the usual order (cuBLAS, cuDNN and FlashAttention reach 60-90 % of the dense peak, streaming
kernels 80-90 % of the memory bandwidth). Calibration replaces launch + ramp + ideal / efficiency per class and dtype by a measured
curve: `device.tables["matmul/float32"] = {"points": [[ideal, seconds], ...]}`, interpolated in logarithms; below its first point the
seconds stay, above its last they grow in proportion. With
a "byte_weight" w > 0 the ideal time is the sum of the first term and w times the second: kernels that first bring their operands into
another layout, as convolutions on CPUs do, take both. An op may have a curve of its own, "norm:native_batch_norm/float32"; others have
that of their class. Dtypes without a curve have float32's, but for matrix work, where kernels differ.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .cluster import Device
from .work import OP_CLASSES, Work, class_of

MATRIX_CLASSES = ("matmul", "attention", "attention_backward", "conv", "conv_backward", "moe", "moe_backward")

Floats = npt.NDArray[np.float64]


class _Default(NamedTuple):
    efficiency: float
    ramp_s: float
    half_dim: float


# Assumed per (device kind, class); a backward class that is not named is as its forward, "*" is for the others.
_DEFAULTS: dict[str, dict[str, _Default]] = {
    "cuda": {
        "matmul": _Default(0.85, 6e-6, 32),
        "attention": _Default(0.70, 8e-6, 16),
        "conv": _Default(0.60, 8e-6, 32),
        "moe": _Default(0.70, 2e-5, 32),
        "reduction": _Default(0.80, 3e-6, 0),
        "scatter": _Default(0.50, 4e-6, 0),
        "*": _Default(0.85, 2e-6, 0),
    },
    "cpu": {
        "matmul": _Default(0.80, 2e-6, 8),
        "attention": _Default(0.50, 1e-5, 8),
        "conv": _Default(0.50, 1e-5, 4),
        "moe": _Default(0.60, 1e-4, 8),
        "reduction": _Default(0.50, 2e-6, 0),
        "transcendental": _Default(0.30, 1e-6, 0),
        "softmax": _Default(0.40, 1e-6, 0),
        "scatter": _Default(0.20, 2e-6, 0),
        "*": _Default(0.60, 1e-6, 0),
    },
}


class Curve(NamedTuple):
    """Seconds of a class and dtype: `ideal` from the rates, then the formula or the measured points (in logarithms)."""

    seconds_per_flop: float
    seconds_per_byte: float
    half_dim: float
    fixed_s: float
    slope: float
    log_ideal: tuple[float, ...] = ()
    log_seconds: tuple[float, ...] = ()
    byte_weight: float = 0.0


def table_name(op_class: str, device: Device, dtype: str) -> str | None:
    """The measured curve that prices an op: its own, else its class's; None where there is none."""
    name = class_of(op_class)
    dtypes = (dtype,) if name in MATRIX_CLASSES or dtype == "float32" else (dtype, "float32")
    found = (f"{n}/{d}" for d in dtypes for n in (op_class, name))
    return next((key for key in found if key in device.tables), None)


@lru_cache(maxsize=1024)
def curve(device: Device, op_class: str, dtype: str) -> Curve:
    """The price curve of a class or of one op of it. Raises ValueError for an unknown class."""
    name = class_of(op_class)
    if name not in OP_CLASSES:
        raise ValueError(f"unknown op class {op_class!r}; known are {', '.join(OP_CLASSES)}")
    table, forward = _DEFAULTS[device.kind], name.removesuffix("_backward")
    default = table.get(name) or table.get(forward) or table["*"]
    efficiency = device.efficiency.get(name) or device.efficiency.get(forward) or default.efficiency
    peak = device.flops_per_s(dtype if name in MATRIX_CLASSES else "float32")
    measured = device.tables.get(table_name(op_class, device, dtype) or "")
    points = measured["points"] if measured else []
    return Curve(
        seconds_per_flop=1 / peak,
        seconds_per_byte=1 / device.memory_bandwidth_bytes_per_s,
        half_dim=measured.get("half_dim", default.half_dim) if measured else default.half_dim,
        fixed_s=device.launch_s + default.ramp_s,
        slope=1 / efficiency,
        log_ideal=tuple(math.log(x) for x, _ in points),
        log_seconds=tuple(math.log(y) for _, y in points),
        byte_weight=measured.get("byte_weight", 0.0) if measured else 0.0,
    )


def ideal_seconds(work: Work, device: Device, dtype: str) -> float:
    """Seconds at the device's peaks, without launch or inefficiency."""
    return _ideal(work, curve(device, work.op_class, dtype))


def _ideal(work: Work, c: Curve) -> float:
    computing = work.flops * c.seconds_per_flop * (1 + c.half_dim / work.min_dim)
    moving = work.bytes * c.seconds_per_byte
    return computing + c.byte_weight * moving if c.byte_weight else max(computing, moving)


def work_seconds(work: Work, device: Device, dtype: str = "float32") -> float:
    """Predicted seconds of one kernel. The scalar form of `kernel_seconds`; takes half a microsecond."""
    if work.op_class == "view":
        return device.view_s
    c = curve(device, work.op_class, dtype)
    ideal = _ideal(work, c)
    if c.log_ideal:
        return _on_curve(c, ideal)
    return c.fixed_s + ideal * c.slope


def _on_curve(c: Curve, ideal: float) -> float:
    x = math.log(max(ideal, 1e-12))
    xs, ys = c.log_ideal, c.log_seconds
    if x <= xs[0]:
        return math.exp(ys[0])
    if x >= xs[-1]:
        return math.exp(ys[-1] + x - xs[-1])
    at = bisect_right(xs, x)
    return math.exp(ys[at - 1] + (ys[at] - ys[at - 1]) * (x - xs[at - 1]) / (xs[at] - xs[at - 1]))


def kernel_seconds(
    flops: Floats | float,
    num_bytes: Floats | float,
    op_class: str,
    device: Device,
    dtype: str = "float32",
    min_dim: Floats | float = math.inf,
) -> Floats:
    """Predicted seconds of kernels of one class and dtype, as arrays that broadcast: flops, bytes, smaller side of the product's result."""
    flops, num_bytes = np.asarray(flops, dtype=float), np.asarray(num_bytes, dtype=float)
    if op_class == "view":
        return np.full(np.broadcast_shapes(flops.shape, num_bytes.shape), device.view_s)
    c = curve(device, op_class, dtype)
    computing = flops * c.seconds_per_flop * (1 + c.half_dim / np.asarray(min_dim, dtype=float))
    moving = num_bytes * c.seconds_per_byte
    ideal = computing + c.byte_weight * moving if c.byte_weight else np.maximum(computing, moving)
    if not c.log_ideal:
        return c.fixed_s + ideal * c.slope
    x = np.log(np.maximum(ideal, 1e-12))
    return np.exp(np.interp(x, c.log_ideal, c.log_seconds) + np.maximum(0.0, x - c.log_ideal[-1]))


def origin(work: Work, device: Device, dtype: str = "float32") -> str:
    """Where the price of a work comes from: "measured", "extrapolated" (outside the measured range) or "formula"."""
    c = curve(device, work.op_class, dtype)
    if not c.log_ideal:
        return "formula"
    x = math.log(max(ideal_seconds(work, device, dtype), 1e-12))
    return "measured" if c.log_ideal[0] <= x <= c.log_ideal[-1] else "extrapolated"


def is_measured(op_class: str, device: Device, dtype: str = "float32") -> bool:
    """Whether the price of this class or op comes from a measured curve."""
    return table_name(op_class, device, dtype) is not None
