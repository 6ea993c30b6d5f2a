"""Predicted step times under memory limits: opweave against the recipes of others, and against unlimited memory.

Nothing runs here; every row is planned, both sides by one cost model (see `bench.memory`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from opweave import zoo
from opweave.compiler.analyse import Analysis, analyse
from opweave.compiler.capture import capture
from opweave.compiler.choices import build_choices
from opweave.compiler.limits import memory_limits
from opweave.compiler.plan import Plan
from opweave.compiler.planner import GAP, DoesNotFitError, plan_step
from opweave.compiler.pricing import Pricer
from opweave.compiler.solver import solve
from opweave.cost_model.cluster import Cluster
from opweave.cost_model.transfers import transfer_coefficients

from .memory_bound import least_seconds

# model → global batch (samples, and length or image side)
MODELS: dict[str, tuple[int, int]] = {
    "bert-large": (32, 512),
    "resnet-50": (256, 224),
    "opt-1.3b": (8, 1024),
    "opt-6.7b": (8, 1024),
    "llama-8b": (8, 1024),
    "mixtral-8x7b": (8, 1024),
}
CLUSTERS = ("a100-40gb", "dgx-a100-640", "dgx-v100")
SHARES = (0.8, 0.5, 0.3)
"""Device limits, as shares of what the plan that keeps everything needs, or of the device where that is less."""

# recipe → (forced sharding, forced places)
RECIPES: dict[str, tuple[str | None, str]] = {
    "checkpoint": (None, "checkpoint"),
    "selective:0.3": (None, "selective:0.3"),
    "selective:0.6": (None, "selective:0.6"),
    "offload-optimizer": (None, "offload-optimizer"),
    "offload-all": (None, "offload-all"),
    "zero3": ("zero3", "keep"),
}
EFFICIENCY = (("opt-30b", "a100-40gb"), ("opt-66b", "dgx-a100-640"), ("mixtral-8x7b", "dgx-a100-640"))
BATCH_SIZES = (4, 8, 16, 32)
HOST_BYTES = 512 * 2**30
PLANNING_GOAL_S = 60.0
TIME_LIMIT_S = 20.0
PROVEN_GAP = 0.01
_UNLIMITED = 1e15
Row = dict[str, Any]
Progress = Callable[[str], None]


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def autocast_of(cluster: Cluster) -> torch.dtype | None:
    """bfloat16 where the device is faster in it, as anybody trains there; else none."""
    peak = cluster.device.peak_flops
    return torch.bfloat16 if peak.get("bfloat16", 0.0) > peak["float32"] else None


def analysed(name: str, batch_size: tuple[int, int], autocast: torch.dtype | None) -> Analysis:
    """A zoo model's step with AdamW."""
    model, batch = zoo.load(name, batch_size)
    return analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()), autocast=autocast))


def _planned(analysis: Analysis, cluster: Cluster, limit: Any, force: str | None = None, places: str = "auto") -> Plan | None:
    """A plan on all devices as one mesh axis; None where nothing fits or the recipe does not apply."""
    mesh = (cluster.num_devices,)
    try:
        return plan_step(analysis, cluster, mesh=mesh, force=force, memory_limit=limit, places=places, time_limit_s=TIME_LIMIT_S)
    except DoesNotFitError:
        return None
    except ValueError:
        if force is None:
            raise
        return None  # the batch cannot be split so


# -- the frontier ---------------------------------------------------------------------------------------------------------


def frontier(models: Iterable[str], clusters: Iterable[str], kept: list[Row], save: Callable[[list[Row]], None]) -> list[Row]:
    """Rows of models x clusters x limits; those in `kept` are not planned again. Each is saved when found."""
    rows = {(row["model"], row["cluster"], row["share"]): row for row in kept if "row_cpu_s" in row}
    for name in models:
        for cluster in map(Cluster.resolve, clusters):
            left = [share for share in SHARES if (name, cluster.name, share) not in rows]
            if not left:
                continue
            analysis = analysed(name, MODELS[name], autocast_of(cluster))
            unlimited = _planned(analysis, cluster, {"device": _UNLIMITED}, places="keep")
            assert unlimited is not None, f"{name} has no plan at all"
            base = min(unlimited.predicted["peak_bytes"]["device"], cluster.device.usable_bytes)
            for share in left:
                row = _frontier_row(analysis, cluster, name, share, int(share * base), unlimited.predicted["step_time_s"])
                rows[name, cluster.name, share] = row
                _use_less(row, [rows[name, cluster.name, more] for more in SHARES if more > share and (name, cluster.name, more) in rows])
                save(list(rows.values()))
                say(f"{name} on {cluster.name} at {share:g}: ours / best recipe = {row['ratio']} ({row['best_recipe']})")
    return list(rows.values())


def _frontier_row(analysis: Analysis, cluster: Cluster, name: str, share: float, limit_bytes: int, unlimited_s: float) -> Row:
    limit = {"device": limit_bytes}
    started, cpu = time.perf_counter(), time.process_time()
    ours = _planned(analysis, cluster, limit)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    plans = {recipe: _planned(analysis, cluster, limit, *options) for recipe, options in RECIPES.items()}
    recipes = {recipe: _times(plan) for recipe, plan in plans.items() if plan is not None}
    row = {
        "model": name, "batch": list(MODELS[name]), "cluster": cluster.name, "share": share, "limit_bytes": limit_bytes,
        "unlimited_s": unlimited_s, "ours": _times(ours) if ours else None, "made_for_bytes": limit_bytes,
        "gap": ours.solver["gap"] if ours else None, "planning_s": seconds, "planning_cpu_s": cpu_s,
        "residency": ours.residency if ours else {}, "state": ours.state if ours else {}, "recipes": recipes,
    }  # fmt: skip
    return _compared(row) | {"row_cpu_s": time.process_time() - cpu}


def _compared(row: Row) -> Row:
    """With ours beside the fastest recipe, by the simulated step."""
    recipes, mine = row["recipes"], row["ours"]
    best = min(recipes, key=lambda recipe: recipes[recipe]["predicted_s"]) if recipes else None
    ratio = mine["predicted_s"] / recipes[best]["predicted_s"] if mine and best else None
    return row | {"best_recipe": best, "ratio": ratio, "holds": best is None or (ratio is not None and ratio <= 1 + GAP)}


def _use_less(row: Row, larger: Iterable[Row]) -> None:
    """What was made for less memory serves where there is more, if it is faster: as `opweave frontier` does."""
    for other in larger:
        if row["ours"] and (not other["ours"] or row["ours"]["predicted_s"] < other["ours"]["predicted_s"]):
            other.update({key: row[key] for key in ("ours", "made_for_bytes", "residency", "state", "gap")})
            other.update(_compared(other))


def _times(plan: Plan) -> dict[str, float]:
    """objective_s: what the solver minimised; predicted_s: what the plan says, of its program; peak_bytes: on the device."""
    return {
        "objective_s": plan.solver["objective_s"],
        "predicted_s": plan.predicted["step_time_s"],
        "peak_bytes": plan.predicted["peak_bytes"]["device"],
    }


def frontier_summary(rows: Sequence[Row]) -> Row:
    """Ratios of ours to the best recipe, and where a recipe is faster or the frontier is not monotone."""
    ratios = sorted(row["ratio"] for row in rows if row["ratio"] is not None)
    return {
        "num_rows": len(rows),
        "num_fit_only_ours": sum(row["ours"] is not None and not row["recipes"] for row in rows),
        "median_ratio": ratios[len(ratios) // 2] if ratios else None,
        "least_ratio": ratios[0] if ratios else None,
        "most_ratio": ratios[-1] if ratios else None,
        "violations": [_where(row) for row in rows if not row["holds"]],
        "not_monotone": _not_monotone(rows),
        "holds": all(row["holds"] for row in rows) and not _not_monotone(rows),
    }


def _not_monotone(rows: Sequence[Row]) -> list[str]:
    out = []
    for row in rows:
        larger = [r for r in rows if (r["model"], r["cluster"]) == (row["model"], row["cluster"]) and r["share"] > row["share"]]
        if row["ours"] and any(not r["ours"] or r["ours"]["predicted_s"] > row["ours"]["predicted_s"] * (1 + GAP) for r in larger):
            out.append(_where(row))
    return out


def _where(row: Row) -> str:
    return f"{row['model']} on {row['cluster']} at {row['share']:g}"


def frontier_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | cluster | device limit, GiB | ours, ms | " + " | ".join(RECIPES) + " |",
        "|---" * (4 + len(RECIPES)) + "|",
    ]
    for row in rows:
        mine = row["ours"]["predicted_s"] if row["ours"] else None
        cells = [row["model"], row["cluster"], f"{row['limit_bytes'] / 2**30:.1f}", f"{mine * 1e3:.4g}" if mine else "does not fit"]
        for recipe in RECIPES:
            other = row["recipes"].get(recipe)
            cells.append(f"{mine / other['predicted_s']:.3f}" if mine and other else "—")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -- efficiency -----------------------------------------------------------------------------------------------------------


def with_host(cluster: Cluster) -> Cluster:
    """A single GPU gets a host of 512 GiB; a DGX has its own."""
    return replace(cluster, host=replace(cluster.host, memory_bytes=HOST_BYTES)) if cluster.num_devices == 1 else cluster


def efficiency(cases: Iterable[tuple[str, str]], kept: list[Row], save: Callable[[list[Row]], None]) -> list[Row]:
    """Rows of cases x batch sizes; those in `kept` are not planned again."""
    rows = {(row["model"], row["cluster"], row["batch"][0]): row for row in kept}
    for name, cluster_name in cases:
        cluster = with_host(Cluster.resolve(cluster_name))
        for size in BATCH_SIZES:
            if (name, cluster.name, size) in rows:
                continue
            row = rows[name, cluster.name, size] = _efficiency_row(name, cluster, size)
            save(list(rows.values()))
            say(f"{name} on {cluster.name}, batch {size}: efficiency {row['efficiency']}, bound {row['bound_efficiency']:.3f}")
    return list(rows.values())


def _efficiency_row(name: str, cluster: Cluster, size: int) -> Row:
    batch = (size, zoo.row(name).batch[1])
    analysis = analysed(name, batch, autocast_of(cluster))
    unlimited = _planned(analysis, cluster, {"device": _UNLIMITED}, places="keep")
    assert unlimited is not None, f"{name} has no plan at all"
    started, cpu = time.perf_counter(), time.process_time()
    ours = _planned(analysis, cluster, None)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    # A plan for less memory is one for all of it, too.
    full_s = min(plan.predicted["step_time_s"] for plan in (unlimited, ours) if plan)
    elements = zoo.row(name).num_parameters / cluster.num_devices
    bound = least_seconds(elements, full_s, cluster.device.usable_bytes, cluster.host_bytes_per_device, cluster)
    assert bound is not None, f"{name} does not fit on {cluster.name}"
    return {
        "model": name, "batch": list(batch), "cluster": cluster.name, "host_bytes": cluster.host.memory_bytes, "unlimited_s": full_s,
        "unlimited_bytes": unlimited.predicted["peak_bytes"]["device"], "ours": _times(ours) if ours else None,
        "efficiency": full_s / ours.predicted["step_time_s"] if ours else None,
        "efficiency_objective": unlimited.solver["objective_s"] / ours.solver["objective_s"] if ours else None,
        "streams_s": ours.predicted["streams"] if ours else {}, "exposed_s": ours.predicted["exposed"] if ours else {},
        "peak_bytes": ours.predicted["peak_bytes"] if ours else {}, "moved_bytes": _moved(ours, cluster) if ours else {},
        "gap": ours.solver["gap"] if ours else None, "residency": ours.residency if ours else {}, "state": ours.state if ours else {},
        "bound": asdict(bound), "bound_efficiency": full_s / bound.seconds, "proven_s": proven_s(analysis, cluster),
        "planning_s": seconds, "planning_cpu_s": cpu_s, "planned_in_time": cpu_s <= PLANNING_GOAL_S,
    }  # fmt: skip


def proven_s(analysis: Analysis, cluster: Cluster) -> float:
    """A bound on the objective of every plan on one mesh axis: the solver's, of the problem that leaves no room for copies to queue."""
    graph = build_choices(analysis.step, analysis.factors, (cluster.num_devices,))
    problem = Pricer(graph, cluster, memory_limits(None, cluster), places=True).price().problem
    return solve(problem, time_limit_s=TIME_LIMIT_S, gap=PROVEN_GAP).lower_bound


def _moved(plan: Plan, cluster: Cluster) -> dict[str, float]:
    """Bytes over the link per direction, from the seconds it is busy."""
    streams = plan.predicted["streams"]
    return {way: streams.get(way, 0.0) / transfer_coefficients(way, cluster)[1] for way in ("host_to_device", "device_to_host")}


def efficiency_table(rows: Sequence[Row]) -> str:
    """Markdown. Bytes are per device and step, of the plan and of the bound."""
    lines = [
        "| model | cluster | batch | unlimited, s | ours, s | efficiency | bound of the solver | bound of arithmetic | what binds there | "
        "computing, s | to device, GB | to host, GB | CPU update, s | host memory, GB | planned in, s of CPU |",
        "|---" * 15 + "|",
    ]
    for row in rows:
        cells = [row["model"], row["cluster"], f"{row['batch'][0]} x {row['batch'][1]}", f"{row['unlimited_s']:.3g}"]
        cells += [f"{row['ours']['predicted_s']:.3g}", f"{row['efficiency']:.1%}"] if row["ours"] else ["does not fit", "—"]
        bound, streams = row["bound"], row["streams_s"]
        cells += [f"{row['unlimited_s'] / row['proven_s']:.1%}", f"{row['bound_efficiency']:.1%}", bound["binds"]]
        cells += [_beside(streams.get("compute"), bound["seconds_of"]["compute"], 1.0)]
        cells += [_beside(row["moved_bytes"].get("host_to_device"), bound["to_device_bytes"], 1e9)]
        cells += [_beside(row["moved_bytes"].get("device_to_host"), bound["to_host_bytes"], 1e9)]
        cells += [_beside(streams.get("cpu", 0.0), bound["seconds_of"]["CPU update"], 1.0)]
        cells += [_beside(row["peak_bytes"].get("host"), bound["host_bytes"], 1e9), f"{row['planning_cpu_s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _beside(ours: float | None, bound: float, unit: float) -> str:
    """"ours (bound)"."""
    return f"{'—' if ours is None else format(ours / unit, '.3g')} ({bound / unit:.3g})"
