"""How much an op has to do: floating-point operations, bytes moved and a class, from shapes alone.

`op_work` is called for every strategy of every op with the *local* shapes, so it is pure and takes a few microseconds. It knows names
and shapes, no graphs. Conventions:

- flops count a multiply-add as two. bytes are every input read once and every output written once, as a fused kernel would.
- `min_dim` is the smaller side of a matrix product's result, which bounds how well tiles fill: few rows or columns leave them empty,
  a short reduction does not (16 x 512 x 512 runs at 62 GFLOP/s, 512 x 16 x 1024 at 87, 512 x 32 x 512 at 100, on a core that reaches 110).
  Of a convolution, which is brought into another layout first, the reduction counts as well.
- Views move nothing. An op that is not known by name counts as pointwise over what it reads and writes: class "other".
- A reduction that keeps the last dimension goes over memory in another order, so it counts as an op of its own: "reduction:sum_outer";
  so does a convolution's backward pass without the gradient of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

OP_CLASSES = (
    "matmul", "attention", "attention_backward", "conv", "conv_backward", "moe", "moe_backward", "norm", "norm_backward", "softmax",
    "softmax_backward", "pointwise", "transcendental", "reduction", "embedding", "scatter", "update", "copy", "view", "other",
)  # fmt: skip

Shape = tuple[int, ...] | None  # None: an output that is not computed, such as a gradient that nobody asked for
Shapes = Sequence[Shape]


class Work(NamedTuple):
    """What one op does on one device. op_class: one of OP_CLASSES, with the op where it has a name of its own: "norm:native_layer_norm"."""

    flops: float
    bytes: float
    op_class: str
    min_dim: int = 1 << 30


class _Op(NamedTuple):
    op_class: str
    measure: Callable[[Shapes, Shapes, Sequence[Any]], tuple[float, int]] | None = None
    flops_per_element: float = 1.0


NO_WORK = Work(0.0, 0.0, "view")
_WHOLE = 1 << 30


def op_work(
    target: str,
    in_shapes: Shapes,
    out_shapes: Shapes,
    args: Sequence[Any] = (),
    in_itemsize: int | Sequence[int] = 4,
    out_itemsize: int | Sequence[int] = 4,
    share: float = 1.0,
) -> Work:
    """Work of one op.

    target: "aten.mm.default", "mm", "aten::mm.out" or "opweave::attention". in_shapes, out_shapes: of its tensor operands and results, in
    order. args: its other arguments in order (flags and sizes; only convolutions and attention look at them). itemsizes: bytes
    per element, one for all or one each. share: part of the work that falls to this device where shapes do not say it (experts here of
    all experts).
    """
    op, op_class = _lookup(target)
    if op.op_class == "view":
        return NO_WORK
    moved = _bytes(op, in_shapes, out_shapes, in_itemsize, out_itemsize)
    if op.measure is None:
        flops = op.flops_per_element * max(_elements(in_shapes), _elements(out_shapes))
        return Work(flops * share, moved, op_class + _order(op, in_shapes, args))
    flops, min_dim = op.measure(in_shapes, out_shapes, args)
    if op.op_class == "conv_backward" and out_shapes and out_shapes[0] is None:
        op_class += "_weight"
    return Work(flops * share, moved, op_class, min_dim)


def _order(op: _Op, in_shapes: Shapes, args: Sequence[Any]) -> str:
    """"_outer" for a reduction over a list of dimensions without the last one."""
    if op.op_class != "reduction" or not in_shapes or in_shapes[0] is None or not args or not isinstance(args[0], list | tuple):
        return ""
    dims, last = args[0], len(in_shapes[0]) - 1
    return "" if not dims or -1 in dims or last in dims else "_outer"


def _elements(shapes: Shapes) -> int:
    """Elements of the largest of these tensors."""
    largest = 0
    for shape in shapes:
        if shape is not None:
            largest = max(largest, prod(shape))
    return largest


def _moved(shapes: Shapes, itemsize: int | Sequence[int]) -> float:
    total = 0
    if isinstance(itemsize, int):
        for shape in shapes:
            if shape is not None:
                total += prod(shape)
        return total * itemsize
    for shape, size in zip(shapes, itemsize, strict=True):
        if shape is not None:
            total += prod(shape) * size
    return total


def _bytes(op: _Op, ins: Shapes, outs: Shapes, in_size: int | Sequence[int], out_size: int | Sequence[int]) -> float:
    written = _moved(outs, out_size)
    if op.op_class == "embedding":  # only the rows that are looked up, and each once
        return written + min(written, _moved(ins[:1], in_size if isinstance(in_size, int) else in_size[:1]))
    if op is _FILL:
        return written
    if op is _ACCUMULATE:  # the sum is read, too
        return 2 * written + _moved(ins, in_size)
    return written + _moved(ins, in_size)


# --- matrix products ------------------------------------------------------------------------------------------------------------


def _mm(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    a, b = ins[-2], ins[-1]
    assert a is not None and b is not None
    columns = b[-1] if len(b) > 1 else 1
    return 2.0 * prod(a) * columns, min(a[-2] if len(a) > 1 else 1, columns)


def _linear(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    x, weight = ins[0], ins[1]
    assert x is not None and weight is not None
    return 2.0 * prod(x) * weight[0], min(prod(x[:-1]), weight[0])


def _grouped_mm(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """_grouped_mm(a, b, offsets): ragged rows (2-D times 3-D) or ragged reduction (2-D times 2-D)."""
    a, b = ins[0], ins[1]
    assert a is not None and b is not None
    if len(b) == 3:
        return 2.0 * prod(a) * b[-1], min(max(1, a[-2] // b[0]), b[-1])
    return 2.0 * prod(a) * b[-1], min(a[-2], b[-1])


# --- attention, experts, convolution ----------------------------------------------------------------------------------------------


# An exponential per score takes as long as this many flops of a product: 64 on an A100 (16 exponentials a clock and multiprocessor
# against 1024 half-precision multiply-adds), and about as many on a CPU with AVX-512 (measured: 1.6 ns per score at 98 GFLOP/s).
_SOFTMAX_FLOPS = 64
# Kernels skip what a causal mask hides in blocks; keys come in blocks of up to 512, so short sequences skip nothing.
_CAUSAL_BLOCK = 512


def _attention(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """Two products of (s, d, t) and (s, t, e) per head and a softmax; a causal mask (first True argument) skips up to half of it."""
    q, k, v = ins[0], ins[1], ins[2]
    assert q is not None and k is not None and v is not None
    kept = 0.5 + 0.5 * min(1.0, _CAUSAL_BLOCK / k[-2]) if any(arg is True for arg in args) else 1.0
    return kept * prod(q[:-1]) * k[-2] * (2.0 * (q[-1] + v[-1]) + _SOFTMAX_FLOPS), min(q[-2], k[-2], q[-1])


# What it takes to add an element where its index says, in flops (measured on a CPU with AVX-512: 0.36 ns at 98 GFLOP/s).
_SCATTER_FLOPS = 36.0


def _scatter(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """scatter(x, index, values): as many as there are values, or indices. That the rest of x is copied counts as bytes."""
    return _SCATTER_FLOPS * _elements(ins[1:]), _WHOLE


def _scatter_rows(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """embedding_dense_backward(rows, index)."""
    return _SCATTER_FLOPS * _elements(ins[:1]), _WHOLE


def _attention_backward(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """Five products instead of two: scores are recomputed (FlashAttention, Dao 2022)."""
    flops, min_dim = _attention(ins[1:], outs, args)
    return 2.5 * flops, min_dim


def _experts(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """moe_mlp(x (t i), index (t k), weights (t k), gate_up (e 2f i), down (e o f)): t*k rows through both products."""
    x, index, gate_up, down = ins[0], ins[1], ins[3], ins[4]
    assert x is not None and index is not None and gate_up is not None and down is not None
    rows = prod(index)
    flops = 2.0 * rows * (prod(gate_up[1:]) + prod(down[1:]))
    return flops, min(max(1, rows // gate_up[0]), gate_up[1], x[-1])


def _experts_backward(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """Gradients of inputs and of weights, after the inner activations were computed again."""
    flops, min_dim = _experts(ins[1:], outs, args)
    return 3.0 * flops, min_dim


def _convolution(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """Each output element is a product over input channels of its group and the kernel; transposed: each input element."""
    x, weight, out = ins[0], ins[1], outs[0]
    assert x is not None and weight is not None and out is not None
    transposed = next((arg for arg in args if isinstance(arg, bool)), False)
    inner = prod(weight[1:])
    return 2.0 * inner * prod(x if transposed else out), min(weight[0], inner)


def _convolution_backward(ins: Shapes, outs: Shapes, args: Sequence[Any]) -> tuple[float, int]:
    """convolution_backward(grad, x, weight) -> grad of x, weight, bias; each of the first two costs as much as the forward."""
    flops, min_dim = _convolution(ins[1:], ins[:1], args)
    return flops * sum(out is not None for out in outs[:2]), min_dim


# --- the table -------------------------------------------------------------------------------------------------------------------

_FILL = _Op("copy", None, 0.0)
_ACCUMULATE = _Op("pointwise")
_VIEW = _Op("view")


def _rows(op: _Op, names: str) -> dict[str, _Op]:
    return dict.fromkeys(names.split(), op)


# Elementwise functions that take tens of operations per element: their cost on a CPU with vector math, in adds.
_TRANSCENDENTAL = {
    10: "silu sigmoid log_sigmoid_forward log_sigmoid_backward",
    20: "gelu silu_backward exp exp2 expm1 log log2 log1p erf softplus softplus_backward elu elu_backward mish",
    30: "gelu_backward sin cos pow logit mish_backward erfinv atan atan2 asin acos",
    70: "tanh",
}
_ELEMENTWISE = """add sub mul div neg reciprocal sqrt rsqrt abs sign relu leaky_relu leaky_relu_backward hardtanh hardtanh_backward
    hardswish hardswish_backward hardsigmoid hardsigmoid_backward threshold threshold_backward tanh_backward sigmoid_backward
    clamp clamp_min clamp_max minimum maximum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not
    bitwise_and bitwise_or bitwise_not
    bitwise_xor addcmul addcdiv lerp square floor ceil round trunc remainder fmod isnan isinf isfinite floor_divide rsub tril triu"""

OPS: dict[str, _Op] = {
    **_rows(_Op("matmul", _mm), "mm bmm mv dot addmm baddbmm matmul addmv addbmm"),
    "linear": _Op("matmul", _linear),
    "_grouped_mm": _Op("moe", _grouped_mm),
    "opweave::attention": _Op("attention", _attention),
    "opweave::attention_backward": _Op("attention_backward", _attention_backward),
    "scaled_dot_product_attention": _Op("attention", _attention),
    "opweave::moe_mlp": _Op("moe", _experts),
    "opweave::moe_mlp_backward": _Op("moe_backward", _experts_backward),
    **_rows(_Op("conv", _convolution), "convolution conv1d conv2d conv3d"),
    "convolution_backward": _Op("conv_backward", _convolution_backward),
    **_rows(
        _Op("norm", None, 8.0),
        """native_layer_norm native_group_norm native_batch_norm batch_norm_stats _native_batch_norm_legit rms_norm _fused_rms_norm
        _native_batch_norm_legit_functional _native_batch_norm_legit_no_training cudnn_batch_norm""",
    ),
    **_rows(
        _Op("norm_backward", None, 12.0),
        """native_layer_norm_backward native_group_norm_backward native_batch_norm_backward cudnn_batch_norm_backward batch_norm_backward
        _fused_rms_norm_backward""",
    ),
    **_rows(_Op("softmax", None, 20.0), "_softmax _log_softmax _safe_softmax logsumexp"),
    **_rows(_Op("softmax_backward", None, 8.0), "_softmax_backward_data _log_softmax_backward_data"),
    **{name: _Op("transcendental", None, float(cost)) for cost, names in _TRANSCENDENTAL.items() for name in names.split()},
    **_rows(_Op("pointwise"), _ELEMENTWISE),
    "opweave::dropout_mask": _Op("transcendental", None, 20.0),
    **_rows(
        _Op("reduction"),
        """sum mean amax amin max min argmax argmin any all prod var var_mean std linalg_vector_norm norm cumsum cumprod nll_loss_forward
        nll_loss2d_forward nll_loss_backward nll_loss2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward avg_pool2d
        avg_pool2d_backward max_pool3d_with_indices max_pool3d_with_indices_backward avg_pool3d avg_pool3d_backward
        _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward upsample_nearest2d
        upsample_nearest2d_backward upsample_nearest3d upsample_nearest3d_backward upsample_bilinear2d upsample_bilinear2d_backward
        topk sort""",
    ),
    **_rows(_Op("embedding"), "embedding gather index index_select take"),
    **_rows(_Op("scatter", _scatter), "scatter scatter_add index_put index_add scatter_reduce index_copy"),
    "embedding_dense_backward": _Op("scatter", _scatter_rows),
    "opweave::channel_moments": _Op("norm", None, 6.0),
    "opweave::update": _Op("update", None, 12.0),
    "opweave::accumulate": _ACCUMULATE,
    "opweave::one_per_row": _FILL,
    **_rows(
        _Op("copy", None, 0.0),
        """clone copy _to_copy to contiguous cat stack repeat constant_pad_nd flip roll slice_backward select_backward slice_scatter
        select_scatter expand_copy permute_copy im2col col2im _reshape_copy""",
    ),
    **_rows(
        _FILL,
        "full zeros ones empty arange full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty fill scalar_tensor",
    ),
    **_rows(
        _VIEW,
        """view _unsafe_view reshape unsqueeze squeeze flatten _reshape_alias permute transpose t expand slice select split
        split_with_sizes unbind detach alias as_strided unfold diagonal getitem lift_fresh view_as expand_as sym_size""",
    ),
}  # fmt: skip
_OTHER = _Op("other")


@lru_cache(maxsize=4096)
def _lookup(target: str) -> tuple[_Op, str]:
    """The row of an op and its class with its name."""
    name = target.removeprefix("torch.ops.").removeprefix("aten::").removeprefix("aten.")
    if name.startswith("opweave."):
        name = "opweave::" + name.removeprefix("opweave.")
    base = name.partition(".")[0]
    for known in (base, base.removesuffix("_")):
        if known in OPS:
            op, short = OPS[known], known.removeprefix("opweave::")
            return op, op.op_class if short == op.op_class else f"{op.op_class}:{short}"
    return _OTHER, "other"


def is_known(target: str) -> bool:
    """Whether the op has a row here; others are priced as one pass over their operands and results."""
    return _lookup(target)[0] is not _OTHER


def op_class(target: str) -> str:
    """The class of an op by name, without the name."""
    return _lookup(target)[0].op_class


def class_of(op_class: str) -> str:
    """"norm:native_layer_norm" -> "norm"."""
    return op_class.partition(":")[0]
