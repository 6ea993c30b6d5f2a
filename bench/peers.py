"""Step time and memory of opweave against what PyTorch ships: DDP, FSDP2 and tensor parallelism.

    python -m bench.peers --models opt,resnet,mlp --ranks 2 --json

For each model the runner starts `torchrun` with gloo on the loopback interface and one thread per rank. All peers train the same
model on the same global batches with the same fused AdamW:

    opweave       ow.compile, the plan the solver chooses
    ddp           DistributedDataParallel, gradients as views of their buckets
    fsdp2         torch.distributed.fsdp.fully_shard, one group per block
    tp            torch.distributed.tensor.parallel.parallelize_module, columns then rows
    ddp-local-bn  (models with batch norm) ddp as it comes: each rank normalises by its own part of the batch, which is another result

Time: the peers take one step each, in turn, round after round. A step's time is that of its slowest rank, a ratio is the median over
rounds of (opweave / peer) within a round, so that what else the machine does meets all alike. The ratio of processor time stands
beside it: it is steady on a busy machine, but does not see what waiting costs.

Memory: bytes that torch's CPU allocator has handed out since before the model was made, at their highest during the second and third
step (torch.profiler's record of every allocation and release), on the rank with most. It counts what would be on a GPU, and not the
interpreter, caches of the system or gloo's own buffers.

Results: the losses of the first steps must be those of the plain model in one process. A peer whose losses are not is marked, and is no
measure for the goal: opweave / fastest peer at most 1.05, peak memory at most that of the leanest peer + 5 %. A peer that cannot run
a model is a row with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .peers_models import CASES, OURS, PEERS, Batch, Case, NotApplicableError, Step, eager_step, peers_of, whole_batch

GOAL_TIME, GOAL_MEMORY = 1.05, 1.05
SAME_RESULT = 1e-3
"""Largest relative difference of the first losses from the plain model's.

Sums are in another order, 1e-7 in float32; AdamW's first steps have the size of the learning rate however small a gradient is, and a
ReLU next to zero may flip, which makes up to 2e-4 of it in three steps of the ResNet. Batch norm over a part of the batch makes 3e-3.
"""
CHECKED_STEPS = 3


# -- one rank ---------------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """On every rank: build each peer with its memory recorded, then take turns. Returns the same on every rank."""
    torch.manual_seed(1)
    batches = [case.make_batch(case.make()) for _ in range(CHECKED_STEPS)]
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name in peers_of(case):
        found[name] = {"seconds": [], "cpu_seconds": [], "losses": [], "peak_bytes": None, "reason": ""}
        try:
            steps[name] = _build(case, name, batches, found[name])
        except Exception as error:  # a peer that fails is a result
            found[name]["reason"] = str(error) if isinstance(error, NotApplicableError) else f"{type(error).__name__}: {error}"
        if any(_gathered(found[name]["reason"])):
            found[name]["reason"] = next(filter(None, _gathered(found[name]["reason"])))
            steps.pop(name, None)
    for r in range(rounds):
        for name, step in steps.items():
            seconds, cpu_seconds = _timed(step, batches[r % len(batches)])
            found[name]["seconds"].append(seconds)
            found[name]["cpu_seconds"].append(cpu_seconds)
    for name in steps:
        for key in ("seconds", "cpu_seconds"):
            found[name][key] = [max(times) for times in zip(*_gathered(found[name][key]), strict=True)]
        found[name]["peak_bytes"] = max(_gathered(found[name]["peak_bytes"]))
    result = {"model": case.name, "ranks": dist.get_world_size(), "peers": found, "reference": _reference(case, batches)}
    if OURS in steps:
        result["patterns"] = steps[OURS].plan.patterns  # type: ignore[attr-defined]
    return result


def _build(case: Case, name: str, batches: Sequence[Batch], found: dict[str, Any]) -> Step:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.manual_seed(0)
        step = PEERS[name](case, case.make(), batches[0])
        for i, batch in enumerate(batches):
            gc.collect()
            with torch.profiler.record_function(f"step {i}"):
                loss = step(batch)
            found["losses"].append(_mean_over_ranks(loss, name))
    found["peak_bytes"] = peak_of(profile)
    return step


def peak_of(profile: torch.profiler.profile) -> int:
    """Most bytes handed out at once during "step 1" and after, counted from the start of the record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return peak_of_events(json.loads(path.read_text())["traceEvents"])


def peak_of_events(events: Sequence[Mapping[str, Any]]) -> int:
    """See `peak_of`; events of a Chrome trace."""
    begin = min(e["ts"] for e in events if e.get("name") == "step 1" and e.get("ph") == "X")
    current = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        if event["ts"] >= begin:
            peak = max(peak, current)
        current += event["args"]["Bytes"]
    return max(peak, current)


def _mean_over_ranks(loss: torch.Tensor, name: str) -> float:
    """The loss of the global batch: peers that split the batch know their part's. (Outside of what is timed.)"""
    loss = loss.detach().clone()
    if name in ("ddp", "ddp-local-bn", "fsdp2"):
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def _timed(step: Step, batch: Batch) -> tuple[float, float]:
    """Seconds on the clock, and of processor time in all threads of this rank."""
    dist.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    step(batch).item()
    return time.perf_counter() - started, time.process_time() - cpu_started


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _reference(case: Case, batches: Sequence[Batch]) -> list[float]:
    torch.manual_seed(0)
    step = eager_step(case.make(), whole_batch)
    return [step(batch).item() for batch in batches]


def worker(args: argparse.Namespace) -> int:
    """One rank of one model; rank 0 writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    result = measure(CASES[args.worker], args.rounds)
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    return 0


# -- rows -------------------------------------------------------------------------------------------------------------------


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per peer: opweave's time and memory over the peer's. A ratio below 1 says opweave is faster or leaner.

    Raises ValueError where opweave itself did not run.
    """
    ours = result["peers"][OURS]
    if ours["reason"]:
        raise ValueError(f"opweave did not run {result['model']} on {result['ranks']} ranks: {ours['reason']}")
    rows = []
    for name, peer in result["peers"].items():
        if name == OURS:
            continue
        ran = not peer["reason"]
        difference = loss_difference(peer["losses"], result["reference"]) if ran else None
        rows.append(
            {
                "model": result["model"],
                "peer": name,
                "step_time_ratio": median_ratio(ours["seconds"], peer["seconds"]) if ran else None,
                "peak_memory_ratio": ours["peak_bytes"] / peer["peak_bytes"] if ran else None,
                "cpu_time_ratio": median_ratio(ours["cpu_seconds"], peer["cpu_seconds"]) if ran else None,
                "step_time_s": statistics.median(peer["seconds"]) if ran else None,
                "opweave_step_time_s": statistics.median(ours["seconds"]),
                "peak_bytes": peer["peak_bytes"],
                "opweave_peak_bytes": ours["peak_bytes"],
                "loss_difference": difference,
                "same_result": difference is not None and difference <= SAME_RESULT,
                "reason": peer["reason"],
            }
        )
    return rows


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per model opweave's time over that of the fastest peer with the same result, and its memory over that of the leanest."""
    out: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        peers = [row for row in rows if row["model"] == model and row["same_result"]]
        if not peers:
            out[model] = {"holds": False, "reason": "no peer ran with the same result"}
            continue
        fastest = max(peers, key=lambda row: row["step_time_ratio"])
        leanest = max(peers, key=lambda row: row["peak_memory_ratio"])
        out[model] = {
            "step_time_ratio": fastest["step_time_ratio"], "fastest": fastest["peer"],
            "peak_memory_ratio": leanest["peak_memory_ratio"], "leanest": leanest["peer"],
            "holds": fastest["step_time_ratio"] <= GOAL_TIME and leanest["peak_memory_ratio"] <= GOAL_MEMORY,
        }  # fmt: skip
    return out


# -- the runner -------------------------------------------------------------------------------------------------------------


def launch(model: str, ranks: int, rounds: int, timeout_s: float) -> dict[str, Any]:
    """Run one model under torchrun. Raises RuntimeError with the ranks' output where it fails."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "-m", "bench.peers", "--worker", model, "--rounds", str(rounds), "--out", str(out),
        ]  # fmt: skip
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if loopback:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
        try:
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            message = f"{model} on {ranks} ranks took more than {timeout_s:g} s; give fewer --rounds or a longer --timeout"
            raise RuntimeError(message) from error
        if done.returncode != 0 or not out.exists():
            raise RuntimeError(f"{model} on {ranks} ranks ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def about() -> dict[str, Any]:
    """Machine, versions and commit of a result."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(), "commit": commit or "unknown", "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip


def show(rows: Sequence[Mapping[str, Any]], goals: Mapping[str, Any]) -> None:
    """A table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="opweave / peer (below 1: opweave is faster, leaner)", title_justify="left")
    for name in ("model", "peer", "time", "CPU time", "memory", "step", "peak", "losses", "reason"):
        table.add_column(name, justify="left" if name in ("model", "peer", "reason") else "right")
    for row in rows:
        if row["reason"]:
            table.add_row(row["model"], row["peer"], *"------", row["reason"][:200])
            continue
        ratios = [f"{row[key]:.3f}" for key in ("step_time_ratio", "cpu_time_ratio", "peak_memory_ratio")]
        sizes = [f"{row['step_time_s'] * 1e3:.0f} ms", f"{row['peak_bytes'] / 2**20:.0f} MiB", f"{row['loss_difference']:.1e}"]
        table.add_row(row["model"], row["peer"], *ratios, *sizes, "" if row["same_result"] else "another result")
    console.print(table)
    for model, goal in goals.items():
        if "fastest" not in goal:
            console.print(f"{model}: {goal['reason']}")
            continue
        console.print(
            f"{model}: {goal['step_time_ratio']:.3f} x the time of {goal['fastest']}, {goal['peak_memory_ratio']:.3f} x the memory of "
            f"{goal['leanest']}: the goal ({GOAL_TIME}, {GOAL_MEMORY}) {'holds' if goal['holds'] else 'does not hold'}"
        )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The options; unknown models end the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="opweave against DDP, FSDP2 and tensor parallelism of torch")
    parser.add_argument("--models", default=",".join(CASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="times that every peer takes a step (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds per model (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="end with status 1 where the goal does not hold")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = [name for name in args.models.split(",") if name not in CASES]
    if unknown:
        parser.error(f"unknown model {', '.join(map(repr, unknown))}; there are {', '.join(CASES)}")
    if args.ranks < 2 or args.rounds < 1:
        parser.error(f"--ranks {args.ranks} --rounds {args.rounds}: peers need at least 2 ranks and 1 round")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where all models were measured and opweave's losses are the plain model's (with --check: and the goal holds)."""
    args = parse_args(argv)
    if args.worker:
        return worker(args)
    rows, plans, failures = [], {}, {}
    for model in args.models.split(","):
        try:
            result = launch(model, args.ranks, args.rounds, args.timeout)
            rows += rows_of(result)
        except (RuntimeError, ValueError) as error:
            failures[model] = str(error)
            print(error, file=sys.stderr)
            continue
        plans[model] = result.get("patterns", {})
        difference = loss_difference(result["peers"][OURS]["losses"], result["reference"])
        if difference > SAME_RESULT:
            failures[model] = f"opweave's losses differ from the plain model's by {difference:.3g}, more than {SAME_RESULT:g}"
            print(f"{model}: {failures[model]}", file=sys.stderr)
    goals = verdict(rows)
    if args.json:
        found = {"rows": rows, "verdict": goals, "plans": plans, "failures": failures, "ranks": args.ranks, "about": about()}
        print(json.dumps(found, indent=1))
    else:
        show(rows, goals)
    failed = bool(failures) or (args.check and not all(goal["holds"] for goal in goals.values()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
