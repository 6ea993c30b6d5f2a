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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

GOAL_TIME, GOAL_MEMORY = 1.05, 1.05
SAME_RESULT = 1e-3
"""Largest relative difference of the first losses from the plain model's.

Sums are in another order, 1e-7 in float32; AdamW's first steps have the size of the learning rate however small a gradient is, and a
ReLU next to zero may flip, which makes up to 2e-4 of it in three steps of the ResNet. Batch norm over a part of the batch makes 3e-3.
"""
CHECKED_STEPS = 3
OURS = "opweave"
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]


# -- models -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model. make: a fresh one, the same each time. make_batch: a global batch. blocks: what FSDP2 groups by. tensor_plan: styles
    for parallelize_module on so many ranks (it may adapt the model), or the reason there are none."""

    name: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[nn.Module], Batch]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    tensor_plan: Callable[[nn.Module, int], dict[str, Any] | str]


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            hidden_size=384, num_hidden_layers=4, num_attention_heads=6, ffn_dim=1536, word_embed_proj_dim=384, vocab_size=2048,
            max_position_embeddings=256, dropout=0.0, use_cache=False,
        )
    )  # fmt: skip


def _opt_batch(model: nn.Module) -> Batch:
    ids = torch.randint(3, 2048, (8, 128))
    return {"input_ids": ids, "labels": ids.clone()}


def _opt_styles(model: nn.Module, ranks: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    styles: dict[str, Any] = {}
    for i, layer in enumerate(model.model.decoder.layers):  # type: ignore[union-attr, arg-type]
        layer.self_attn.num_heads //= ranks  # transformers' module counts the heads of its own projections
        at = f"model.decoder.layers.{i}."
        styles |= {at + "self_attn." + name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        styles |= {at + "self_attn.out_proj": RowwiseParallel(), at + "fc1": ColwiseParallel(), at + "fc2": RowwiseParallel()}
    return styles


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 2, 2], layer_type="basic", num_labels=100)
    )


def _resnet_batch(model: nn.Module) -> Batch:
    return {"pixel_values": torch.randn(16, 3, 96, 96), "labels": torch.randint(0, 100, (16,))}


def _mlp() -> nn.Module:
    from opweave.zoo_modules import Mlp

    return Mlp(width=2048, depth=4, num_classes=512)


def _mlp_batch(model: nn.Module) -> Batch:
    return {"x": torch.randn(128, 2048), "labels": torch.randint(0, 512, (128,))}


def _mlp_styles(model: nn.Module, ranks: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {f"layers.{i}": RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(4)}


CASES = {
    case.name: case
    for case in (
        Case(name="opt", make=_opt, make_batch=_opt_batch, blocks=lambda m: m.model.decoder.layers, tensor_plan=_opt_styles),  # type: ignore
        Case(
            name="resnet", make=_resnet, make_batch=_resnet_batch, blocks=lambda m: m.resnet.encoder.stages,  # type: ignore
            tensor_plan=lambda model, ranks: "parallelize_module has no style for Conv2d and BatchNorm2d",
        ),
        Case(name="mlp", make=_mlp, make_batch=_mlp_batch, blocks=lambda m: m.layers, tensor_plan=_mlp_styles),  # type: ignore
    )
}  # fmt: skip


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """transformers' models return an output with a loss, ours the loss."""
    out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.loss


def make_optimizer(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for every peer; split and whole parameters in groups of their own, since one kernel call takes one kind."""
    from torch.distributed.tensor import DTensor

    split, whole = [p for p in params if isinstance(p, DTensor)], [p for p in params if not isinstance(p, DTensor)]
    return torch.optim.AdamW([{"params": group} for group in (split, whole) if group], lr=1e-3, fused=True)


# -- peers ------------------------------------------------------------------------------------------------------------------


class NotApplicableError(Exception):
    """A peer cannot run a model; the text says why."""


def _eager_step(model: nn.Module, part: Callable[[Batch], Batch]) -> Step:
    optimizer = make_optimizer(list(model.parameters()))

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, part(batch))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _own_part(batch: Batch) -> Batch:
    """This rank's part of a global batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {name: tensor.chunk(ranks)[rank] for name, tensor in batch.items()}


def _whole(batch: Batch) -> Batch:
    return batch


def build_opweave(case: Case, model: nn.Module, batch: Batch) -> Step:
    """What is measured. The cluster is measured too, so the plan is this machine's."""
    import opweave as ow

    # Like its peers, which train the model they are given, it needs no second copy of the parameters.
    step = ow.compile(model, ow.Cluster.detect(), optimizer=make_optimizer(list(model.parameters())), keep_model=False)
    step.prepare(batch)
    return step


def build_ddp(case: Case, model: nn.Module, batch: Batch) -> Step:
    """DistributedDataParallel with the batch norm of the global batch."""
    return build_ddp_local_bn(case, _synchronised(model), batch)


def build_ddp_local_bn(case: Case, model: nn.Module, batch: Batch) -> Step:
    """DistributedDataParallel as it comes."""
    return _eager_step(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), _own_part)


def build_fsdp2(case: Case, model: nn.Module, batch: Batch) -> Step:
    """fully_shard of each block and of the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _synchronised(model)
    for block in case.blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _eager_step(model, _own_part)


def build_tp(case: Case, model: nn.Module, batch: Batch) -> Step:
    """parallelize_module with the case's styles."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    styles = case.tensor_plan(model, dist.get_world_size())
    if isinstance(styles, str):
        raise NotApplicableError(styles)
    return _eager_step(parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), styles), _whole)


PEERS: dict[str, Callable[[Case, nn.Module, Batch], Step]] = {
    OURS: build_opweave, "ddp": build_ddp, "fsdp2": build_fsdp2, "tp": build_tp, "ddp-local-bn": build_ddp_local_bn,
}  # fmt: skip


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm over all ranks with one exchange each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        dims = [0, *range(2, x.dim())]
        sums = torch.stack([x.sum(dims), (x * x).sum(dims)])
        dist.all_reduce(sums)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = sums[0] / count
        var = sums[1] / count - mean * mean
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.count = count
        ctx.mark_non_differentiable(mean, var)
        scale = weight * rstd
        return torch.addcmul(_channels(bias - mean * scale, x), x, _channels(scale, x)), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad, dims = grads[0], [0, *range(2, x.dim())]
        db = grad.sum(dims)
        dw = ((grad * x).sum(dims) - mean * db) * rstd
        sums = torch.stack([db, dw])
        dist.all_reduce(sums)
        sums /= ctx.count
        slope = weight * rstd
        by_x = slope * rstd * sums[1]
        dx = grad * _channels(slope, x)
        dx.addcmul_(x, _channels(-by_x, x)).add_(_channels(by_x * mean - slope * sums[0], x))
        return dx, dw, db, None


def _channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


class _SynchronisedBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm computes on GPUs only; this is the same for gloo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, mean, var = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # type: ignore[union-attr, arg-type]
        return out


def _synchronised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SynchronisedBatchNorm
    return model


def peers_of(case: Case) -> list[str]:
    """The peers that say something about a model."""
    has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in case.make().modules())
    return [name for name in PEERS if name != "ddp-local-bn" or has_batch_norm]


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
    step = _eager_step(case.make(), _whole)
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
