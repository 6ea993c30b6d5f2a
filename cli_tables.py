"""How the command line shows things: numbers with units, and rich tables of clusters, plans and reports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from .cost_model.cluster import Cluster, constants


def plain(value: Any) -> Any:
    """Anything a report may hold as JSON types; a number that is not finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def seconds_text(seconds: float | None) -> str:
    """0.00123 as "1.23 ms"."""
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= factor or unit == "us":
            return f"{seconds / factor:.3g} {unit}"
    return "0 s"


def bytes_text(num_bytes: float | None) -> str:
    """2.1e9 as "1.96 GiB"."""
    if num_bytes is None:
        return "-"
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def rate_text(value: float) -> str:
    """Bytes/s or FLOP/s with a decimal prefix, as vendors write them."""
    for unit, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g} "


def mesh_text(mesh: Sequence[int]) -> str:
    return "x".join(map(str, mesh))


def cell(key: str, value: Any) -> str:
    """A value by its name: `_s` is seconds, `bytes` is bytes, lists are joined."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        if key.endswith("_s") or key in ("time", "seconds"):
            return seconds_text(value)
        if "bytes" in key:
            return bytes_text(value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {cell(key, v)}" for k, v in value.items())
    if isinstance(value, Iterable):
        return ", ".join(cell(key, v) for v in value)
    return str(value)


_FIRST = ("path", "name", "op", "constant")  # columns that stay readable in a narrow terminal


def rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table with a column per key of the first row; numbers stand on the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    keys = list(rows[0]) if rows else []
    for key in keys:
        numeric = all(isinstance(row.get(key), int | float) or row.get(key) is None for row in rows)
        title = key.removesuffix("_s").replace("_", " ")
        width = min(24, max(len(cell(key, row.get(key))) for row in rows)) if key in _FIRST else None
        table.add_column(title, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric, min_width=width)
    for row in rows:
        table.add_row(*(cell(key, row.get(key)) for key in keys))
    return table


def pairs_table(title: str, pairs: Mapping[str, Any]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in pairs.items():
        table.add_row(key, str(value))
    return table


def plan_summary(report: Mapping[str, Any]) -> Table:
    """What a plan is, in a dozen lines. `report` has the keys of `opweave plan --json`."""
    predicted, solver = report["predicted"], report["solver"]
    pairs = {
        "model": report.get("model", ""),
        "cluster": report.get("cluster", ""),
        "mesh": mesh_text(report["mesh"]),
        "micro-batches": report["accumulate"] if report["accumulate"] > 1 else "",
        "patterns": cell("", report["patterns"]) or "none",
        "forced": ", ".join(_forced(report)),
        "autocast": report.get("autocast") or "",
        "predicted step": seconds_text(predicted["step_time_s"]),
        "streams": cell("_s", predicted["streams"]),
        "energy of a step": joules_text(predicted.get("joules")),
        "price of a step": price_text(predicted.get("price")),
        "predicted peak": cell("bytes", predicted["peak_bytes"]),
        "minimised": report.get("objective", "time"),
        "solver": solver_text(solver, report.get("objective", "time")),
        "planning time": cell("_s", report["planning_time_s"]),
        "replicated ops": cell("", report["replicated_ops"]) or "none",
    }
    return pairs_table("plan", {k: v for k, v in pairs.items() if v})


def joules_text(joules: float | None) -> str:
    """1234.5 as "1.23 kJ"; empty where it is not known."""
    return "" if joules is None else f"{joules / 1e3:.3g} kJ" if joules >= 1e3 else f"{joules:.3g} J"


def price_text(price: float | None) -> str:
    """In the currency of the cluster file, which does not name it; empty where there is no price."""
    return "" if price is None else f"{price:.3g} (in the currency of price_per_node_hour)"


def solver_text(solver: Mapping[str, Any], objective: str) -> str:
    """How the search ended. What it minimises for energy are seconds, those of computing with a weight, which mean nothing to a reader."""
    gap = f"gap {solver['gap'] if solver['gap'] is None else format(solver['gap'], '.2%')}"
    if objective == "energy":
        return f"{solver['status']}, {gap}"
    return f"{solver['status']}, {seconds_text(solver['objective_s'])}, bound {seconds_text(solver['lower_bound_s'])}, {gap}"


def _forced(report: Mapping[str, Any]) -> list[str]:
    """The recipes a plan was restricted to."""
    return [name for name in (report.get("force"), report.get("places")) if name not in (None, "auto")]


_RESIDENCY = {
    "keep": "kept on the device",
    "offload_host": "copied to the host's memory and back",
    "offload_disk": "copied to disk and back",
    "recompute": "computed again in the backward pass",
    "drop": "dropped: nobody reads it again",
}
_POOLS = {"device": "on the device", "host": "in the host's memory", "disk": "on disk"}
_UPDATERS = {"device": "the device", "host": "the CPU"}
_NUM_OWNERS = 5


def memory_tables(report: Mapping[str, Any]) -> list[Table]:
    """Where a plan keeps things, in words: pools, the peak's owners, results of the forward pass, parameters. Empty ones are left out."""
    predicted, limits = report["predicted"], report.get("limits", {})
    peaks = predicted["peak_bytes"] if isinstance(predicted["peak_bytes"], Mapping) else {}
    pools = [_pool_row(pool, num_bytes, limits.get(pool)) for pool, num_bytes in peaks.items() if num_bytes or pool in limits]
    owners = [{"name": row["name"], "bytes": row["bytes"]} for row in predicted.get("peak_owner", [])[:_NUM_OWNERS]]
    results = [{"results": _RESIDENCY[name], **row} for name, row in report.get("residency", {}).items() if row["count"]]
    tables = {
        "memory per device": pools,
        f"largest at the device's peak ({predicted.get('peak_at', '')})": owners,
        **_owners_elsewhere(predicted),
        "what becomes of the forward pass's results": results,
        "parameters and optimizer state": [state_row(text, row) for text, row in report.get("state", {}).items()],
    }
    return [rows_table(title, rows) for title, rows in tables.items() if rows]


def _owners_elsewhere(predicted: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title and rows of what is largest in each pool behind the device."""
    owners, at = predicted.get("pool_owner", {}), predicted.get("pool_at", {})
    return {f"largest at the {pool}'s peak ({at.get(pool, '')})": rows[:_NUM_OWNERS] for pool, rows in owners.items()}


def _pool_row(pool: str, num_bytes: int, limit: float | None) -> dict[str, Any]:
    used = "-" if not limit else f"{num_bytes / limit:.1%}"
    return {"pool": pool, "predicted peak bytes": num_bytes, "limit bytes": limit, "used": used}


def state_row(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """"param device, state disk, update device" in columns."""
    where = dict(part.split(" ", 1) for part in text.split(", "))
    words = {"parameters": _POOLS[where["param"]], "optimizer state": _POOLS[where["state"]], "updated by": _UPDATERS[where["update"]]}
    return {**words, "count": row["count"], "bytes": row["bytes"]}


def residency_text(residency: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes per choice in one line: "keep 12 MiB, recompute 3 MiB"."""
    return ", ".join(f"{name} {bytes_text(row['bytes'])}" for name, row in residency.items() if row["count"])


def state_text(state: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes of parameters and state off the device in one line; "on the device" where there are none."""
    away = {text: row for text, row in state.items() if text != "param device, state device, update device"}
    return "; ".join(f"{text}: {bytes_text(row['bytes'])}" for text, row in away.items()) or "on the device"


def clusters_table(clusters: Sequence[Cluster]) -> Table:
    """The shipped clusters; rates are nominal, GB/s within a node / between nodes."""
    rows = [
        {
            "name": c.name,
            "devices": f"{c.num_devices} {c.device.name}",
            "usable bytes": c.device.usable_bytes,
            "bf16 FLOP/s": rate_text(c.device.flops_per_s("bfloat16")),
            "memory B/s": rate_text(c.device.memory_bandwidth_bytes_per_s),
            "links B/s": f"{rate_text(c.intra_node.bandwidth_bytes_per_s)}/ {rate_text(c.inter_node.bandwidth_bytes_per_s)}",
            "host bytes": c.host.memory_bytes,
        }
        for c in clusters
    ]
    return rows_table("clusters (per node; links within / between nodes)", rows)


def cluster_row(c: Cluster) -> dict[str, Any]:
    """One entry of `opweave clusters --json`; the rates are the nominal ones."""
    return {
        "name": c.name,
        "num_nodes": c.num_nodes,
        "num_devices": c.num_devices,
        "device": c.device.name,
        "usable_bytes": c.device.usable_bytes,
        "bfloat16_flops_per_s": c.device.flops_per_s("bfloat16"),
        "memory_bandwidth_bytes_per_s": c.device.memory_bandwidth_bytes_per_s,
        "power_w": c.device.power_w,
        "price_per_node_hour": c.price_per_node_hour,
        "intra_node_bytes_per_s": c.intra_node.bandwidth_bytes_per_s,
        "inter_node_bytes_per_s": c.inter_node.bandwidth_bytes_per_s,
        "host_bytes": c.host.memory_bytes,
    }


def cluster_table(cluster: Cluster) -> Table:
    """Every constant of one cluster with its source."""
    rows = [{"constant": name, "value": f"{value:.6g}", "source": source} for name, value, source in constants(cluster)]
    return rows_table(f"{cluster.name}: {cluster.num_nodes} x {cluster.devices_per_node} {cluster.device.name}", rows)
