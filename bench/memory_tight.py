"""A step that needs 4 times the memory it gets, in a process the system does not let have more.

    python -m bench.memory_tight CASE.json     one run, made by `rows`; prints a row

Three processes make the same steps on the same batch: without a limit; within it, everything on the device (which has to die); and within
it, by a plan for a quarter of the memory. The limit is RLIMIT_DATA (anonymous writable memory): what the process had before the model was
made, the plan's limit, and SLACK_BYTES for the capture of the model, the threads of the copies and their stacks.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import opweave as ow
from opweave import zoo_modules
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.cost_model.cluster import Cluster
from opweave.runtime.resident import return_freed_memory

SHARE = 0.25
SLACK_BYTES = 100 * 2**20
GOAL = 1.25
WIDTH, DEPTH, NUM_CLASSES, BATCH_SIZE = 1024, 24, 256, 1024
STEPS = 5
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process. memory_limit_bytes: of the plan and, with SLACK_BYTES, of the process; 0: none."""

    plan: str
    cluster: str
    disk_path: str
    memory_limit_bytes: int = 0


def load() -> tuple[torch.nn.Module, Any]:
    """The model and its batch, the same each time."""
    torch.manual_seed(0)
    model = zoo_modules.Mlp(width=WIDTH, depth=DEPTH, num_classes=NUM_CLASSES)
    return model, model.make_batch(BATCH_SIZE, WIDTH)


def work(run: Run) -> Row:
    """Train some steps within the limit; what they took."""
    torch.set_num_threads(1)
    return_freed_memory()  # what is freed counts no more: the limit is on what is used
    _capture_small()
    if run.memory_limit_bytes:
        most = _data_bytes() + run.memory_limit_bytes + SLACK_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    model, batch = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cluster = Cluster.load(run.cluster)
    step = ow.compile(model, cluster, optimizer=optimizer, plan=run.plan, disk_path=run.disk_path, keep_model=False)
    losses, seconds = [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        losses.append(float(step(batch)))
        seconds.append(time.perf_counter() - begin)
    assert step.executor is not None and step.executor.memory is not None
    traffic = step.executor.traffic
    return {
        "losses": losses, "step_time_s": statistics.median(seconds[1:]), "peak_bytes": step.executor.memory.pools,
        "offloaded_bytes": traffic.offloaded_bytes, "fetched_bytes": traffic.fetched_bytes,
        "data_bytes": _data_bytes(), "largest_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def _capture_small() -> None:
    """Loads what torch imports when a model is first captured, and what a first product sets up: no part of the limit."""
    model = zoo_modules.Mlp(width=8, depth=1, num_classes=8)
    analyse(capture(model, model.make_batch(8, 8), optimizer=torch.optim.AdamW(model.parameters())))
    torch.ones(256, 256).mm(torch.ones(256, 256))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def rows(cluster: Cluster, disk_path: str) -> list[Row]:
    """The three runs, in processes of their own, and how long the limited one took against what it had to do."""
    model, batch = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    whole = ow.plan(model, cluster, batch, optimizer=optimizer, places="keep")
    limit_bytes = int(SHARE * whole.predicted["peak_bytes"]["device"])
    tight = ow.plan(model, cluster, batch, optimizer=optimizer, memory_limit={"device": limit_bytes, "disk": 10**11})
    with tempfile.TemporaryDirectory() as folder:
        names = {name: str(Path(folder) / f"{name}.json") for name in ("cluster", "whole", "tight")}
        cluster.save(names["cluster"])
        whole.save(names["whole"])
        tight.save(names["tight"])
        common = {"cluster": names["cluster"], "disk_path": disk_path}
        found = {
            "unlimited": _started(Run(plan=names["whole"], **common)),
            "limited, everything on the device": _started(Run(plan=names["whole"], memory_limit_bytes=limit_bytes, **common)),
            "limited": _started(Run(plan=names["tight"], memory_limit_bytes=limit_bytes, **common)),
        }
    return [_row(found, whole, tight, limit_bytes, cluster)]


def _started(run: Run) -> Row:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as case:
        json.dump(asdict(run), case)
        case.flush()
        command = [sys.executable, "-m", "bench.memory_tight", case.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"died": lines[-1] if lines else f"status {done.returncode}"}


def _row(found: dict[str, Row], whole: ow.Plan, tight: ow.Plan, limit_bytes: int, cluster: Cluster) -> Row:
    plain, killed, limited = found.values()
    assert cluster.disk is not None
    row = {
        "model": f"mlp {WIDTH} x {DEPTH}", "batch_size": BATCH_SIZE, "limit_bytes": limit_bytes,
        "whole_bytes": whole.predicted["peak_bytes"]["device"], "slack_bytes": SLACK_BYTES, "runs": found,
        "predicted": {"unlimited_s": whole.predicted["step_time_s"], "limited_s": tight.predicted["step_time_s"]},
        "disk_bytes_per_s": {"read": cluster.disk.read.rate_bytes_per_s, "write": cluster.disk.write.rate_bytes_per_s},
        "dies_without_tiers": out_of_memory(killed.get("died", "")),
    }  # fmt: skip
    if "died" in plain or "died" in limited:
        return row | {"holds": False}
    read_s = limited["fetched_bytes"] / cluster.disk.read.rate_bytes_per_s
    disk_s = read_s + limited["offloaded_bytes"] / cluster.disk.write.rate_bytes_per_s
    ratio = limited["step_time_s"] / max(plain["step_time_s"], disk_s)
    same = plain["losses"] == limited["losses"]
    return row | {
        "compute_s": plain["step_time_s"], "disk_s": disk_s, "step_time_s": limited["step_time_s"], "ratio": ratio, "same_losses": same,
        "holds": same and row["dies_without_tiers"] and ratio <= GOAL,
    }  # fmt: skip


def out_of_memory(last_line: str) -> bool:
    """Whether a process died for memory."""
    return "MemoryError" in last_line or "can't allocate memory" in last_line or "Cannot allocate memory" in last_line


def summary(found: Sequence[Row]) -> Row:
    """Of the one row."""
    keys = ("dies_without_tiers", "same_losses", "ratio")
    return {key: found[0].get(key) for key in keys} | {"goal": GOAL, "holds": all(row["holds"] for row in found)}


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| model | needs, MB | limit, MB | compute, s | disk, s | step, s | ratio | same losses |", "|---" * 8 + "|"]
    for row in found:
        times = [f"{row[key]:.3f}" if key in row else "died" for key in ("compute_s", "disk_s", "step_time_s", "ratio")]
        lines.append(
            f"| {row['model']} | {row['whole_bytes'] / 1e6:.0f} | {row['limit_bytes'] / 1e6:.0f} | {' | '.join(times)} | "
            f"{row.get('same_losses')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(work(Run(**json.loads(Path(sys.argv[1]).read_text())))))
