"""What calibration times: ops over sizes and dtypes, copies, disk, updates. Rows of (op, arguments); their work follows from the shapes.

In a training step each op finds other data in the caches and other code in the processor than its own. So inputs are taken in turn from
several copies that together exceed the caches, and on a CPU a few other ops run, untimed, before each timed run. A time is the lower
quintile of the runs, which other programs on the machine disturb little. On a GPU a run is timed between two events, on a CPU by the clock.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .work import Work, op_work

ROTATE_BYTES = 32 << 20

# Builds the arguments of one call on a device in a dtype.
Build = Callable[[torch.device, torch.dtype], Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement. name: unique among the rows. op: as `op_work` knows it, "aten.mm.default"."""

    name: str
    op: str
    dtype: torch.dtype
    build: Build
    num_bytes: int  # of one call's inputs and outputs, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What was measured: the work of one call, and its seconds."""

    work: Work
    dtype: str
    seconds: float


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the rows ------------------------------------------------------------------------------------------------------------------------


def _random(*shape: int) -> Callable[[torch.device, torch.dtype], torch.Tensor]:
    return lambda device, dtype: torch.rand(shape, device=device, dtype=dtype)


def _call(op: str, label: str, dtype: torch.dtype, parts: Sequence[Any], elements: int) -> Row:
    """A row whose arguments are constants and, where a part is a function of (device, dtype), what it makes."""

    def build(device: torch.device, dtype: torch.dtype) -> list[Any]:
        return [part(device, dtype) if callable(part) else part for part in parts]

    return Row(name=f"{op}/{dtype_name(dtype)}/{label}", op=op, dtype=dtype, build=build, num_bytes=elements * dtype.itemsize)


_PRODUCTS = (
    (16, 64, 64), (64, 64, 64), (64, 256, 64), (128, 128, 128), (256, 64, 256), (64, 512, 512), (256, 256, 256), (256, 256, 1024),
    (1024, 256, 256), (128, 1024, 512), (512, 512, 512), (1024, 128, 1024), (512, 512, 2048), (2048, 512, 512), (1024, 1024, 1024),
    (256, 2048, 2048), (2048, 1024, 1024),
)  # fmt: skip
_ATTENTION = ((1, 2, 64, 32), (2, 4, 64, 32), (4, 4, 128, 32), (2, 8, 128, 64), (8, 4, 128, 64), (4, 8, 256, 64), (1, 8, 512, 64))
_CONVS = ((2, 8, 16, 3), (4, 16, 16, 3), (4, 32, 16, 3), (4, 64, 16, 1), (8, 32, 32, 3), (8, 64, 16, 3), (4, 128, 16, 3), (8, 64, 32, 1))
_GRIDS = ((16, 64), (64, 64), (128, 128), (256, 256), (256, 1024), (1024, 512), (1024, 1024), (2048, 2048))
_TABLES = ((512, 64, 64), (1000, 128, 512), (8000, 128, 1024), (8000, 512, 1024), (32000, 512, 2048))


def _t(*shape: int) -> Callable[[torch.device, torch.dtype], torch.Tensor]:
    """The transpose of a matrix as a view, as backward passes have it."""
    return lambda device, dtype: torch.rand(shape, device=device, dtype=dtype).t()


def _matmul_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for m, k, n in ((m * scale, k * scale, n * scale) for m, k, n in _PRODUCTS):
        label, size = f"{m}x{k}x{n}", m * k + k * n + m * n
        yield _call("aten.mm.default", label, dtype, [_random(m, k), _random(k, n)], size)
        yield _call("aten.mm.default", label + "t", dtype, [_random(m, k), _t(n, k)], size)
        yield _call("aten.addmm.default", label + "t", dtype, [_random(n), _random(m, k), _t(n, k)], size)
        yield _call("aten.mm.default", label + "tt", dtype, [_t(k, m), _random(k, n)], size)
    for b, m, k, n in ((4, 64, 32, 64), (8, 128, 64, 128), (16, 128, 128, 32), (32, 128, 64, 128)):
        b = b * scale
        yield _call("aten.bmm.default", f"{b}x{m}x{k}x{n}", dtype, [_random(b, m, k), _random(b, k, n)], b * (m * k + k * n + m * n))


def _attention_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for b, h, s, d in _ATTENTION:
        shape = (b * scale, h, s * scale, d)
        for causal in (False, True):
            parts = [_random(*shape)] * 3 + [None, causal, d**-0.5]
            label = "x".join(map(str, shape)) + ("c" if causal else "")
            yield _call("opweave.attention.default", label, dtype, parts, 4 * math.prod(shape))

            def build(device: torch.device, dtype: torch.dtype, shape: Any = shape, causal: bool = causal) -> list[Any]:
                q, k, v, grad = (torch.rand(shape, device=device, dtype=dtype) for _ in range(4))
                out, lse = torch.ops.opweave.attention(q, k, v, None, causal, shape[-1] ** -0.5)
                return [grad, q, k, v, None, out, lse, causal, shape[-1] ** -0.5]

            op = "opweave.attention_backward.default"
            yield Row(
                name=f"{op}/{dtype_name(dtype)}/{label}", op=op, dtype=dtype, build=build, num_bytes=8 * math.prod(shape) * dtype.itemsize
            )


def _conv_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for n, c, size, kernel in _CONVS:
        n = n * scale * scale
        x, w, pad = _random(n, c, size, size), _random(c, c, kernel, kernel), kernel // 2
        label, elements = f"{n}x{c}x{size}k{kernel}", 2 * n * c * size * size + c * c * kernel * kernel
        geometry = [[1, 1], [pad, pad], [1, 1], False, [0, 0], 1]
        yield _call("aten.convolution.default", label, dtype, [x, w, None, *geometry], elements)
        both = [x, x, w, None, *geometry, [True, True, False]]
        yield _call("aten.convolution_backward.default", label, dtype, both, 2 * elements)


def _grid_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    """Everything that goes over a matrix once."""
    for rows, columns in ((r * scale, c * scale) for r, c in _GRIDS):
        x, label, n = _random(rows, columns), f"{rows}x{columns}", 2 * rows * columns
        stat = _random(rows, 1)
        norm = [_random(columns), _random(columns)]
        yield _call("aten.native_layer_norm.default", label, dtype, [x, [columns], *norm, 1e-5], n)
        back = [x, x, [columns], stat, stat, *norm, [True, True, True]]
        yield _call("aten.native_layer_norm_backward.default", label, dtype, back, 2 * n)
        for op in ("_softmax", "_log_softmax"):
            yield _call(f"aten.{op}.default", label, dtype, [x, -1, False], n)
            yield _call(f"aten.{op}_backward_data.default", label, dtype, [x, x, -1, dtype], n)
        for op in ("aten.add.Tensor", "aten.mul.Tensor", "aten.threshold_backward.default"):
            parts = [x, x, 0.0] if "threshold" in op else [x, x]
            yield _call(op, label, dtype, parts, n)
        yield _call("aten.mul.Scalar", label, dtype, [x, 2.0], n)
        yield _call("aten.add.Tensor", label + "row", dtype, [x, _random(columns)], n)
        for op in ("gelu", "silu", "exp", "tanh"):
            yield _call(f"aten.{op}.default", label, dtype, [x], n)
        for op in ("gelu_backward", "silu_backward"):
            yield _call(f"aten.{op}.default", label, dtype, [x, x], n)
        for dim in (0, 1):
            yield _call("aten.sum.dim_IntList", f"{label}d{dim}", dtype, [x, [dim]], n // 2)
        yield _call("aten.amax.default", label, dtype, [x, [1]], n // 2)
        yield _call("aten.clone.default", label, dtype, [x], n)
        yield _call("aten.cat.default", label, dtype, [lambda device, dtype, x=x: [x(device, dtype), x(device, dtype)]], 2 * n)

        def transposed(device: torch.device, dtype: torch.dtype, x: Any = x) -> torch.Tensor:
            return x(device, dtype).t()

        yield _call("aten.contiguous.default", label + "t", dtype, [transposed], n)


def _table_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for entries, width, count in _TABLES:
        width, count = width * scale, count * scale

        def index(device: torch.device, dtype: torch.dtype, entries: int = entries, count: int = count) -> torch.Tensor:
            return torch.randint(0, entries, (count,), device=device)

        label = f"{entries}x{width}n{count}"
        yield _call("aten.embedding.default", label, dtype, [_random(entries, width), index], entries * width + count * width)
        back = [_random(count, width), index, entries, -1, False]
        yield _call("aten.embedding_dense_backward.default", label, dtype, back, entries * width + count * width)


def _update_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for elements in (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22):
        elements *= scale * scale
        yield Row(
            name=f"opweave.update/{dtype_name(dtype)}/{elements}", op="opweave.update", dtype=dtype,
            build=partial(_update, elements), num_bytes=4 * elements * dtype.itemsize,
        )  # fmt: skip


def _update(elements: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
    return [_Update(elements, device, dtype)]


class _Update:
    """One fused AdamW step over some parameters of n elements each, as a model has many."""

    def __init__(self, elements: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_parameters = 16 if elements <= 1 << 17 else 1
        self.shape = (elements,)
        made = [torch.nn.Parameter(torch.zeros(elements, device=device, dtype=dtype)) for _ in range(self.num_parameters)]
        for parameter in made:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer = torch.optim.AdamW(made, lr=1e-3, fused=True)

    def __call__(self) -> None:
        self.optimizer.step()


def rows(dtypes: Iterable[torch.dtype], *, scale: int = 1, quick: bool = False) -> list[Row]:
    """All measurements. scale: multiplies the sizes (GPUs need larger ones). quick: every third one."""
    makers = (_matmul_rows, _attention_rows, _conv_rows, _grid_rows, _table_rows, _update_rows)
    found = [row for dtype in dtypes for maker in makers for row in maker(dtype, scale)]
    return found[::3] if quick else found


# --- timing --------------------------------------------------------------------------------------------------------------------------


def _function(op: str) -> Callable[..., Any]:
    if op == "opweave.update":
        return lambda update: update()
    if op == "aten.contiguous.default":
        return torch.Tensor.contiguous
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        found += [value] if isinstance(value, torch.Tensor) else _tensors(value) if isinstance(value, list | tuple) else []
    return found


def _work(row: Row, args: Sequence[Any], result: Any) -> Work:
    if row.op == "opweave.update":
        shape = args[0].shape
        return op_work("opweave::update", [shape] * 4, [shape] * 3, (), row.dtype.itemsize, row.dtype.itemsize)
    ins, outs = _tensors(args), _tensors(result if isinstance(result, list | tuple) else [result])
    plain = [arg for arg in args if not isinstance(arg, torch.Tensor)]
    return op_work(
        row.op, [tuple(t.shape) for t in ins], [tuple(t.shape) for t in outs], plain,
        [t.element_size() for t in ins], [t.element_size() for t in outs],
    )  # fmt: skip


def measure(row: Row, device: torch.device, *, budget_s: float) -> Timing | None:
    """Time one row; None where this device or build has no such kernel."""
    function = _function(row.op)
    try:
        args = row.build(device, row.dtype)
        with torch.no_grad():
            result = function(*args)
    except (RuntimeError, NotImplementedError):
        return None
    work = _work(row, args, result)
    copies = min(16, max(1, ROTATE_BYTES // max(1, row.num_bytes)))
    inputs = [args, *(row.build(device, row.dtype) for _ in range(copies - 1))]
    with torch.no_grad():
        seconds = _time(lambda i: function(*inputs[i % copies]), device, budget_s)
    if row.op == "opweave.update":
        seconds /= args[0].num_parameters
    return Timing(work=work, dtype=dtype_name(row.dtype), seconds=seconds)


def _time(run: Callable[[int], Any], device: torch.device, budget_s: float) -> float:
    """Seconds of one run: the lower quintile of runs of about `budget_s` together, at least 5."""
    if device.type == "cuda":
        return _time_cuda(run, budget_s)
    run(0)
    others = _OtherOps()
    times: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 2000):
        others.run()
        begin = time.perf_counter()
        run(len(times) + 1)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 5]


class _OtherOps:
    """What a step does between two runs of an op: another product, a normalisation, a pass over some memory."""

    def __init__(self) -> None:
        self.memory = torch.zeros(1 << 18)
        self.matrix = torch.rand(32, 32)

    def run(self) -> None:
        self.memory.add_(1.0)
        torch.nn.functional.layer_norm(torch.mm(self.matrix, self.matrix).t(), (32,)).tanh_().sum()


def view_seconds(budget_s: float = 0.02) -> float:
    """Seconds of an op that only makes a view: what dispatching an op costs on the host."""
    x = torch.rand(8, 8)
    return _time(lambda _: torch.ops.aten.t.default(x), torch.device("cpu"), budget_s)


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
