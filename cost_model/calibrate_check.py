"""Does a calibrated cluster file still hold? A few samples measured again, against what the file predicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from . import measure
from .calibrate import KINDS, Connect, collective_sample, op_sample
from .cluster import Cluster, ClusterError
from .collectives import collective_seconds
from .journal import elsewhere, world
from .kernels import is_measured, work_seconds
from .work import Work


def check(
    cluster: Cluster, *, connect: Connect | None = None, functions: measure.Functions = measure.PLAIN, tolerance: float = 0.35
) -> dict[str, Any]:
    """Measure a few samples again and compare: {holds, median_error, tolerance, warning, rows: [{name, predicted_s, measured_s, error}]}.

    It holds when the median error is within `tolerance`. Raises ClusterError for a cluster that was not calibrated.
    """
    if not cluster.calibration:
        raise ClusterError(f"cluster {cluster.name!r} was not calibrated, there is nothing to check; run `opweave calibrate -o FILE`")
    device = torch.device("cuda", torch.cuda.current_device()) if cluster.device.kind == "cuda" else torch.device("cpu")
    found = [*_op_pairs(cluster, device, functions), *(_collective_pairs(cluster, device, connect) if connect else ())]
    rows = [{"name": name, "predicted_s": p, "measured_s": m, "error": p / m - 1} for name, p, m in found]
    median = statistics.median(abs(p / m - 1) for _, p, m in found)
    return {"holds": median <= tolerance, "median_error": median, "tolerance": tolerance, "warning": elsewhere(cluster), "rows": rows}


def _op_pairs(cluster: Cluster, device: torch.device, functions: measure.Functions) -> Iterator[tuple[str, float, float]]:
    """(name, predicted, measured seconds) of one float32 sample per op, of middling size."""
    turns = (cluster.calibration or {}).get("turns", 1.0)
    by_op: dict[str, list[measure.Row]] = {}
    for row in measure.rows((torch.float32,), scale=4 if device.type == "cuda" else 1):
        by_op.setdefault(row.op, []).append(row)
    for found in by_op.values():
        row = found[len(found) // 2]
        sample = op_sample(row, device, 0.02, functions)
        if sample is not None and is_measured(sample["work"][2], cluster.device):
            yield row.name, work_seconds(Work(*sample["work"]), cluster.device), sample["seconds"] * turns


def _collective_pairs(cluster: Cluster, device: torch.device, connect: Connect) -> Iterator[tuple[str, float, float]]:
    """One message per kind over the whole job, where the job is of the cluster's size."""
    if world() != cluster.num_devices or world() == 1:
        return
    mesh, size = (cluster.num_devices,), 1 << 20
    wires, link = connect(mesh, (0,)), cluster.group_link(mesh, (0,))
    for kind in KINDS:
        yield f"{kind} of 1 MiB", collective_seconds(kind, size, mesh[0], link), collective_sample(wires, kind, size, mesh[0], device)
