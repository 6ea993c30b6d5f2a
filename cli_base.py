"""What all commands share: the app, options, the two consoles, errors as exit statuses, and how arguments are read."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from .cli_tables import bytes_text, plain

app = typer.Typer(
    name="opweave",
    help="Plans how every operator of a PyTorch training step is split over a cluster, and runs the plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Where there is no terminal, tables are as wide as a report may be.
_WIDTH = 150
screen = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH)
messages = Console(width=None if sys.stderr.isatty() or "COLUMNS" in os.environ else _WIDTH, stderr=True)

Model = Annotated[str, typer.Argument(help="A model of the zoo (`opweave models`) or package.module:function that returns (model, batch).")]
ClusterOption = Annotated[
    str, typer.Option("--cluster", "-c", help="A shipped cluster, NAMExNODES, NAME:DEVICES, a cluster file, or detect.")
]
BatchOption = Annotated[
    str | None, typer.Option("--batch", "-b", metavar="BxS", help="Global batch size, and sequence length or image size.")
]
MeshOption = Annotated[str | None, typer.Option("--mesh", metavar="2x4", help="Device mesh; all that fit are tried without it.")]
ForceOption = Annotated[str | None, typer.Option("--force", help="A named plan such as ddp, zero3 or megatron instead of the solver's.")]
OptimizerOption = Annotated[str, typer.Option(help="adamw, adam, sgd, momentum or none.")]
LimitOption = Annotated[
    str | None,
    typer.Option("--memory-limit", metavar="SIZES", help="Most memory per device: 40GiB, or by pool: device=4GiB,host=32GiB,disk=100GiB."),
]
PlacesOption = Annotated[
    str, typer.Option("--places", help="Forced residency: keep, checkpoint, selective:0.5, offload-optimizer or offload-all; else auto.")
]
ObjectiveOption = Annotated[
    str, typer.Option("--objective", help="What is minimised: time, cost or energy; the latter need a price or watts in the cluster file.")
]
AutocastOption = Annotated[str | None, typer.Option("--autocast", help="Dtype of the forward pass: bf16 or fp16.")]
AccumulateOption = Annotated[
    int, typer.Option("--accumulate", metavar="K", min=1, help="Micro-batches of a step: their gradients are averaged before the update.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class CheckFailed(Exception):
    """What was asked was checked and does not hold. printed: the JSON object is on stdout already."""
    def __init__(self, message: str, *, printed: bool = False) -> None:
        super().__init__(message)
        self.printed = printed


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what a user can put right as one message, and say by the exit status what happened."""
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            command(*args, **kwargs)
        except CheckFailed as error:
            fail(str(error), 1, as_json and not error.printed)
        except (ValueError, ImportError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
            fail(str(error), 2, as_json)
        except KeyboardInterrupt:
            fail("interrupted", 130, as_json)

    return run


def fail(message: str, status: int, as_json: bool) -> NoReturn:
    """Say what is wrong, and leave with this exit status."""
    print_error(message)
    if as_json and _leads():
        print_json({"error": message})
    raise typer.Exit(status)


def _leads() -> bool:
    """Of a job that torchrun started, rank 0 alone prints the JSON object."""
    return os.environ.get("RANK", "0") == "0"


def print_error(message: str) -> None:
    messages.print(f"[bold red]error:[/] {escaped(message)}", highlight=False, soft_wrap=True)


def escaped(text: str) -> str:
    return text.replace("[", "\\[")


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """A moving line on stderr while something takes long; nothing where stderr is no terminal. Gives a function that says what is done."""
    if not messages.is_terminal:
        yield lambda what: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=messages, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda what: progress.update(task, description=f"{text}: {what[:60]}")


class Stages:
    """A stopwatch for what a command does, in processor seconds: other programs on the machine do not count."""
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what is done within towards the stage of this name."""
        begin = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin


# --- reading arguments ---------------------------------------------------------------------------------------------------------------


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """"2x4" as (2, 4). Raises ValueError that names the option."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f"{option} {text!r} is not a list of sizes; write whole numbers above 0 with x between them, such as 8 or 2x4")
    return tuple(int(part) for part in text.split("x"))


def batch_sizes(text: str | None) -> tuple[int, int] | None:
    """"8x1024" as (8, 1024)."""
    if text is None:
        return None
    sizes = parse_sizes(text, "--batch")
    if len(sizes) != 2:
        raise ValueError(f"--batch {text!r} has {len(sizes)} sizes; write BATCHxSEQUENCE or BATCHxIMAGE, such as 8x1024")
    return sizes[0], sizes[1]


def resolve_model(spec: str, batch: tuple[int, int] | None) -> tuple[Any, Any]:
    """(model, batch) of a zoo name or of a user's function, which may lie in the current folder."""
    from . import zoo

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return zoo.resolve(spec, batch)


def named_optimizer(name: str, model: Any) -> Any:
    """A torch optimizer by name over the model's trainable parameters; None for "none"."""
    import torch

    kinds: dict[str, Callable[[Any], Any]] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }
    if name == "none":
        return None
    if name not in kinds:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(kinds)} and none")
    return kinds[name]([p for p in model.parameters() if p.requires_grad])


def named_dtype(name: str) -> Any:
    import torch

    names = ("float64", "float32", "bfloat16")
    if name not in names:
        raise ValueError(f"unknown dtype {name!r}; known are {', '.join(names)}")
    return getattr(torch, name)


_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}


def autocast_dtype(name: str | None) -> Any:
    """A torch dtype by its short or full name; None for none."""
    import torch

    if name is None:
        return None
    if name not in _DTYPES:
        raise ValueError(f"--autocast {name!r} is no dtype to compute in; known are {', '.join(_DTYPES)}")
    return getattr(torch, _DTYPES[name])


def limits_of(text: str | None, cluster: Any) -> dict[str, float]:
    """Bytes per pool of --memory-limit on a cluster, defaults included."""
    from .compiler.limits import memory_limits

    try:
        limits = memory_limits(text, cluster)
    except ValueError as error:
        raise ValueError(f"--memory-limit {text!r} is not a size that can be used: {error}") from None
    if text is not None and _leads():
        _warn_of_more_than_there_is(limits, cluster)
    return limits


def _warn_of_more_than_there_is(limits: dict[str, float], cluster: Any) -> None:
    """A limit is what a plan may use, wherever it will run: more than this cluster has is no error."""
    from .compiler.suggestions import available

    there = {"device": float(cluster.device.usable_bytes), **available(cluster)}
    for pool, num_bytes in limits.items():
        if num_bytes > there.get(pool, num_bytes):
            text = f"the limit of the {pool}, {bytes_text(num_bytes)}, is more than the {bytes_text(there[pool])} that {cluster.name} has"
            messages.print(f"[yellow]warning:[/] {text} per device", soft_wrap=True)


def is_plan_file(argument: str) -> bool:
    """Whether an argument that may be a model or a plan is a plan."""
    return argument.endswith(".json") or Path(argument).is_file()


def planned_sizes(made: Any) -> tuple[int, int] | None:
    """The batch sizes a plan was made for; None for the model's own."""
    recorded = made.model.get("batch")
    return (recorded[0], recorded[1]) if recorded else None


def load_plan(path: Path) -> Any:
    from .compiler.plan import Plan

    return Plan.load(path)


def source_of(made: Any, path: str) -> str:
    """The model a plan file was made for, as `opweave plan` wrote it down."""
    spec = made.model.get("spec")
    if not spec:
        raise ValueError(
            f"{path} does not say how to build its model {made.model['name']!r} (it was not made by `opweave plan`); "
            f"give the model instead: opweave verify MODEL --ranks {'x'.join(map(str, made.mesh))}"
        )
    return str(spec)


@contextlib.contextmanager
def steps_bar(text: str, shown: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr for known steps; gives the callback (done, total, what)."""
    if not (shown and messages.is_terminal):
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=f"{text} {what[:40]:40}")
