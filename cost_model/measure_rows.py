"""The rows of a calibration: every op that is timed, with its arguments, over sizes and layouts. Work follows from the shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

# Builds the arguments of one call on a device in a dtype.
Build = Callable[[torch.device, torch.dtype], Sequence[Any]]
Make = Callable[[torch.device, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement. name: unique among the rows. op: as `op_work` knows it, "aten.mm.default"."""

    name: str
    op: str
    dtype: torch.dtype
    build: Build
    num_bytes: int  # of one call's inputs and outputs, about


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(*shape: int) -> Make:
    return lambda device, dtype: torch.rand(shape, device=device, dtype=dtype)


def _transposed(*shape: int) -> Make:
    """The transpose of a matrix as a view, as backward passes have it."""
    return lambda device, dtype: torch.rand(shape, device=device, dtype=dtype).t()


def _heads(rows: int, columns: int) -> Make:
    """Heads before rows, as a view: what attention reads."""
    return lambda device, dtype: torch.rand((rows, columns // 32, 32), device=device, dtype=dtype).transpose(0, 1)


def _indices(count: int, below: int) -> Make:
    return lambda device, dtype: torch.randint(0, below, (count,), device=device)


def _call(op: str, label: str, dtype: torch.dtype, parts: Sequence[Any], elements: int) -> Row:
    """A row whose arguments are constants and, where a part is a function of (device, dtype), what it makes."""

    def build(device: torch.device, dtype: torch.dtype) -> list[Any]:
        return [part(device, dtype) if callable(part) else part for part in parts]

    return Row(name=f"{op}/{dtype_name(dtype)}/{label}", op=op, dtype=dtype, build=build, num_bytes=elements * dtype.itemsize)


# --- matrix work ---------------------------------------------------------------------------------------------------------------------

_PRODUCTS = (
    (16, 64, 64), (64, 64, 64), (64, 256, 64), (128, 128, 128), (256, 64, 256), (512, 32, 512), (64, 512, 512), (256, 256, 256),
    (512, 192, 192), (256, 256, 1024), (1024, 256, 256), (128, 1024, 512), (512, 256, 768), (64, 1024, 1024), (512, 512, 512),
    (1024, 128, 1024), (512, 256, 2048), (2048, 512, 512), (512, 512, 2048), (1024, 1024, 1024), (256, 2048, 2048), (2048, 1024, 1024),
    # Thin ones, as a split leaves them: few rows times a whole weight, and the gradient of such a weight.
    (16, 512, 512), (32, 768, 768), (768, 32, 768), (32, 1536, 768), (32, 2048, 2048), (512, 16, 1024), (512, 256, 16),
    # Sides that are no powers of two.
    (96, 160, 224), (48, 320, 320), (192, 320, 192), (96, 768, 192), (160, 256, 384), (384, 192, 320), (768, 96, 384),
)  # fmt: skip
_BATCHED = ((4, 64, 32, 64), (16, 48, 32, 48), (8, 128, 64, 128), (16, 128, 128, 32), (32, 64, 32, 64), (32, 128, 64, 128))
_ATTENTION = (
    (1, 2, 64, 32), (2, 4, 64, 32), (4, 2, 64, 32), (8, 8, 64, 32), (4, 4, 128, 32), (2, 8, 128, 64), (8, 4, 128, 64), (4, 8, 256, 64),
    (1, 8, 512, 64),
)  # fmt: skip
# samples, channels in and out, side of the image, side of the kernel, stride
_CONVS = (
    (2, 8, 8, 16, 3, 1), (4, 16, 16, 16, 3, 1), (4, 32, 32, 16, 3, 1), (4, 64, 64, 16, 1, 1), (8, 32, 32, 32, 3, 1), (8, 64, 64, 16, 3, 1),
    (4, 128, 128, 8, 3, 1), (16, 128, 128, 8, 3, 1), (8, 64, 64, 32, 1, 1), (16, 3, 32, 32, 3, 1), (8, 3, 64, 64, 7, 2),
    (16, 3, 64, 64, 8, 8), (16, 32, 64, 32, 3, 2), (8, 64, 128, 16, 3, 2), (8, 32, 64, 32, 1, 2), (16, 16, 64, 32, 3, 1),
    (4, 256, 256, 8, 3, 1),
)  # fmt: skip


def _matmul_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for m, k, n in ((m * scale, k * scale, n * scale) for m, k, n in _PRODUCTS):
        label, size = f"{m}x{k}x{n}", m * k + k * n + m * n
        yield _call("aten.mm.default", label, dtype, [_random(m, k), _random(k, n)], size)
        yield _call("aten.mm.default", label + "t", dtype, [_random(m, k), _transposed(n, k)], size)
        yield _call("aten.addmm.default", label + "t", dtype, [_random(n), _random(m, k), _transposed(n, k)], size)
        yield _call("aten.mm.default", label + "tt", dtype, [_transposed(k, m), _random(k, n)], size)
    for b, m, k, n in _BATCHED:
        b = b * scale
        yield _call("aten.bmm.default", f"{b}x{m}x{k}x{n}", dtype, [_random(b, m, k), _random(b, k, n)], b * (m * k + k * n + m * n))


def _attention_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for b, h, s, d in _ATTENTION:
        shape = (b * scale, h, s * scale, d)
        for causal in (False, True):
            parts = [_random(*shape)] * 3 + [None, causal, d**-0.5]
            label = "x".join(map(str, shape)) + ("c" if causal else "")
            yield _call("opweave.attention.default", label, dtype, parts, 4 * math.prod(shape))
            op = "opweave.attention_backward.default"
            yield Row(
                name=f"{op}/{dtype_name(dtype)}/{label}", op=op, dtype=dtype, build=partial(_attention_gradient, shape, causal),
                num_bytes=8 * math.prod(shape) * dtype.itemsize,
            )  # fmt: skip


def _attention_gradient(shape: tuple[int, ...], causal: bool, device: torch.device, dtype: torch.dtype) -> list[Any]:
    q, k, v, grad = (torch.rand(shape, device=device, dtype=dtype) for _ in range(4))
    out, lse = torch.ops.opweave.attention(q, k, v, None, causal, shape[-1] ** -0.5)
    return [grad, q, k, v, None, out, lse, causal, shape[-1] ** -0.5]


def _conv_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for n, before, after, side, kernel, stride in _CONVS:
        n, pad = n * scale * scale, 0 if stride == kernel else kernel // 2
        out = (side + 2 * pad - kernel) // stride + 1
        x, w, grad = _random(n, before, side, side), _random(after, before, kernel, kernel), _random(n, after, out, out)
        label = f"{n}x{before}x{after}x{side}k{kernel}s{stride}"
        elements = n * (before * side * side + after * out * out) + before * after * kernel * kernel
        geometry = [[stride, stride], [pad, pad], [1, 1], False, [0, 0], 1]
        yield _call("aten.convolution.default", label, dtype, [x, w, None, *geometry], elements)
        # One gradient at a time, as a step has them: the first layer needs that of its weight only.
        masks = [("w", [False, True, False])] + ([("x", [True, False, False])] if before > 3 else [])
        for which, mask in masks:
            yield _call("aten.convolution_backward.default", label + which, dtype, [grad, x, w, None, *geometry, mask], 2 * elements)


# --- what goes over memory -------------------------------------------------------------------------------------------------------------

_GRIDS = ((16, 64), (64, 64), (64, 256), (128, 128), (512, 128), (256, 256), (512, 256), (256, 1024), (512, 512), (1024, 512), (1024, 1024),
          (512, 4096))  # fmt: skip
_IMAGES = ((4, 8, 8), (4, 32, 8), (8, 32, 16), (16, 32, 16), (16, 64, 16), (16, 32, 32), (16, 64, 32), (32, 64, 32))
# entries, width, how many are looked up: fewer than there are, as words are, or every one many times, as nodes of a graph
_TABLES = ((512, 64, 64), (128, 256, 512), (1000, 128, 512), (1024, 256, 1024), (4096, 256, 512), (8000, 512, 1024), (32000, 512, 2048),
           (128, 64, 1024), (256, 128, 4096), (2048, 128, 8192))  # fmt: skip


def _grid_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    """Everything that goes over a matrix once."""
    for rows, columns in ((r * scale, c * scale) for r, c in _GRIDS):
        x, label, n = _random(rows, columns), f"{rows}x{columns}", 2 * rows * columns
        for op, parts in itertools.chain(_pointwise(x, columns), _normalised(x, rows, columns, dtype), _summed(x, rows, columns)):
            name, _, variant = op.partition("|")
            yield _call(f"aten.{name}", label + variant, dtype, parts, n)
        yield _call("aten.contiguous.default", label + "t", dtype, [_transposed(columns, rows)], n)
        yield _call("aten.clone.default", label + "heads", dtype, [_heads(rows, columns)], n)


def _pointwise(x: Make, columns: int) -> Iterator[tuple[str, list[Any]]]:
    for op in ("add.Tensor", "mul.Tensor"):
        yield op, [x, x]
        yield f"{op}|row", [x, _random(columns)]
    yield "threshold_backward.default", [x, x, 0.0]
    yield "mul.Scalar", [x, 2.0]
    yield "pow.Tensor_Scalar", [x, 2.0]
    for op in ("relu", "gelu", "silu", "exp", "tanh", "rsqrt", "clone"):
        yield f"{op}.default", [x]
    for op in ("gelu_backward", "silu_backward"):
        yield f"{op}.default", [x, x]
    yield "cat.default", [lambda device, dtype: [x(device, dtype), x(device, dtype)], -1]


def _normalised(x: Make, rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Any]]]:
    stat, norm = _random(rows, 1), [_random(columns), _random(columns)]
    yield "native_layer_norm.default", [x, [columns], *norm, 1e-5]
    yield "native_layer_norm_backward.default", [x, x, [columns], stat, stat, *norm, [True, True, True]]
    yield "_safe_softmax.default", [x, -1]
    for op in ("_softmax", "_log_softmax"):
        yield f"{op}.default", [x, -1, False]
        yield f"{op}_backward_data.default", [x, x, -1, dtype]


def _summed(x: Make, rows: int, columns: int) -> Iterator[tuple[str, list[Any]]]:
    for dim in (0, 1):
        yield f"sum.dim_IntList|d{dim}", [x, [dim], True]
    yield "mean.dim", [x, [1], True]
    yield "amax.default", [x, [1]]
    classes = _indices(rows, columns)
    yield "nll_loss_forward.default", [x, classes, None, 1, -100]
    scalar = _random()
    yield "nll_loss_backward.default", [scalar, x, classes, None, 1, -100, scalar]


def _image_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    """What goes over images: batch norm and pooling."""
    for n, channels, side in ((n * scale * scale, c, s) for n, c, s in _IMAGES):
        x, label, elements = _random(n, channels, side, side), f"{n}x{channels}x{side}", 2 * n * channels * side * side
        c = [_random(channels) for _ in range(4)]
        yield _call("aten._native_batch_norm_legit_functional.default", label, dtype, [x, *c, True, 0.1, 1e-5], elements)
        gradient = [x, x, c[0], c[1], c[2], c[3], c[3], True, 1e-5, [True, True, True]]
        yield _call("aten.native_batch_norm_backward.default", label, dtype, gradient, 2 * elements)
        yield _call("opweave.channel_moments", label, dtype, [x, torch.float32], elements)
        yield _call("aten.mean.dim", label, dtype, [x, [2, 3], True], elements)
        for kernel, stride in ((2, 2), (3, 2)):
            pad = kernel // 2 if kernel == 3 else 0
            pool, half = [[kernel, kernel], [stride, stride], [pad, pad], [1, 1], False], side // 2
            yield _call("aten.max_pool2d_with_indices.default", f"{label}k{kernel}", dtype, [x, *pool], elements)
            places = partial(_places, (n, channels, half, half))
            back = [_random(n, channels, half, half), x, *pool, places]
            yield _call("aten.max_pool2d_with_indices_backward.default", f"{label}k{kernel}", dtype, back, elements)


def _places(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Where the largest elements of 2 x 2 windows are: their first ones."""
    rows, columns = (torch.arange(n, device=device) * 2 for n in shape[2:])
    return (rows[:, None] * (2 * shape[3]) + columns).expand(shape).contiguous()


def _table_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for entries, width, count in _TABLES:
        width, count = width * scale, count * scale
        table, index, found = _random(entries, width), _indices(count, entries), _random(count, width)
        label, elements = f"{entries}x{width}n{count}", entries * width + count * width
        yield _call("aten.embedding.default", label, dtype, [table, index], elements)
        yield _call("aten.index_select.default", label, dtype, [table, 0, index], elements)
        yield _call("aten.embedding_dense_backward.default", label, dtype, [found, index, entries, -1, False], elements)
        yield _call("aten.index_add.default", label, dtype, [table, 0, index, found], 2 * elements)

        def listed(device: torch.device, dtype: torch.dtype, index: Make = index) -> Any:
            return [index(device, dtype)]

        yield _call("aten.index.Tensor", label, dtype, [table, listed], elements)
        yield _call("aten.index_put.default", label, dtype, [table, listed, found, True], 2 * elements)


# --- updates -----------------------------------------------------------------------------------------------------------------------------


def _update_rows(dtype: torch.dtype, scale: int) -> Iterator[Row]:
    for elements in (1 << 6, 1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22):
        elements *= scale * scale
        yield Row(
            name=f"opweave.update/{dtype_name(dtype)}/{elements}", op="opweave.update", dtype=dtype, build=partial(_update, elements),
            num_bytes=4 * elements * Update.number(elements) * dtype.itemsize,
        )  # fmt: skip


def _update(elements: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
    return [Update(elements, device, dtype)]


class Update:
    """The tensors of one update: some parameters of n elements each, as a model has many, with their gradients and AdamW's state."""

    def __init__(self, elements: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_parameters = self.number(elements)
        self.shape = (elements,)
        # Not of zeros: memory that was never written is one and the same page, which stays in the caches.
        make = partial(torch.full, (elements,), 0.5, device=device, dtype=dtype)
        self.params, self.grads = ([make() for _ in range(self.num_parameters)] for _ in range(2))
        self.states = [[make(), make()] for _ in range(self.num_parameters)]

    def clone(self) -> Update:
        """The same in other memory."""
        return Update(self.shape[0], self.params[0].device, self.params[0].dtype)

    @staticmethod
    def number(elements: int) -> int:
        """Parameters in one call: as many as a small model has, together with their state more than the caches hold where one has 256 KiB
        or more."""
        return max(2, min(16, (1 << 22) // elements))


def rows(dtypes: Iterable[torch.dtype], *, scale: int = 1, quick: bool = False) -> list[Row]:
    """All measurements. scale: multiplies the sizes (GPUs need larger ones). quick: every third one of each op."""
    makers = (_matmul_rows, _attention_rows, _conv_rows, _grid_rows, _image_rows, _table_rows, _update_rows)
    found = [row for dtype in dtypes for maker in makers for row in maker(dtype, scale)]
    if not quick:
        return found
    by_op: dict[str, list[Row]] = {}
    for row in found:
        by_op.setdefault(row.op, []).append(row)
    return [row for same in by_op.values() for row in same[::3]]
