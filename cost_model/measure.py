"""How calibration times: the ops of `measure_rows`, views, copies, disk.

In a training step each op finds other data in the caches and other code in the processor than its own. So inputs are taken in turn from
several copies that together exceed the caches, and on a CPU a few other ops run, untimed, before each timed run, over the more memory the
more ranks share the caches. A time is the mean of the middle half of the runs: a step is a sum over many ops, in which slow and fast runs
make up for each other, so the fast runs of each (a lower quintile, say) would add up to a step that never happens. On a GPU a run is
timed between two events, on a CPU by the clock.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import torch_compat
from .measure_rows import Row, Update, dtype_name, rows
from .work import Work, op_work

__all__ = ["Row", "Timing", "copy_points", "disk_points", "dtype_name", "measure", "rows", "view_seconds"]

ROTATE_BYTES = 32 << 20
COPIES = 16
LEAST_RUNS = 5
PASS_BYTES = 4 << 20
"""What each rank of a node writes between two timed runs, times the ranks: more than a core's own caches hold."""
Functions = Mapping[str, Callable[..., Any]]  # the runtime's own: "opweave.update" takes an Update, others what their rows say
RUNTIME_OPS = ("update", "channel_moments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What was measured: the work of one call, and its seconds."""

    work: Work
    dtype: str
    seconds: float


# --- timing --------------------------------------------------------------------------------------------------------------------------


def plain_update(made: Update) -> None:
    """torch's fused AdamW on tensors, without anything around it."""
    first, second = zip(*made.states, strict=True)
    torch_compat.fused_adamw(
        made.params, made.grads, list(first), list(second), [], [torch.ones((), device=p.device) for p in made.params], amsgrad=False,
        lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, maximize=False,
    )  # fmt: skip


PLAIN: Functions = {"opweave.update": plain_update}


def _function(op: str, functions: Functions) -> Callable[..., Any] | None:
    """What runs for an op; None for one of the runtime's that was not handed in."""
    if op in functions or op.removeprefix("opweave.") in RUNTIME_OPS:
        return functions.get(op)
    if op == "aten.contiguous.default":
        return torch.Tensor.contiguous
    namespace, name, overload = op.split(".")
    return torch_compat.direct_call(getattr(getattr(getattr(torch.ops, namespace), name), overload))


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        found += [value] if isinstance(value, torch.Tensor) else _tensors(value) if isinstance(value, list | tuple) else []
    return found


def _copied(value: Any) -> Any:
    """The same in other memory: faster than to draw random numbers again."""
    if isinstance(value, torch.Tensor | Update):
        return value.clone()
    return [_copied(part) for part in value] if isinstance(value, list | tuple) else value


def _work(row: Row, args: Sequence[Any], result: Any) -> Work:
    if row.op == "opweave.update":
        shape = args[0].shape
        return op_work("opweave::update", [shape] * 4, [shape] * 3, (), row.dtype.itemsize, row.dtype.itemsize)
    ins, outs = _tensors(args), list(result) if isinstance(result, list | tuple) else [result]
    plain = [arg for arg in args if not isinstance(arg, torch.Tensor)]
    return op_work(
        row.op, [tuple(t.shape) for t in ins], [None if t is None else tuple(t.shape) for t in outs], plain,
        [t.element_size() for t in ins], [0 if t is None else t.element_size() for t in outs],
    )  # fmt: skip


def measure(row: Row, device: torch.device, *, budget_s: float, functions: Functions = PLAIN) -> Timing | None:
    """Time one row; None where this device or build has no such kernel. functions: the runtime's own ops."""
    function = _function(row.op, functions)
    if function is None:
        return None
    try:
        args = row.build(device, row.dtype)
        with torch.no_grad():
            result = function(*args)
    except (RuntimeError, NotImplementedError):
        return None
    work = _work(row, args, result)
    runs = max(LEAST_RUNS, round(budget_s / _other_ops().seconds)) if device.type == "cpu" else COPIES  # no more will be timed
    copies = min(COPIES, 1 + runs, max(2, ROTATE_BYTES // max(1, row.num_bytes)))
    inputs = [args, *(_copied(args) for _ in range(copies - 1))]
    with torch.no_grad():
        seconds = _time(lambda i: function(*inputs[i % copies]), device, budget_s)
    if row.op == "opweave.update":
        seconds /= args[0].num_parameters
    return Timing(work=work, dtype=dtype_name(row.dtype), seconds=seconds)


def _time(run: Callable[[int], Any], device: torch.device, budget_s: float) -> float:
    """Seconds of one run: `midmean` of runs of about `budget_s` together, at least `LEAST_RUNS`; of the processor where ranks share it."""
    if device.type == "cuda":
        return _time_cuda(run, budget_s)
    run(0)
    others = _other_ops()
    times: list[float] = []
    clock = time.thread_time if crowded() else time.perf_counter
    deadline = time.perf_counter() + budget_s
    while len(times) < LEAST_RUNS or (time.perf_counter() < deadline and len(times) < 2000):
        others.run()
        begin = clock()
        run(len(times) + 1)
        times.append(clock() - begin)
    return midmean(times)


def midmean(times: Sequence[float]) -> float:
    """The mean of the middle half: what other programs do to a few of the times leaves it alone."""
    ordered, quarter = sorted(times), len(times) // 4
    return statistics.fmean(ordered[quarter : len(times) - quarter])


class _OtherOps:
    """What a step does between two runs of an op: other ops, small but of many kinds, and a pass over so much memory that neither data nor
    code stays in a core's own caches. (After a product of 1024 x 1024 a GELU of 128 x 1024 takes three times as long as in a loop.)

    Ranks of a node share the outer cache, and in a step each of them fills it with parameters, gradients and state of its own. Here they
    go through the same rows instead, so the pass makes up for that: with 4 ranks small ops take 1.1 to 1.6 times as long behind one of
    16 MiB as behind one of 4 MiB, as they do in the steps of 4 ranks (2 cores, 32 MiB of outer cache)."""

    def __init__(self) -> None:
        self.memory = torch.zeros(PASS_BYTES // 4 * local_ranks())
        self.x = torch.rand(16, 32)
        self.index = torch.arange(16)
        self.run()
        begin = time.perf_counter()
        self.run()
        self.seconds = time.perf_counter() - begin

    def run(self) -> None:
        self.memory.add_(1.0)
        x = torch.addmm(self.x[0], self.x, self.x.t().contiguous() @ self.x)
        x = torch.nn.functional.layer_norm(x, (32,)).view(4, 4, 32).transpose(0, 1)
        x = torch.softmax(torch.bmm(x, x.transpose(1, 2)), -1).reshape(16, 4)
        x = torch.nn.functional.gelu(torch.cat((x, x), 1)).index_select(0, self.index)
        torch.where(x > 0, x, 2 * x).sum(0, keepdim=True).expand(4, 8).clone()


@functools.cache
def _other_ops() -> _OtherOps:
    """One for all rows: its memory takes longer to come from the system than most rows to be timed."""
    return _OtherOps()


class Layers:
    """Layers of many kinds of op, together 0.7 ms of a core: what ranks come from and go back to around a collective.

    While a rank waits, its core runs another rank or what carries the messages, or sleeps. Behind that the rank finds the caches, the
    address translations and the branch predictions of others, and what it runs takes longer, the more the more code it needs until it
    waits again. The data are few: that they are not in the caches is in the prices of the ops."""

    def __init__(self) -> None:
        self.inputs = itertools.cycle([torch.rand(64, 256) for _ in range(4)])
        self.weights = itertools.cycle([torch.rand(256, 256) for _ in range(2)])
        self.bias, self.index = torch.rand(256), torch.arange(64)
        self.image, self.filter = torch.rand(4, 16, 16, 16), torch.rand(16, 16, 3, 3)

    def run(self) -> None:
        """The same ops each time, on other data."""
        x = next(self.inputs)
        for _ in range(4):
            x = self.layer(x)
        self._convolution()
        heads = x.view(4, 16, 256)
        torch.softmax(torch.bmm(heads, heads.transpose(1, 2)), -1).sum(0, keepdim=True).expand(4, 16, 16).clone()

    def layer(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """A seventh of `run`."""
        x = next(self.inputs) if x is None else x
        x = torch.nn.functional.gelu(torch.addmm(self.bias, x, next(self.weights).t()))
        x = torch.nn.functional.layer_norm(x, (256,))
        return x.view(4, 16, 256).transpose(0, 1).reshape(64, 256) + next(self.inputs).index_select(0, self.index)

    def _convolution(self) -> None:
        x = torch.relu(torch.conv2d(self.image, self.filter, padding=1))
        (x * self.bias[:16].view(1, 16, 1, 1)).sum((0, 2, 3))


def view_seconds(budget_s: float = 0.02) -> float:
    """Seconds of an op that only makes a view, the mean of common ones in a row, as a step has them: what dispatching an op costs on the
    host."""
    x = torch.rand(8, 8, 8)
    aten = torch.ops.aten
    found = ((aten.transpose.int, x, 0, 1), (aten.view.default, x, [64, 8]), (aten.reshape.default, x, [8, 64]), (aten.t.default, x[0]))
    calls = [partial(torch_compat.direct_call(op), *args) for op, *args in found]

    def run(_: int) -> None:
        for call in calls:
            call()

    return _time(run, torch.device("cpu"), budget_s) / len(calls)


def crowded() -> bool:
    """Whether this node has more ranks than cores, so that they take turns."""
    return local_ranks() > cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_ranks() -> int:
    """Ranks of the job on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def turns(seconds: float = 1.5) -> float:
    """Wall time over processor time of a busy process while all ranks are: long enough for the scheduler to let each have its turns."""
    a = torch.rand(128, 128)
    wall, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < seconds:
        torch.mm(a, a)
    return (time.perf_counter() - wall) / (time.thread_time() - used)


def _time_cuda(run: Callable[[int], Any], budget_s: float) -> float:
    """Mean seconds of back-to-back runs between two events."""
    for i in range(3):
        run(i)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(0)
    torch.cuda.synchronize()
    runs = int(min(200, max(5, budget_s / max(1e-6, time.perf_counter() - begin))))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(runs):
        run(i)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / runs


# --- copies and disk -------------------------------------------------------------------------------------------------------------------


def copy_points(direction: str, device: torch.device, sizes: Iterable[int], budget_s: float) -> list[list[float]]:
    """[bytes, seconds] of copies between the device and (pinned) host memory; on a CPU, of copies within memory."""
    points = []
    for size in sizes:
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = torch.zeros(size, dtype=torch.uint8, device=device)
        target, source = (host, there) if direction == "device_to_host" else (there, host)
        points.append([float(size), _time(partial(_copy, target, source), device, budget_s)])
    return points


def _copy(target: torch.Tensor, source: torch.Tensor, _: int) -> None:
    target.copy_(source, non_blocking=True)


def disk_points(folder: Path, sizes: Iterable[int], runs: int = 3) -> dict[str, list[list[float]]]:
    """{"write": ..., "read": ...} as [bytes, seconds]: written through to the disk, read with the page cache dropped where possible."""
    points: dict[str, list[list[float]]] = {"write": [], "read": []}
    with tempfile.TemporaryDirectory(dir=folder, prefix="opweave-") as made:
        path = Path(made) / "probe"
        for size in sizes:
            data = os.urandom(size)
            times = [(_write(path, data), _read(path)) for _ in range(runs)]
            points["write"].append([float(size), statistics.median(t[0] for t in times)])
            points["read"].append([float(size), statistics.median(t[1] for t in times)])
    return points


def _write(path: Path, data: bytes) -> float:
    begin = time.perf_counter()
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - begin


def _read(path: Path) -> float:
    with path.open("rb") as source:
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        source.read()
        return time.perf_counter() - begin
