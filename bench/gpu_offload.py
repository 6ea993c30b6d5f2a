"""Models larger than a memory cap on one GPU: opweave against torchao's CPU-offload optimizer and FSDP2 with CPUOffloadPolicy.

    python -m bench.gpu_offload [--models opt-2.7b,opt-6.7b,opt-13b] [--caps 24,40] [--batch 8] [--plans FOLDER] [--json] [-o FILE]
    python -m bench.gpu_offload --plan-only --cluster h200 --plans FOLDER      makes the plans, anywhere, without a GPU

All train the same model on the same batch, compute in bfloat16, parameters and AdamW's state in float32:

    uncapped   opweave with all of the GPU's memory: what the others are measured against
    opweave    opweave within the cap, by its plan
    torchao    torchao.optim.CPUOffloadOptimizer with its gradients offloaded, under autocast
    fsdp2      fully_shard of each block with CPUOffloadPolicy and bfloat16 parameters, on one rank

The last two run as they are and with activation checkpointing ("+checkpoint"); the faster one that fits counts. Every turn is a process of
its own, whose allocator is held to the cap, and takes STEPS steps; turns of all peers follow each other, round after round, and a step
time is the median over rounds. A peer that cannot run (no memory, not installed) is a row with the reason. Goals: at least GOAL of the
uncapped speed, and faster than both others. Exit status 77 without a GPU; --cpu runs the same on the CPU with tiny models and the disk
tier, for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import opweave as ow
from opweave import zoo
from opweave.compiler.planner import DoesNotFitError
from opweave.cost_model.cluster import Cluster

SKIPPED = 77
GOAL = 0.9
STEPS, ROUNDS = 4, 3
MODELS, CPU_MODELS = ("opt-2.7b", "opt-6.7b", "opt-13b"), ("opt-tiny",)
CAPS_GB, CPU_CAPS_GB = (24.0, 40.0), (0.002,)
RESERVE_BYTES = 1 << 30
"""Of a cap, left to libraries' workspaces and the allocator's rounding."""

OURS, UNCAPPED = "opweave", "uncapped"
OTHERS = ("torchao", "fsdp2")
PEERS = (UNCAPPED, OURS, *(f"{peer}{suffix}" for peer in OTHERS for suffix in ("", "+checkpoint")))
Row = dict[str, Any]
Step = Callable[[], float]


class NotAvailableError(RuntimeError):
    """A peer cannot run here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One process. cap_bytes: 0 where there is none. plan: file of opweave's plan."""

    model: str
    batch_size: tuple[int, int]
    peer: str
    device: str
    cap_bytes: int
    plan: str
    cluster: str
    disk_path: str | None = None


# -- one turn -------------------------------------------------------------------------------------------------------------


def load(name: str, batch_size: tuple[int, int]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A zoo model with random weights in CPU memory, and its batch, the same in every process."""
    torch.manual_seed(0)
    model, batch = zoo.load(name, batch_size)
    if any(p.is_meta for p in model.parameters()):
        model = model.to_empty(device="cpu")
        model.tie_weights()  # type: ignore[operator]  # as transformers' models are before their weights are loaded
        with torch.no_grad():
            for name_, p in model.named_parameters():
                p.fill_(1.0) if p.dim() == 1 and "norm" in name_ else p.uniform_(-0.03, 0.03)
        vocabulary: Any = model.config.vocab_size  # type: ignore[union-attr]
        ids = torch.randint(3, vocabulary, batch_size)
        batch = {"input_ids": ids, "labels": ids.clone()}
    return model, batch


def run_turn(turn: Turn) -> Row:
    """Train some steps. Raises what the peer raises."""
    device = torch.device(turn.device)
    if device.type == "cuda" and turn.cap_bytes:
        torch.cuda.set_per_process_memory_fraction(turn.cap_bytes / torch.cuda.get_device_properties(0).total_memory)
    model, batch = load(turn.model, turn.batch_size)
    peer = turn.peer.removesuffix("+checkpoint")
    if turn.peer != peer:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    build = {UNCAPPED: _opweave, OURS: _opweave, "torchao": _torchao, "fsdp2": _fsdp2}[peer]
    step, peak = build(turn, model, batch, device)
    losses, seconds = [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    return {"losses": losses, "step_time_s": statistics.median(seconds[1:]), "peak_bytes": peak()}


def _peak_of(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _opweave(turn: Turn, model: nn.Module, batch: Any, device: torch.device) -> tuple[Step, Callable[[], Any]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = ow.compile(
        model, Cluster.load(turn.cluster), optimizer=optimizer, autocast=torch.bfloat16, plan=turn.plan, disk_path=turn.disk_path,
        memory_limit=_limit(turn.cap_bytes, device.type), keep_model=False,
    )  # fmt: skip

    def peak() -> Any:
        assert step.executor is not None and step.executor.memory is not None
        return _peak_of(device) or step.executor.memory.peak_bytes

    return lambda: float(step(batch)), peak


def _limit(cap_bytes: int, kind: str) -> dict[str, float] | None:
    """The limit of a plan for a cap; the next tier is the host of a GPU, the disk of a CPU."""
    if not cap_bytes:
        return None
    return {"device": float(cap_bytes - RESERVE_BYTES)} if kind == "cuda" else {"device": float(cap_bytes), "disk": 1e11}


def _torchao(turn: Turn, model: nn.Module, batch: Any, device: torch.device) -> tuple[Step, Callable[[], Any]]:
    if device.type != "cuda":
        raise NotAvailableError("torchao's CPUOffloadOptimizer needs a GPU")
    try:
        from torchao.optim import CPUOffloadOptimizer
    except ImportError as error:
        raise NotAvailableError(f"torchao is not installed ({error}); pip install torchao") from None
    model, batch = model.to(device), {k: v.to(device) for k, v in batch.items()}
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=1e-4, fused=True)
    return _eager(model, batch, optimizer, device), lambda: _peak_of(device)


def _fsdp2(turn: Turn, model: nn.Module, batch: Any, device: torch.device) -> tuple[Step, Callable[[], Any]]:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    _join_alone(device)
    mesh = dist.init_device_mesh(device.type, (1,))
    # On a CPU there is nothing to offload to; the rest of the peer is the same.
    offload = CPUOffloadPolicy() if device.type == "cuda" else OffloadPolicy()
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)
    batch = {k: v.to(device) for k, v in batch.items()}
    return _eager(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-4), device), lambda: _peak_of(device)


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The modules of the longest list of equal ones: the repeated blocks."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return list(max(lists, key=len))


def _join_alone(device: torch.device) -> None:
    """A process group of this process."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        store = dist.FileStore(file.name, 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)


def _eager(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> Step:
    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


# -- plans ----------------------------------------------------------------------------------------------------------------


def plan_file(folder: Path, model: str, batch_size: tuple[int, int], cap_bytes: int) -> Path:
    """Where a plan is kept."""
    return folder / f"{model}-{batch_size[0]}x{batch_size[1]}-{cap_bytes or 'uncapped'}.json"


def make_plan(path: Path, model: str, batch_size: tuple[int, int], cluster: Cluster, cap_bytes: int) -> str:
    """Make the plan of a case unless there is one; returns "" or why there is none."""
    if path.exists():
        return ""
    planned, batch = zoo.load(model, batch_size)
    optimizer = torch.optim.AdamW(planned.parameters(), lr=1e-4)
    limit = _limit(cap_bytes, cluster.device.kind)
    try:
        plan = ow.plan(planned, cluster, batch, optimizer=optimizer, autocast=torch.bfloat16, memory_limit=limit)
    except DoesNotFitError as error:
        return f"no plan: {error}"
    plan.save(path)
    return ""


# -- the runner -----------------------------------------------------------------------------------------------------------


def start(turn: Turn) -> Row:
    """One turn in a process of its own: its row, or the reason there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as case:
        json.dump(asdict(turn), case)
        case.flush()
        command = [sys.executable, "-m", "bench.gpu_offload", "--turn", case.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode == 0:
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": lines[-1] if lines else f"status {done.returncode}"}


def measure(args: argparse.Namespace, cluster: Cluster) -> list[Row]:
    """Rows of models x caps, all peers taking turns."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cluster_file = str(Path(folder) / "cluster.json")
        cluster.save(cluster_file)
        for model in args.models:
            for cap_gb in args.caps:
                rows.append(_row(args, cluster, cluster_file, model, int(cap_gb * 1e9)))
                print(f"{model} in {cap_gb:g} GB: {verdict(rows[-1])}", file=sys.stderr, flush=True)
    return rows


def _row(args: argparse.Namespace, cluster: Cluster, cluster_file: str, model: str, cap_bytes: int) -> Row:
    batch_size = (args.batch, args.length or zoo.row(model).batch[1])
    caps = {UNCAPPED: 0, OURS: cap_bytes}
    files = {peer: plan_file(args.plans, model, batch_size, cap) for peer, cap in caps.items()}
    reasons = {peer: make_plan(files[peer], model, batch_size, cluster, cap) for peer, cap in caps.items()}
    predicted = {peer: ow.Plan.load(files[peer]).predicted for peer, reason in reasons.items() if not reason}
    turns = {
        peer: Turn(
            model=model, batch_size=batch_size, peer=peer, device=cluster.device.kind, cap_bytes=caps.get(peer, cap_bytes),
            plan=str(files.get(peer, "")), cluster=cluster_file, disk_path=args.disk_path,
        )
        for peer in PEERS
    }  # fmt: skip
    found: dict[str, list[Row]] = {peer: [] for peer in PEERS}
    failed = {peer: reason for peer, reason in reasons.items() if reason}
    for _ in range(args.rounds):
        for peer, turn in turns.items():
            if peer in failed:
                continue
            result = start(turn)
            if "failed" in result:
                failed[peer] = result["failed"]
            else:
                found[peer].append(result)
    peers = {
        peer: {
            "step_time_s": statistics.median(r["step_time_s"] for r in results), "peak_bytes": results[0]["peak_bytes"],
            "losses": results[0]["losses"],
        }
        for peer, results in found.items()
        if results and peer not in failed
    }  # fmt: skip
    kept = {
        peer: {"step_time_s": p["step_time_s"], "peak_bytes": p["peak_bytes"]["device"]} for peer, p in predicted.items()
    }  # fmt: skip
    row = {"model": model, "batch": list(batch_size), "cap_bytes": cap_bytes, "peers": peers, "failed": failed, "predicted": kept}
    return row | compared(row)


def compared(row: Row) -> Row:
    """efficiency: uncapped over ours. speedups: the better form of each other peer over ours; a peer that cannot run is no measure."""
    times = {peer: found["step_time_s"] for peer, found in row["peers"].items()}
    if OURS not in times:
        return {"efficiency": None, "speedups": {}, "holds": False}
    best = {other: min((t for peer, t in times.items() if peer.split("+")[0] == other), default=None) for other in OTHERS}
    speedups = {other: t / times[OURS] for other, t in best.items() if t is not None}
    efficiency = times[UNCAPPED] / times[OURS] if UNCAPPED in times else None
    holds = (efficiency is None or efficiency >= GOAL) and all(ratio > 1 for ratio in speedups.values())
    return {"efficiency": efficiency, "speedups": speedups, "holds": holds}


def verdict(row: Row) -> str:
    """A row in a line."""
    times = ", ".join(f"{peer} {found['step_time_s']:.3f} s" for peer, found in row["peers"].items())
    reasons = "; ".join(f"{peer}: {reason}" for peer, reason in row["failed"].items())
    return f"{times or 'nothing ran'}{f' ({reasons})' if reasons else ''}"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | batch | cap, GB | uncapped, s | ours (predicted) | of uncapped | peak, GB (predicted) | torchao / ours | fsdp2 / ours |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        ours, plain = row["peers"].get(OURS), row["peers"].get(UNCAPPED)
        predicted = row["predicted"].get(OURS, {})
        cells = [
            row["model"], "x".join(map(str, row["batch"])), f"{row['cap_bytes'] / 1e9:g}", f"{plain['step_time_s']:.3f}" if plain else "—",
            f"{ours['step_time_s']:.3f} ({predicted['step_time_s']:.3f})" if ours else row["failed"].get(OURS, "—"),
            f"{row['efficiency']:.0%}" if row["efficiency"] else "—",
            f"{ours['peak_bytes'] / 1e9:.3g} ({predicted['peak_bytes'] / 1e9:.3g})" if ours else "—",
            *(f"{row['speedups'][other]:.2f}" if other in row["speedups"] else "cannot run" for other in OTHERS),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; defaults depend on --cpu."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_offload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help=f"default: {','.join(MODELS)}")
    parser.add_argument("--caps", help="GB of device memory, default: 24,40")
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument("--length", type=int, help="tokens; default: the zoo's")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cluster", help="preset or file (default: this machine)")
    parser.add_argument("--plans", type=Path, help="folder of plans; those that are there are used")
    parser.add_argument("--plan-only", action="store_true", help="make the plans and end")
    parser.add_argument("--disk-path", help="folder of the disk tier")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.models = args.models.split(",") if args.models else (CPU_MODELS if args.cpu else MODELS)
    args.caps = [float(cap) for cap in args.caps.split(",")] if args.caps else (CPU_CAPS_GB if args.cpu else CAPS_GB)
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where every row holds, 77 without a GPU."""
    args = parse_args(argv)
    if args.turn:
        turn = json.loads(args.turn.read_text())
        print(json.dumps(run_turn(Turn(**turn | {"batch_size": tuple(turn["batch_size"])}))))
        return 0
    if not (args.cpu or args.plan_only or torch.cuda.is_available()):
        print("there is no GPU here; --plan-only --cluster NAME makes the plans, --cpu runs the script with tiny models", file=sys.stderr)
        return SKIPPED
    cluster = Cluster.resolve(args.cluster) if args.cluster else Cluster.preset("cpu") if args.cpu else Cluster.detect()
    with contextlib.ExitStack() as stack:
        args.plans = args.plans or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.makedirs(args.plans, exist_ok=True)
        if args.plan_only:
            return max(_plan_all(args, cluster), 0)
        rows = measure(args, cluster)
    content = {"device": cluster.device.name, "torch": torch.__version__, "rows": rows, "holds": all(row["holds"] for row in rows)}
    if args.output:
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content) if args.json else table(rows))
    return 0 if content["holds"] else 1


def _plan_all(args: argparse.Namespace, cluster: Cluster) -> int:
    """Make every plan; 1 where one cannot be made."""
    failed = 0
    for model in args.models:
        batch_size = (args.batch, args.length or zoo.row(model).batch[1])
        for cap_bytes in (0, *(int(cap * 1e9) for cap in args.caps)):
            path = plan_file(args.plans, model, batch_size, cap_bytes)
            reason = make_plan(path, model, batch_size, cluster, cap_bytes)
            failed |= bool(reason)
            print(f"{path.name}: {reason or 'made'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
