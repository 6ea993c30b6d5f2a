"""From calibration samples to a cluster: measured peaks, a curve per op class, tables per link, and how good they are."""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from . import fit
from .cluster import Cluster, ClusterError, Device, Link
from .collectives import SPACING, interpolate
from .journal import machine, versions, world
from .measure import Timing
from .work import Work, class_of

MEASURED = "measured: opweave calibrate"
OP_PASSES = ("op", "again")  # how the samples of an op are named
NETWORK = "network"  # and those of a link: "network PASS TABLE SIZE DEVICES_PER_NODE"


def corrected(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """The cluster with measured curves scaled: "matmul/float32" -> measured seconds / predicted seconds of a real step.

    Raises ClusterError for a class that has no curve, or a factor that cannot be.
    """
    tables = dict(cluster.device.tables)
    for name, factor in factors.items():
        if name not in tables:
            raise ClusterError(f"the profile corrects {name!r}, for which {cluster.name!r} has no measured curve; it has {sorted(tables)}")
        if not 0.01 < factor < 100:
            raise ClusterError(f"the profile corrects {name!r} by {factor!r}; a factor between 0.01 and 100 is possible: calibrate again")
        tables[name] = {**tables[name], "points": [[x, y * factor] for x, y in tables[name]["points"]]}
    return replace(cluster, device=replace(cluster.device, tables=tables))


def _timings(samples: Mapping[str, Any]) -> dict[tuple[str, str], list[Timing]]:
    """Op samples by (class with the op's name, dtype): of two passes over all ops the faster, since what else a machine does only adds."""
    found: dict[tuple[str, str], list[Timing]] = {}
    turns = samples.get("turns", 1.0)
    first, again = OP_PASSES
    for name, sample in samples.items():
        if name.startswith(f"{first} ") and sample is not None:
            other = samples.get(name.replace(first, again, 1)) or sample
            seconds = turns * min(sample["seconds"], other["seconds"])
            timing = Timing(work=Work(*sample["work"]), dtype=sample["dtype"], seconds=seconds)
            found.setdefault((timing.work.op_class, timing.dtype), []).append(timing)
    return found


def fitted(start: Cluster, samples: Mapping[str, Any], *, seconds: float, quick: bool) -> Cluster:
    """The start cluster with all that was measured. Raises ClusterError, ValueError where a measurement cannot be."""
    timings = _timings(samples)
    device = replace(start.device, **_peaks(start, timings, samples))
    tables, residuals = _tables(timings, device)
    calibration = {
        "fitted_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "ranks": world(),
        "turns": samples.get("turns", 1.0),
        "quick": quick,
        "seconds": round(seconds, 1),
        "residuals": residuals,
    }
    links = _links(start, samples)
    sources = {**start.sources, **dict.fromkeys(["device.peak_flops", "device.memory_bandwidth_bytes_per_s", *links], MEASURED)}
    host = replace(start.host, update_elements_per_s=_host_update(samples, start))
    cluster = replace(
        start, name="calibrated", device=replace(device, tables=tables), host=host, sources=sources, calibration=calibration, **links
    )
    return Cluster.from_dict(cluster.to_dict())  # what cannot be read back must not be written


def _tables(timings: Mapping[tuple[str, str], list[Timing]], device: Device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Curves of every op that was measured and of every class, and the errors of the ops' curves by class."""
    tables: dict[str, Any] = {}
    errors: dict[str, list[float]] = {}
    classes: dict[tuple[str, str], list[Timing]] = {}
    for (op_class, dtype), found in sorted(timings.items()):
        classes.setdefault((class_of(op_class), dtype), []).extend(found)
        tables[f"{op_class}/{dtype}"], left = fit.fit_class(op_class, dtype, found, device)
        errors.setdefault(f"{class_of(op_class)}/{dtype}", []).extend(left)
    for (name, dtype), found in classes.items():
        if f"{name}/{dtype}" not in tables:
            tables[f"{name}/{dtype}"], _ = fit.fit_class(name, dtype, found, device)
    return tables, {name: asdict(fit.residual(left)) for name, left in errors.items()}


def _class_timings(timings: Mapping[tuple[str, str], list[Timing]], classes: tuple[str, ...], dtype: str) -> list[Timing]:
    return [t for (c, d), found in timings.items() if class_of(c) in classes and d == dtype for t in found]


def _peaks(start: Cluster, timings: Mapping[tuple[str, str], list[Timing]], samples: Mapping[str, Any]) -> dict[str, Any]:
    """The best rates seen: FLOP/s of matrix products by dtype, bytes per second, elements updated per second; seconds of a view."""
    products = {dtype: _class_timings(timings, ("matmul",), dtype) for _, dtype in timings}
    peaks = {dtype: max(t.work.flops / t.seconds for t in found) for dtype, found in products.items() if found}
    streams = _class_timings(timings, ("pointwise", "copy"), "float32")
    large = [t for t in streams if t.work.bytes >= 1 << 22] or streams
    views = {"view_s": samples["views"] * samples.get("turns", 1.0)} if start.device.kind == "cpu" and "views" in samples else {}
    updates = _class_timings(timings, ("update",), "float32")
    found: dict[str, Any] = {"peak_flops": {**start.device.peak_flops, **peaks}, **views}
    if large:
        found["memory_bandwidth_bytes_per_s"] = max(t.work.bytes / t.seconds for t in large)
    if updates:
        best = max(updates, key=lambda t: t.work.flops)
        found["update_elements_per_s"] = best.work.flops / 12 / best.seconds
    return found


def _host_update(samples: Mapping[str, Any], start: Cluster) -> float:
    """Elements per second of the fused update on the host: measured apart on a GPU, the device's own on a CPU."""
    names = ["host update"] if "host update" in samples else [n for n in samples if n.startswith("op opweave.update/float32")]
    found = [samples[name] for name in names if samples[name] is not None]
    if not found:
        return start.host.update_elements_per_s
    best = max(found, key=lambda s: s["work"][0])
    return float(best["work"][0] / 12 / best["seconds"] * start.devices_per_node)


def _links(start: Cluster, samples: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Cluster that were measured."""
    found: dict[str, Any] = {}
    for direction in ("device_to_host", "host_to_device"):
        found[direction] = _copy_link(samples[f"copy {direction}"])
    if start.disk is not None:
        read, write = (_copy_link(samples["disk"][side]) for side in ("read", "write"))
        found["disk"] = replace(start.disk, read=read, write=write)
    found.update(_network(start, samples))
    overlaps = [value for name, value in samples.items() if name.startswith("overlap ")]
    if overlaps:
        found["overlap"] = min(overlaps)
    return found


def _copy_link(points: fit.Points) -> Link:
    fixed, per_byte = fit.line(points)
    return Link(latency_s=min(fixed, 1.0), bandwidth_bytes_per_s=1 / per_byte, tables={"copy": {"1": _monotone(points)}})


def _monotone(points: fit.Points) -> fit.Points:
    return [[x, y] for (x, _), y in zip(points, fit.isotonic([y for _, y in points]), strict=True)]


def _spaced(passes: Sequence[fit.Points], price_s: float) -> fit.Points:
    """Seconds on top of a collective's price, by the seconds between two. passes: of [seconds between, seconds that a small one then adds];
    the third point is what prices were measured with. price_s: of that small collective.

    What a collective takes may double within a minute. So each pass is compared to its own third point, and where collectives took longer
    then than their price says, what is added shrinks in proportion.
    """
    usual = statistics.median(points[2][1] for points in passes)
    spaced = list(zip(*([(between, added - points[2][1]) for between, added in points] for points in passes), strict=True))
    more = [[statistics.median(x for x, _ in points), statistics.median(y for _, y in points)] for points in spaced]
    scale = min(1.0, price_s / usual)
    rising = _monotone(sorted([x, max(y * scale, -price_s)] for x, y in more))
    at_third = interpolate(rising, more[2][0])
    return [[x, y - at_third] for x, y in rising]


def _network(start: Cluster, samples: Mapping[str, Any]) -> dict[str, Link]:
    """intra_node and inter_node: tables by kind and group, and the formula's constants from the all_reduce of the smallest group."""
    passes: dict[tuple[str, str, str], list[Any]] = {}
    for name, sample in samples.items():
        if name.startswith(f"{NETWORK} "):
            _, _, table, size, per_node = name.split()
            passes.setdefault((table, size, per_node), []).append(sample)
    points = {key: _medians(found) for key, found in passes.items() if key[0] != SPACING}
    tables: dict[str, dict[str, dict[str, Any]]] = {"intra_node": {}, "inter_node": {}}
    basis: dict[str, tuple[int, fit.Points]] = {}
    for (table, size, per_node), found in passes.items():
        link = "intra_node" if size == per_node else "inter_node"
        key = size if per_node in (size, "1") else f"{size}/{per_node}"
        if table == SPACING:
            made = _spaced(list(itertools.chain(*found)), points["all_gather", size, per_node][0][1])
        else:
            made = _monotone(points[table, size, per_node])
        tables[link].setdefault(table, {})[key] = made
        if table == "all_reduce" and (link not in basis or (per_node == "1", -int(size)) > (False, -basis[link][0])):
            basis[link] = (int(size), points[table, size, per_node])
    links = {}
    for link, (n, of_all_reduce) in basis.items():
        fixed, per_byte = fit.line(of_all_reduce)
        rate = 2 * (n - 1) / n / per_byte
        hop = fixed / (2 * (n - 1)) / 2
        links[link] = Link(latency_s=hop, start_s=fixed / 2, bandwidth_bytes_per_s=rate, tables=tables[link])
    return links


def _medians(passes: Sequence[fit.Points]) -> fit.Points:
    """[x, y] with the median y of several passes over the same x."""
    return [[points[0][0], statistics.median(y for _, y in points)] for points in zip(*passes, strict=True)]
