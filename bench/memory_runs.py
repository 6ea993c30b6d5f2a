"""Real runs on this CPU with the disk tier: peaks against predictions, step times against recipes, training larger than memory.

See `bench.memory`, which runs this.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

import opweave as ow
from opweave import zoo
from opweave.compiler.planner import DoesNotFitError
from opweave.compiler.training_step import TrainingStep
from opweave.cost_model.cluster import Cluster, Disk, Link
from opweave.runtime.resident import measure_resident_peak, return_freed_memory
from opweave.runtime.tiers import TierOptions, TierStore, settle

from . import memory_tight, prediction_models

# model → batch large enough that what is predicted is not lost in small tensors, nor what is resident in what a process has beside tensors
PEAK_MODELS: dict[str, tuple[int, int]] = {
    "gpt2-tiny": (512, 64), "opt-tiny": (512, 64), "llama-tiny": (512, 64), "bert-tiny": (512, 64), "t5-tiny": (1024, 32),
    "vit-tiny": (4096, 32), "resnet-tiny": (1024, 64), "mobilenet-tiny": (256, 64), "mixtral-tiny": (1024, 32), "mlp-tiny": (262144, 64),
    "convnet-tiny": (2048, 32),
}  # fmt: skip
PEAK_SHARES = (0.9, 0.7, 0.5, 0.35)
TIME_MODELS = ("mlp", "gpt2", "resnet")
TIME_SHARES = (0.75, 0.5, 0.35)
TIME_RECIPES = ("checkpoint", "offload-all")
ROUNDS = 9
NOISE = 1.05
"""A ratio of medians up to this counts as equal: what else the machine does makes a few percent."""

MOST_OFF, MOST_BELOW = 0.05, 0.02
_LARGE_BYTES = 1 << 24  # less, and what the process does beside the step is most of what the system sees
_DISK_BYTES = 10**11
_PLAN_S = 10.0
Row = dict[str, Any]
Save = Callable[[list[Row]], Any]


# -- the machine ----------------------------------------------------------------------------------------------------------


def measured_disk(folder: str | None, num_bytes: int = 1 << 26, rounds: int = 5) -> Disk:
    """Rates of the disk tier as the runtime uses it: through the file system and its cache, checksums included."""
    store = TierStore(TierOptions(disk_path=folder))
    tensor = torch.ones(num_bytes // 4)
    write, read = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        parked = settle(store.offload(tensor, "disk"))
        middle = time.perf_counter()
        store.load(parked)
        write.append(middle - begin)
        read.append(time.perf_counter() - middle)
    store.close()
    rates = [num_bytes / statistics.median(times) for times in (read, write)]
    links = [Link(latency_s=1e-4, bandwidth_bytes_per_s=rate) for rate in rates]
    return Disk(capacity_bytes=_DISK_BYTES, read=links[0], write=links[1])


def this_machine(folder: str | None) -> Cluster:
    """One device on this machine, with its disk."""
    return replace(Cluster.detect(), disk=measured_disk(folder))


def prepared(
    load: Callable[[], tuple[Any, Any]], cluster: Cluster, limit: Any, folder: str | None, places: str = "auto"
) -> tuple[TrainingStep, Any]:
    """A planned step and its batch. Raises DoesNotFitError."""
    model, batch = load()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = ow.compile(model, cluster, optimizer=optimizer, memory_limit=limit, disk_path=folder, places=places, keep_model=False)
    step.options = replace(step.options, time_limit_s=_PLAN_S)
    return step.prepare(batch), batch


def whole_bytes(load: Callable[[], tuple[Any, Any]], cluster: Cluster) -> int:
    """Predicted peak of the plan that keeps everything."""
    model, batch = load()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return ow.plan(model, cluster, batch, optimizer=optimizer, places="keep").predicted["peak_bytes"]["device"]


# -- peaks ----------------------------------------------------------------------------------------------------------------


def peaks(folder: str | None, kept: list[Row], save: Save) -> list[Row]:
    """Predicted and measured peak bytes per pool: models x limits; those in `kept` are not run again.

    Each row in a process of its own: what other rows left in its memory would be taken up again, and so hide what this one takes.
    """

    def row(name: str, cluster: Cluster, limit_bytes: int) -> Row:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_row_alone, name, PEAK_MODELS[name], cluster, limit_bytes, folder).result()

    return _at_limits(tuple(PEAK_MODELS), PEAK_SHARES, lambda name: zoo.load(name, PEAK_MODELS[name]), row, folder, kept, save)


def _at_limits(
    names: Sequence[str], shares: Sequence[float], load: Callable[[str], Any], row: Callable[[str, Cluster, int], Row],
    folder: str | None, kept: list[Row], save: Save,
) -> list[Row]:  # fmt: skip
    """A row of each model at each share of what keeping everything needs; each is saved when found."""
    cluster = this_machine(folder)
    rows = {(r["model"], r["share"]): r for r in kept}
    for name in names:
        if all((name, share) in rows for share in shares):
            continue
        whole = whole_bytes(lambda name=name: load(name), cluster)
        for share in shares:
            rows[name, share] = row(name, cluster, int(share * whole)) | {"share": share}
            save(list(rows.values()))
    return list(rows.values())


def _peak_row_alone(name: str, size: tuple[int, int], cluster: Cluster, limit_bytes: int, folder: str | None) -> Row:
    return_freed_memory()  # so that what is resident follows what is allocated
    return peak_row(name, size, cluster, limit_bytes, folder)


def peak_row(name: str, size: tuple[int, int], cluster: Cluster, limit_bytes: int, folder: str | None) -> Row:
    """Three steps within a limit. errors: measured / predicted - 1 per pool; resident_error: the same of what the system sees in RAM."""
    row: Row = {"model": name, "batch": list(size), "limit_bytes": limit_bytes}
    limit = {"device": limit_bytes, "disk": _DISK_BYTES}
    try:
        step, batch = prepared(lambda: zoo.load(name, size), cluster, limit, folder)
    except DoesNotFitError:
        return row | {"fits": False, "holds": True}
    losses = [float(step(batch))]
    gc.collect()  # what planning left in reference cycles must not go while this is measured
    return_freed_memory()
    losses.append(float(step(batch)))
    return_freed_memory()  # what lies free between small blocks counts as the step's: it takes it again
    with measure_resident_peak() as resident:
        losses.append(float(step(batch)))
    assert step.executor is not None and step.executor.memory is not None
    memory = step.executor.memory
    predicted, measured = step.plan.predicted["peak_bytes"], memory.pools
    there_before = memory.stored_bytes + sum(t.nbytes for t in batch.values())
    pools = [pool for pool in measured if measured[pool] or predicted.get(pool)]
    errors = {pool: measured[pool] / predicted[pool] - 1 if predicted.get(pool) else float("inf") for pool in pools}
    traffic = step.executor.traffic
    step.executor.close()
    return row | {
        "fits": True, "predicted_bytes": {pool: predicted.get(pool, 0) for pool in pools},
        "measured_bytes": {pool: measured[pool] for pool in pools}, "errors": errors, "offloaded_bytes": traffic.offloaded_bytes,
        "fetched_bytes": traffic.fetched_bytes, "losses": losses, "resident_bytes": there_before + resident.grown_bytes,
        "resident_error": (there_before + resident.grown_bytes) / predicted["device"] - 1,
        "holds": measured["device"] <= limit_bytes and all(-MOST_OFF <= error <= MOST_BELOW for error in errors.values()),
    }  # fmt: skip


def peaks_summary(rows: Sequence[Row]) -> Row:
    """Largest errors, and whether each run stayed within its limit."""
    ran = [row for row in rows if row["fits"]]
    errors = [error for row in ran for error in row["errors"].values()]
    resident = [row["resident_error"] for row in ran if row["predicted_bytes"]["device"] >= _LARGE_BYTES]
    return {
        "num_rows": len(rows),
        "num_ran": len(ran),
        "num_models": len({row["model"] for row in ran}),
        "most_above_predicted": max(errors, default=None),
        "most_below_predicted": min(errors, default=None),
        "resident_errors_of_large": resident,
        "num_resident_within": sum(-MOST_OFF <= error <= MOST_BELOW for error in resident),
        "within_limit": all(row["measured_bytes"]["device"] <= row["limit_bytes"] for row in ran),
        "holds": all(row["holds"] for row in rows) and all(-MOST_OFF <= error <= MOST_BELOW for error in resident),
    }


def peaks_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| model | limit | predicted (device, disk) | measured (device, disk) | resident |", "|---|---|---|---|---|"]
    for row in rows:
        if row["fits"]:
            both = (row["predicted_bytes"], row["measured_bytes"])
            cells = [", ".join(f"{num_bytes.get(pool, 0):,}" for pool in ("device", "disk")) for num_bytes in both]
            cells.append(f"{row['resident_error']:+.1%}")
        else:
            cells = ["does not fit", "—", "—"]
        lines.append(f"| {row['model']} | {row['limit_bytes']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# -- times ----------------------------------------------------------------------------------------------------------------


def times(folder: str | None, kept: list[Row], save: Save) -> list[Row]:
    """Measured step times: models x limits, ours and the recipes taking turns; those in `kept` are not run again."""

    def row(name: str, cluster: Cluster, limit_bytes: int) -> Row:
        return time_row(name, cluster, limit_bytes, folder)

    return _at_limits(TIME_MODELS, TIME_SHARES, prediction_models.load, row, folder, kept, save)


def time_row(name: str, cluster: Cluster, limit_bytes: int, folder: str | None) -> Row:
    """Seconds per step, the median over rounds; ratios are of one round each, so that what else the machine does meets all alike."""
    limit = {"device": limit_bytes, "disk": _DISK_BYTES}
    steps: dict[str, tuple[TrainingStep, Any]] = {}
    for places in ("auto", *TIME_RECIPES):
        try:
            steps[places] = prepared(lambda: prediction_models.load(name), cluster, limit, folder, places)
        except DoesNotFitError:
            continue
    seconds = take_turns(steps)
    losses = {places: float(step(batch)) for places, (step, batch) in steps.items()}
    predicted = {places: step.plan.predicted["step_time_s"] for places, (step, _) in steps.items()}
    for step, _ in steps.values():
        assert step.executor is not None
        step.executor.close()
    ratios = {
        places: statistics.median(a / b for a, b in zip(seconds["auto"], seconds[places], strict=True))
        for places in steps
        if places != "auto" and "auto" in steps
    }
    return {
        "model": name, "limit_bytes": limit_bytes, "measured_s": {p: statistics.median(s) for p, s in seconds.items()},
        "predicted_s": predicted, "ratios": ratios, "same_loss": len(set(losses.values())) <= 1,
        "holds": len(set(losses.values())) <= 1 and ("auto" in steps or not steps) and all(r <= NOISE for r in ratios.values()),
    }  # fmt: skip


def take_turns(steps: dict[str, tuple[TrainingStep, Any]]) -> dict[str, list[float]]:
    """Seconds of each step in each round, the first two left out."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 2):
        for name, (step, batch) in steps.items():
            begin = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - begin)
    return {name: values[2:] for name, values in seconds.items()}


def times_summary(rows: Sequence[Row]) -> Row:
    """Ratios of ours to each recipe."""
    ratios = [ratio for row in rows for ratio in row["ratios"].values()]
    return {
        "num_rows": len(rows),
        "num_only_ours": sum(list(row["measured_s"]) == ["auto"] for row in rows),
        "most_ratio": max(ratios, default=None),
        "median_ratio": statistics.median(ratios) if ratios else None,
        "holds": all(row["holds"] for row in rows),
    }


def times_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| model | limit, MB | ours, ms | " + " | ".join(f"ours / {r}" for r in TIME_RECIPES) + " |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row['ratios'][r]:.3f}" if r in row["ratios"] else "does not fit" for r in TIME_RECIPES]
        ours = f"{row['measured_s']['auto'] * 1e3:.1f}" if "auto" in row["measured_s"] else "does not fit"
        lines.append(f"| {row['model']} | {row['limit_bytes'] / 1e6:.1f} | {ours} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tight(folder: str | None, kept: list[Row], save: Save) -> list[Row]:
    """The one row of `memory_tight`, anew each time."""
    return memory_tight.rows(this_machine(folder), folder or tempfile.gettempdir())


PARTS: dict[str, tuple[Callable[[str | None, list[Row], Save], list[Row]], Callable[[Sequence[Row]], Row]]] = {
    "peaks": (peaks, peaks_summary),
    "times": (times, times_summary),
    "tight": (tight, memory_tight.summary),
}
TABLES = {"peaks": peaks_table, "times": times_table, "tight": memory_tight.table}
