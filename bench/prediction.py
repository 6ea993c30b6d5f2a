"""Predicted against measured step time: models x plans on the ranks of this machine, each plan's simulation beside its run.

    python -m bench.prediction --json [--ranks 1,2,4] [--models opt,resnet] [-o bench/results/prediction.json] [--plot docs/prediction.png]
                               [--clusters FOLDER]

For each number of ranks the runner starts `torchrun` with gloo and one thread per rank; the job calibrates (unless --clusters has its
file already), then trains. With one rank the plans are the model at three batch sizes. With several they are forced ones, the solver's
with the calibrated prices ("auto"), and the solver's with the datasheet constants of the shipped cluster "cpu" ("datasheet").

FOLDER keeps the cluster files, for planning and for later runs, and the rows of the numbers of ranks that are done until the result is
written: a run that was interrupted goes on from there when the same command is given again.

predicted_s: the simulation of the lowered program with the calibrated prices. measured_s: lower quintile over rounds of the slowest
rank's step, for other programs only ever add. A round goes over all plans of all models, so that the rounds of a plan lie half a minute
apart: a guest on a shared host is now and then 10 to 40 % slower for seconds or minutes.
The plans of a model take turns in one process group, so that what else the machine does meets all alike; before its timed steps a plan
takes one untimed step, which puts its own data into the caches. Several timed steps follow: where ranks share cores the first ones still
depend on the plan before (with one, plans behind ZeRO-3 were 5 to 15 % slower on 4 ranks of 2 cores, in whichever order they were taken).
`prediction_summary` says what is made of the rows.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import opweave as ow
from opweave import calibration
from opweave.compiler.analyse import Analysis, analyse
from opweave.compiler.capture import capture
from opweave.compiler.plan import Plan
from opweave.compiler.planner import plan_step
from opweave.compiler.timeline import timeline
from opweave.compiler.training_step import StepOptions, TrainingStep, plan_text
from opweave.cost_model.calibrate import Options
from opweave.cost_model.cluster import Cluster
from opweave.host_memory import keep_freed_memory
from opweave.runtime.groups import on_first_rank

from . import prediction_models
from .prediction_summary import Row, holds, markdown, plot, summary, table

FORCED = ("ddp", "zero3", "megatron")
ROUNDS, STEPS_PER_ROUND = 7, 3
PLANNING_S = 10.0


# -- in the job's processes ---------------------------------------------------------------------------------------------------------


def rows_of(models: Sequence[str], cluster: Cluster) -> list[Row]:
    """All plans of these models on this job's ranks. All ranks call it."""
    plans = [(name, _single(name, cluster) if cluster.num_devices == 1 else _plans(name, cluster)) for name in models]
    times = take_turns([[(step, batch) for _, step, batch in steps] for _, steps in plans])
    return [row for (name, steps), found in zip(plans, times, strict=True) for row in _rows(name, steps, found, cluster)]


def _rows(name: str, steps: Sequence[tuple[str, TrainingStep, Any]], times: Sequence[Sequence[float]], cluster: Cluster) -> Iterator[Row]:
    seen: dict[str, str] = {}
    for (plan, step, _), found in zip(steps, times, strict=True):
        assert step.program is not None and step.plan is not None
        same = seen.setdefault(plan_text(step.plan), plan) if cluster.num_devices > 1 else plan
        yield Row(
            model=name, plan=plan, ranks=cluster.num_devices, measured_s=_quintile(found),
            predicted_s=timeline(step.program, cluster).simulate().step_time_s, planned_s=step.plan.predicted["step_time_s"],
            mesh="x".join(map(str, step.plan.mesh)), same_as=None if same == plan else same, rounds_s=_of_rounds(found),
        )  # fmt: skip


def _quintile(times: Sequence[float]) -> float:
    return sorted(times)[len(times) // 5]


def _of_rounds(times: Sequence[float]) -> list[float]:
    return [statistics.median(times[i : i + STEPS_PER_ROUND]) for i in range(0, len(times), STEPS_PER_ROUND)]


def _single(name: str, cluster: Cluster) -> list[tuple[str, TrainingStep, Any]]:
    """Three batch sizes."""
    usual = prediction_models.BY_NAME[name].batch_size
    found = []
    for size in (usual // 2, usual, 2 * usual):
        model, batch = prediction_models.load(name, size)
        found.append((f"batch {size}", ow.compile(model, cluster, optimizer=_optimizer(model)).prepare(batch), batch))
    return found


def _plans(name: str, cluster: Cluster) -> list[tuple[str, TrainingStep, Any]]:
    """All plans of one captured step, each on a model of its own. Rank 0 makes them."""
    model, batch = prediction_models.load(name)
    analysis = analyse(capture(model, batch, optimizer=_optimizer(model)))
    datasheet = Cluster.preset("cpu", devices=cluster.num_devices)
    wanted = [*((force, cluster, force) for force in FORCED), ("auto", cluster, None), ("datasheet", datasheet, None)]

    def make() -> list[dict[str, Any]]:
        return [plan_step(analysis, where, force=force, time_limit_s=PLANNING_S).to_dict() for _, where, force in wanted]

    plans = [Plan.from_dict(data) for data in on_first_rank(make)]
    return [(label, _installed(name, where, analysis, plan, batch), batch) for (label, where, _), plan in zip(wanted, plans, strict=True)]


def _installed(name: str, cluster: Cluster, analysis: Analysis, plan: Plan, batch: Any) -> TrainingStep:
    model, _ = prediction_models.load(name)
    options = StepOptions(optimizer=_optimizer(model))
    return TrainingStep(model, cluster, options, lambda step, _: step.install(analysis, plan)).prepare(batch)


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def take_turns(
    groups: Sequence[Sequence[tuple[TrainingStep, Any]]], rounds: int = ROUNDS, steps_per_round: int = STEPS_PER_ROUND
) -> list[list[list[float]]]:
    """Seconds of every timed step, the slowest rank's, by group and plan. All ranks call it. A round goes over all groups."""
    for step, batch in itertools.chain(*groups):
        step(batch)
    gc.collect()
    mine: list[list[list[float]]] = [[[] for _ in group] for group in groups]
    for _ in range(rounds):
        for (step, batch), times in zip(itertools.chain(*groups), itertools.chain(*mine), strict=True):
            step(batch)
            for _ in range(steps_per_round):
                _barrier()
                begin = time.perf_counter()
                step(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
    by_group = zip(*_from_all(mine), strict=True)
    return [[[max(ranks) for ranks in zip(*by_rank, strict=True)] for by_rank in zip(*group, strict=True)] for group in by_group]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _from_all(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def work(models: Sequence[str], cluster_file: Path, rows_file: Path) -> None:
    """What each process of the job does: calibrate where there is no cluster file, then train; rank 0 adds the rows of every model."""
    torch.set_num_threads(1)
    keep_freed_memory()
    leads = calibration.join_job() == 0
    if not cluster_file.exists():
        calibration.calibrate_here(cluster_file, Options(dtypes=(torch.float32,)))
    _barrier()
    cluster = Cluster.load(cluster_file)
    # Models that fill a GPU would not fit together, and nobody else is on it.
    for together in [[name] for name in models] if torch.cuda.is_available() else [models]:
        rows = rows_of(together, cluster)
        gc.collect()
        if leads:
            done = [asdict(row) for row in (*finished_rows(rows_file), *rows)]
            rows_file.write_text(json.dumps({"commit": environment()["commit"], "rows": done}))
    if dist.is_initialized():
        dist.destroy_process_group()


# -- the runner ---------------------------------------------------------------------------------------------------------------------


def torchrun(ranks: int, *command: str) -> None:
    """Run a module on so many processes, one thread each; what they print goes to stderr. Raises CalledProcessError."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", *command]
    subprocess.run(launch, check=True, env=environment, stdout=sys.stderr)


def run(ranks: int, models: Sequence[str], clusters: Path) -> list[Row]:
    """The rows of one number of ranks, those that an interrupted run has left in the folder among them; `forget` them when all is done."""
    file = clusters / f"rows-{ranks}.json"
    done = {row.model for row in finished_rows(file)}
    left = [name for name in models if name not in done]
    if left:
        cluster = clusters / f"cluster-{ranks}.json"
        torchrun(ranks, "bench.prediction", "--work", str(cluster), "--rows", str(file), "--models", ",".join(left))
    return [row for row in finished_rows(file) if row.model in models]


def finished_rows(file: Path) -> list[Row]:
    """What a run of this commit has measured so far."""
    data = json.loads(file.read_text()) if file.exists() else {}
    return [Row(**row) for row in data["rows"]] if data.get("commit") == environment()["commit"] else []


def forget(clusters: Path) -> None:
    """Remove finished rows, once they are in a result."""
    for file in clusters.glob("rows-*.json"):
        file.unlink()


def environment() -> dict[str, Any]:
    """What a result needs to be read later: machine, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def merged(rows: Iterable[Row], path: Path | None) -> list[Row]:
    """With those of an earlier result file that were not measured again."""
    new = list(rows)
    done = {(row.model, row.ranks) for row in new}
    old = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path is not None and path.exists() else []
    return [row for row in old if (row.model, row.ranks) not in done] + new


def main() -> int:
    """Command line. Exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--models", default=",".join(prediction_models.NAMES))
    parser.add_argument("--clusters", type=Path, help="folder of calibrated cluster files, cluster-RANKS.json, made where missing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="result file; rows of other models and ranks in it are kept")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    models = [name for name in args.models.split(",") if name]
    if args.work is not None:
        work(models, args.work, args.rows)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        clusters = args.clusters or Path(folder)
        clusters.mkdir(parents=True, exist_ok=True)
        new = [row for ranks in args.ranks.split(",") if ranks for row in run(int(ranks), models, clusters)]
    rows = merged(new, args.output)
    result = {"environment": environment(), "summary": summary(rows), "rows": [asdict(row) for row in rows]}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.clusters is not None:
        forget(args.clusters)
    if args.plot is not None:
        plot(rows, args.plot)
    print(json.dumps(result) if args.json else f"{table(rows)}\n{json.dumps(result['summary'], indent=1)}\n{markdown(rows)}")
    return 0 if holds(result["summary"]) else 1


if __name__ == "__main__":
    sys.exit(main())
