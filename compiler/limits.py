"""Memory limits: bytes per device and pool, as users give them and as the planner needs them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..cost_model.cluster import Cluster
from .residency import DEVICE, DISK, HOST

POOLS = (DEVICE, HOST, DISK)
Limits = dict[str, float]

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)


def memory_limits(given: Any, cluster: Cluster) -> Limits:
    """Bytes of each pool that one device may use.

    given: None; bytes of the device (a number, or text like "40GiB"); or several pools, as a mapping or as text
    ("device=4GiB,host=32GiB,disk=100GiB"). What is not given: the device's usable memory; on a GPU its share of the host's memory; no
    disk, since nobody's disk is filled unasked. Raises ValueError for anything else.
    """
    limits: Limits = {DEVICE: float(cluster.device.usable_bytes)}
    if cluster.device.kind != "cpu":
        limits[HOST] = float(cluster.host_bytes_per_device)
    limits |= _given(given)
    if limits.get(DISK) and cluster.disk is None:
        raise ValueError(
            f"memory_limit gives {limits[DISK]:,.0f} bytes of disk, but cluster {cluster.name!r} describes no disk: calibrate it "
            "(opweave calibrate), or add a disk to the cluster file"
        )
    return limits


def limits_text(limits: Mapping[str, float]) -> str:
    """As `memory_limits` reads it: "device=4.07GiB,disk=100GiB"; sizes are rounded up, to a thousandth."""
    return ",".join(f"{pool}={size_text(num_bytes)}" for pool, num_bytes in limits.items())


def size_text(num_bytes: float) -> str:
    """1.3e9 as "1.211GiB", rounded up: what fits the one fits the other."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if num_bytes >= _UNITS[unit]:
            return f"{math.ceil(num_bytes / _UNITS[unit] * 1000) / 1000:g}{unit}B"
    return f"{math.ceil(num_bytes)}B"


def _given(given: Any) -> Limits:
    if given is None:
        return {}
    if isinstance(given, str) and "=" in given:
        parts = [part.split("=", 1) for part in given.split(",")]
        if any(len(part) != 2 for part in parts):
            raise _refuse(given)
        names = [name.strip() for name, _ in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"memory_limit {given!r} gives the pool {max(names, key=names.count)!r} twice; give each once")
        return _of_pools({name.strip(): size for name, size in parts}, given)
    if isinstance(given, Mapping):
        return _of_pools(given, given)
    return {DEVICE: _size(given, given)}


def _of_pools(sizes: Mapping[str, Any], given: Any) -> Limits:
    unknown = set(sizes) - set(POOLS)
    if unknown:
        raise ValueError(f"memory_limit names the pool {sorted(map(str, unknown))[0]!r}; the pools are {', '.join(POOLS)}")
    return {pool: _size(value, given) for pool, value in sizes.items()}


def _size(value: Any, given: Any) -> float:
    if isinstance(value, str):
        found = _SIZE.fullmatch(value)
        value = float(found.group(1)) * _UNITS[(found.group(2) or "").capitalize()] if found else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return float(value)
    raise _refuse(given)


def _refuse(given: Any) -> ValueError:
    return ValueError(
        f"memory_limit is {given!r}; give bytes per device, a number above 0 (10e9) or a text (10GiB; K, M, G, T are powers of "
        '1000, Ki, Mi, Gi, Ti of 1024), or several pools: "device=4GiB,host=32GiB,disk=100GiB"'
    )
