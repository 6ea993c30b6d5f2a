"""Train a small GPT on real text with opweave, then train it again as plain PyTorch and compare.

    torchrun --nproc-per-node 2 examples/train_text.py      # two ranks share every step, as the plan says
    python examples/train_text.py --steps 50                # the same in one process

The model is an unmodified GPT-2 of `transformers` with bytes as vocabulary; the text is the documentation that ships with Python
(`pydoc_data.topics`, 466 thousand bytes), so nothing is downloaded. Rank 0 shows the plan by module, trains, repeats the same steps in
one process with the eager model and torch's fused AdamW, and prints the largest difference of the losses. It leaves plan.json,
checkpoint/ and sample.txt in the output folder, and ends with status 1 where a loss differs by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import opweave as ow

try:
    from transformers import GPT2Config, GPT2LMHeadModel, logging
except ImportError as error:
    raise SystemExit(f"this example trains a GPT-2 of transformers, but {error}; pip install 'opweave[models]'") from error

VOCABULARY = 256  # bytes

TOLERANCE = 1e-3
"""Largest difference of two losses accepted.

Ranks add up their parts of a sum in another order than one process does: a unit in the last place of float32, 5e-7 of a loss of 5.5.
Over 300 steps on 2 ranks the largest difference was 1e-6. A wrong step is far above: with the gradient of only half of the batch the
second loss differs by 2e-2, the third by 5e-2.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; a bad value ends the program with a message and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=_positive, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=_positive, default=16, help="texts per step over all ranks (default: %(default)s)")
    parser.add_argument("--block", type=_positive, default=96, help="bytes per text (default: %(default)s)")
    parser.add_argument("--width", type=_positive, default=256, help="width of the model (default: %(default)s)")
    parser.add_argument("--layers", type=_positive, default=4, help="transformer blocks (default: %(default)s)")
    parser.add_argument("--heads", type=_positive, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout probability (default: off)")
    parser.add_argument("--force", help="an expert's plan in place of the solver's: ddp, zero1, zero2, zero3, megatron, ...")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sample (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/train_text"), help="folder of the results (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} does not divide into --heads {args.heads}; give a multiple of it")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout} is no probability below 1; give one, e.g. 0.1, or leave it out")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive; give at least 1")
    return value


# -- what is trained --------------------------------------------------------------------------------------------------------


def read_text() -> torch.Tensor:
    """uint8[n]: Python's documentation topics, one after the other."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def make_model(args: argparse.Namespace) -> GPT2LMHeadModel:
    """The same on every call and every rank."""
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=args.block, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        attn_pdrop=args.dropout, resid_pdrop=args.dropout, embd_pdrop=args.dropout, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_optimizer(model: GPT2LMHeadModel, args: argparse.Namespace) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a schedule of torch: linear warm-up over a tenth of the steps, then a cosine down to a tenth of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    warm_up = max(1, args.steps // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, args.steps - warm_up))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def make_batch(text: torch.Tensor, args: argparse.Namespace, step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step: `batch` random pieces of the text. The same on every rank; opweave takes each rank's part."""
    generator = torch.Generator().manual_seed((args.seed << 32) + step)
    starts = torch.randint(len(text) - args.block, (args.batch,), generator=generator)
    ids = torch.stack([text[start : start + args.block] for start in starts.tolist()]).long()
    return {"input_ids": ids, "labels": ids}


# -- training ---------------------------------------------------------------------------------------------------------------


def run_steps(
    title: str, args: argparse.Namespace, console: Console, text: torch.Tensor, take_step: Callable[[dict[str, torch.Tensor]], float]
) -> tuple[list[float], float]:
    """Every step with a progress bar. Returns the losses and the tokens per second after the first step."""
    losses: list[float] = []
    speed, started = 0.0, time.perf_counter()
    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeElapsedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=args.steps, loss=math.nan, speed=0.0)
        for step in range(args.steps):
            losses.append(take_step(make_batch(text, args, step)))
            if step == 0:
                started = time.perf_counter()  # the first step of a compiled program also checks its memory
            else:
                speed = args.batch * args.block * step / (time.perf_counter() - started)
            progress.update(task, advance=1, loss=losses[-1], speed=speed)
            if not console.is_terminal and (step + 1) % max(1, args.steps // 10) == 0:
                console.print(f"{title}: step {step + 1:4d}  loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
    return losses, speed


def train_planned(
    args: argparse.Namespace, console: Console, text: torch.Tensor, device: torch.device
) -> tuple[ow.TrainingStep, list[float], float]:
    """What a user of opweave writes: compile, then call."""
    model = make_model(args)
    optimizer, schedule = make_optimizer(model, args)
    step = ow.compile(model, ow.Cluster.detect(), optimizer=optimizer, force=args.force, seed=args.seed, device=str(device))
    with console.status("planning"):
        step.prepare(make_batch(text, args, 0))
    show_plan(step.plan, console)

    def take_step(batch: dict[str, torch.Tensor]) -> float:
        loss = step(batch)
        schedule.step()
        return loss.item()

    losses, speed = run_steps("planned", args, console, text, take_step)
    return step, losses, speed


def train_alone(args: argparse.Namespace, console: Console, text: torch.Tensor, device: torch.device) -> tuple[list[float], float]:
    """The same steps in this process alone, by plain PyTorch.

    With dropout the comparison is with opweave's program for one device: PyTorch would draw other random numbers.
    """
    model = make_model(args).to(device)
    optimizer, schedule = make_optimizer(model, args)
    compiled = ow.compile(model, "cpu", optimizer=optimizer, seed=args.seed, device=str(device)) if args.dropout else None

    def take_step(batch: dict[str, torch.Tensor]) -> float:
        if compiled is not None:
            loss = compiled(batch)
        else:
            optimizer.zero_grad()
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
        schedule.step()
        return loss.item()

    return run_steps("one process", args, console, text, take_step)


@torch.no_grad()
def sample(model: GPT2LMHeadModel, args: argparse.Namespace, prompt: str = "The ", length: int = 300) -> str:
    """Text the model writes, byte by byte."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    ids = list(prompt.encode())
    for _ in range(length):
        window = torch.tensor([ids[-args.block :]], device=model.device)
        logits = model(window).logits[0, -1].float().cpu() / 0.7
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    return bytes(ids).decode(errors="replace")


# -- what is shown ----------------------------------------------------------------------------------------------------------


def show_plan(plan: ow.Plan, console: Console) -> None:
    """The plan by module: what each does under its usual names, how its parameters are stored, what one device spends on it."""
    mesh = "x".join(map(str, plan.mesh))
    table = Table(title=f"plan for {plan.model['name']} on mesh {mesh} of {plan.cluster['name']}", title_justify="left")
    for name in ("module", "heavy ops", "parameters, by mesh axis"):
        table.add_column(name, overflow="fold", no_wrap=name == "module")
    for name in ("ms", "MiB"):
        table.add_column(name, justify="right")
    for row in plan.modules:
        table.add_row(row["path"], row["name"], row["layout"], f"{row['seconds'] * 1e3:.2f}", f"{row['bytes'] / 2**20:.2f}")
    console.print(table)
    names = ", ".join(f"{name} {count}x" for name, count in plan.patterns.items())
    console.print(f"in usual names: {names or 'one device'}")
    peak = plan.predicted["peak_bytes"]["device"] / 2**20
    console.print(
        f"predicted: {plan.predicted['step_time_s'] * 1e3:.0f} ms a step, {peak:.0f} MiB a device; "
        f"planned in {plan.planning_time_s['total']:.1f} s, {plan.solver['status']}"
    )
    for op in plan.replicated_ops:
        console.print(f"not split: {op}")


def report(planned: tuple[list[float], float], alone: tuple[list[float], float], ranks: int, console: Console) -> bool:
    """Both runs side by side; whether their losses agree."""
    table = Table(title="the same steps twice", title_justify="left")
    for name, justify in (("", "left"), ("first loss", "right"), ("last loss", "right"), ("tokens/s", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    per_process = f"{threads} thread{'s' * (threads > 1)}"
    runs = {f"planned, {ranks} rank{'s' * (ranks > 1)} with {per_process} each": planned, f"one process, {per_process}": alone}
    for name, (losses, speed) in runs.items():
        table.add_row(name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{speed:,.0f}")
    console.print(table)
    differences = [abs(a - b) for a, b in zip(planned[0], alone[0], strict=True)]
    worst = max(range(len(differences)), key=lambda i: differences[i])
    agrees = differences[worst] <= TOLERANCE
    verdict = "within" if agrees else "MORE THAN"
    console.print(f"largest difference of the losses: {differences[worst]:.3g} (step {worst + 1}), {verdict} the tolerance {TOLERANCE:g}")
    return agrees


# -- the job ----------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 where the losses agree, 1 where they do not."""
    args = parse_args(argv)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    logging.set_verbosity_error()
    console = Console(quiet=rank != 0, width=None if sys.stdout.isatty() else 120)
    args.output.mkdir(parents=True, exist_ok=True)

    text = read_text()
    num_parameters = sum(p.numel() for p in make_model(args).parameters())
    where = f"{ranks} rank{'s' * (ranks > 1)} on {device.type}"
    console.print(f"GPT-2 with {num_parameters / 1e6:.1f} million parameters, {len(text):,} bytes of text, {where}")
    step, losses, speed = train_planned(args, console, text, device)
    if rank == 0:
        step.plan.save(args.output / "plan.json")
    step.save(args.output / "checkpoint")
    trained = step.to_model()  # gathers the parameters: all ranks take part
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank != 0:
        return 0
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)  # from here on this process is alone; opweave joins the job that these describe

    written = sample(trained, args)
    (args.output / "sample.txt").write_text(written, encoding="utf-8")
    console.print(f"the model writes:\n[dim]{'-' * 80}[/dim]", highlight=False)
    console.print("".join(c if c.isprintable() or c == "\n" else "·" for c in written), markup=False, highlight=False)
    console.print(f"[dim]{'-' * 80}[/dim]")
    alone = train_alone(args, console, text, device)
    agrees = report((losses, speed), alone, ranks, console)
    console.print(f"plan.json, checkpoint/ and sample.txt are in {args.output}/")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
