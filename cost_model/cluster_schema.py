"""What a cluster file may contain: the structure as a JSON schema, and the range each kind of number lies in.

The ranges are wide (from a network throttled to 1 MB/s to hardware of the next decade). They catch a value in the wrong unit, such as
a bandwidth of 600 that is meant as 600 GB/s; the error then says which unit would make sense of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .cluster import FORMAT, VERSION, ClusterError

_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 1}
_FRACTION = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def _object(required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required), "additionalProperties": False}


_LINK = _object(
    {"latency_s": _NUMBER, "bandwidth_bytes_per_s": _NUMBER},
    {"efficiency": _FRACTION, "start_s": _NUMBER, "tables": {"type": "object"}},
)
_DEVICE = _object(
    {
        "name": {"type": "string", "minLength": 1},
        "kind": {"enum": ["cuda", "cpu"]},
        "memory_bytes": _NUMBER,
        "memory_bandwidth_bytes_per_s": _NUMBER,
        "peak_flops": {"type": "object", "additionalProperties": _NUMBER, "required": ["float32"]},
    },
    {
        "usable_fraction": _FRACTION,
        "reserved_bytes": _NUMBER,
        "launch_s": _NUMBER,
        "view_s": _NUMBER,
        "efficiency": {"type": "object", "additionalProperties": _FRACTION},
        "update_elements_per_s": _NUMBER,
        "power_w": _NUMBER,
        "idle_power_w": _NUMBER,
        "tables": {"type": "object"},
    },
)
_HOST = _object(
    {"memory_bytes": _NUMBER, "memory_bandwidth_bytes_per_s": _NUMBER, "cores": _COUNT, "update_elements_per_s": _NUMBER},
    {"usable_fraction": _FRACTION, "power_w": _NUMBER},
)
_DISK = _object({"capacity_bytes": _NUMBER, "read": _LINK, "write": _LINK}, {})
SCHEMA = _object(
    {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "name": {"type": "string", "minLength": 1},
        "num_nodes": _COUNT,
        "devices_per_node": _COUNT,
        "device": _DEVICE,
        "host": _HOST,
        "intra_node": _LINK,
        "inter_node": _LINK,
        "device_to_host": _LINK,
        "host_to_device": _LINK,
    },
    {
        "disk": {"anyOf": [_DISK, {"type": "null"}]},
        "overlap": {"type": "number", "minimum": 0, "maximum": 1},
        "price_per_node_hour": _NUMBER,
        "sources": {"type": "object", "additionalProperties": {"type": "string"}},
        "calibration": {"type": ["object", "null"]},
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Sensible values of one kind of constant; `units` are (name, factor) a user may have had in mind."""

    low: float
    high: float
    unit: str
    units: tuple[tuple[str, float], ...] = ()


_BYTES_PER_S = _Range(low=1e6, high=1e14, unit="bytes/s", units=(("GB/s", 1e9), ("MB/s", 1e6), ("TB/s", 1e12)))
_BYTES = _Range(low=1e6, high=1e17, unit="bytes", units=(("GB", 1e9), ("MiB", 2**20), ("TB", 1e12)))
_FLOPS = _Range(low=1e8, high=1e17, unit="FLOP/s", units=(("TFLOP/s", 1e12), ("GFLOP/s", 1e9)))
_SECONDS = _Range(low=0, high=1.0, unit="seconds", units=(("microseconds", 1e-6), ("nanoseconds", 1e-9)))
_ELEMENTS = _Range(low=1e5, high=1e14, unit="elements/s", units=(("billions of elements/s", 1e9), ("millions of elements/s", 1e6)))
_WATTS = _Range(low=0, high=1e5, unit="watts", units=(("milliwatts", 1e-3),))
_MONEY = _Range(low=0, high=1e5, unit="money per hour")

RANGES = {
    "bandwidth_bytes_per_s": _BYTES_PER_S,
    "memory_bandwidth_bytes_per_s": _BYTES_PER_S,
    "memory_bytes": _BYTES,
    "capacity_bytes": _BYTES,
    "reserved_bytes": _Range(low=0, high=1e12, unit="bytes"),
    "peak_flops": _FLOPS,
    "latency_s": _SECONDS,
    "start_s": _SECONDS,
    "launch_s": _SECONDS,
    "view_s": _SECONDS,
    "update_elements_per_s": _ELEMENTS,
    "power_w": _WATTS,
    "idle_power_w": _WATTS,
    "price_per_node_hour": _MONEY,
}


def check(data: Any) -> None:
    """Raise ClusterError for the first thing that is wrong with a parsed cluster file."""
    _check_version(data)
    for name, value in _numbers("", data):
        _check_number(name, value)
    _check_structure(data)


def _check_version(data: Any) -> None:
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise ClusterError(f'not a cluster file: "format" is {found!r}, it must be "{FORMAT}"')
    if data.get("version") != VERSION:
        raise ClusterError(
            f"cluster file version {data.get('version')!r} was written by another opweave; this one reads version {VERSION}: "
            f"run `opweave calibrate -o FILE` again or start from a preset"
        )


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number outside measured tables, with its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("tables", "calibration", "sources"):
                yield from _numbers(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, value


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ClusterError(f"{name} is {value}; a finite number is needed")
    parts = name.split(".")
    limits = RANGES.get("peak_flops" if "peak_flops" in parts else parts[-1])
    if limits is None or limits.low <= value <= limits.high:
        return
    if value <= 0:
        raise ClusterError(f"{name} is {value:g}; it must be {'above 0' if limits.low else '0 or more'} {limits.unit}")
    raise ClusterError(f"{name} is {value:g} {limits.unit}, outside {limits.low:g} to {limits.high:g}{_hint(value, limits)}")


def _hint(value: float, limits: _Range) -> str:
    for unit, factor in limits.units:
        if limits.low <= value * factor <= limits.high:
            return f"; the unit is {limits.unit}: if {value:g} {unit} was meant, write {value * factor:g}"
    return ""


def _check_structure(data: Mapping[str, Any]) -> None:
    import jsonschema

    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(data))
    if not errors:
        return
    error = min(errors, key=lambda e: len(e.absolute_path))
    if error.validator == "anyOf" and error.context:
        error = min(error.context, key=lambda e: e.validator == "type")
    where = ".".join(str(part) for part in error.absolute_path)
    raise ClusterError(_explain(error, where))


def _explain(error: Any, where: str) -> str:
    name = where or "the top level"
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{name} lacks {', '.join(missing)}; needed there: {', '.join(error.validator_value)}"
    if error.validator == "additionalProperties" and isinstance(error.instance, Mapping):
        known = sorted(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known))
        return f"{name} has unknown {', '.join(unknown)}; known there: {', '.join(known)}"
    return f"{name} is {error.instance!r}: {error.message}"
