"""Local forms: what one device runs for an op whose arguments or result depend on how it is cut.

Most ops run unchanged on local tensors. The functions here write the others, through an `Emitter` (see `emit`): shapes become
local shapes, starts become local starts, and letters with "*" or "#" in the rule table get their masks, offsets and exchanges.

Each takes (emitter, cut, args, kwargs): `args` and `kwargs` are the op's own with local values in them, `cut` says what is split.
They return the local result, or a tuple of results.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..runtime import collectives, micro_batches
from ..runtime import ops as runtime_ops
from ..runtime.batch_norm import channel_moments
from ..runtime.losses import one_per_row
from .rule import argument_names

if TYPE_CHECKING:
    from .emit import Cut, Emitter

aten = torch.ops.aten
Args = list[Any]
Kwargs = dict[str, Any]


def plain(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """The op itself on local tensors."""
    return e.op(cut.node.target, *args, **kwargs)


def accumulate(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """Whether the first micro-batch's operand may become the sum is found when all that reads it is there (`lower_micro_batches`)."""
    return e.op(micro_batches.accumulate, args[0], False)


def _with(cut: Cut, args: Args, kwargs: Kwargs, **new: Any) -> tuple[Args, Kwargs]:
    """The arguments with some replaced, by schema name."""
    args, kwargs = list(args), dict(kwargs)
    names = argument_names(cut.node)
    for name, value in new.items():
        at = names.index(name)
        if at < len(args):
            args[at] = value
        else:
            kwargs[name] = value
    return args, kwargs


def _call(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs, **new: Any) -> Any:
    args, kwargs = _with(cut, args, kwargs, **new)
    return e.op(cut.node.target, *args, **kwargs)


# -- shapes ---------------------------------------------------------------------------------------------------------------


def view(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    return e.op(aten.reshape.default, args[0], list(cut.result_shape()))


def result_shape(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    names = argument_names(cut.node)
    if "size" not in names:
        return plain(e, cut, args, kwargs)
    return _call(e, cut, args, kwargs, size=list(cut.result_shape()))


def input_size(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    return _call(e, cut, args, kwargs, input_size=list(cut.result_shape()))


def _local_start(cut: Cut, start: int, dim: int, whole: tuple[int, ...], local: tuple[int, ...]) -> int:
    """A start that lies on a piece boundary, in local elements."""
    assert start * local[dim] % whole[dim] == 0, f"start {start} of {cut.node.name} is no piece boundary of {whole} cut to {local}"
    return start * local[dim] // whole[dim]


def slice_piece(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    whole, local = cut.operand_whole(0), cut.operand_shape(0)
    dim = cut.argument("dim", 0) % len(whole)
    if whole[dim] == local[dim]:
        return plain(e, cut, args, kwargs)
    start = cut.argument("start") or 0
    start = _local_start(cut, start + whole[dim] if start < 0 else start, dim, whole, local)
    return e.op(aten.slice.Tensor, args[0], dim, start, start + cut.result_shape()[dim])


def slice_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    whole, local = cut.result_whole(), cut.result_shape()
    dim = cut.argument("dim") % len(whole)
    start, end = cut.argument("start") or 0, cut.argument("end")
    if whole[dim] != local[dim]:
        start = _local_start(cut, start + whole[dim] if start < 0 else start, dim, whole, local)
        end = start + cut.operand_shape(0)[dim]
    return e.op(aten.slice_backward.default, args[0], list(local), dim, start, end, cut.argument("step", 1))


def select_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    return _call(e, cut, args, kwargs, input_sizes=list(cut.result_shape()))


def split(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    dim = cut.argument("dim", 0)
    whole, local = cut.operand_whole(0)[dim], cut.operand_shape(0)[dim]
    # Only equal pieces can be cut, so every part shrinks alike.
    sizes = [part.shape[dim] * local // whole for part in cut.node.meta["val"]]
    return e.op(aten.split_with_sizes.default, args[0], sizes, dim)


def group_norm(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    local, whole = cut.operand_shape(0), cut.operand_whole(0)
    group = cut.argument("group") * local[1] // whole[1]
    # The kernel takes its operands for contiguous, which pieces need not be.
    args = [e.op(aten.contiguous.default, a) if isinstance(a, fx.Node) else a for a in args]
    return _call(e, cut, args, kwargs, N=local[0], C=local[1], group=group)


def convolution(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    new: Kwargs = {"groups": cut.argument("groups") // cut.pieces("g")}
    if "bias_sizes" in argument_names(cut.node) and cut.argument("bias_sizes"):
        new["bias_sizes"] = [cut.operand_shape(0)[1]]
    return _call(e, cut, args, kwargs, **new)


# -- offsets and masks ------------------------------------------------------------------------------------------------------


def arange(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    axes = cut.result_axes(0)
    if not axes:
        return plain(e, cut, args, kwargs)
    start, step = cut.argument("start", 0), cut.argument("step", 1)
    local = cut.result_shape()[0]
    first = e.op(operator.mul, e.offset(axes, local), step)
    piece = e.op(aten.arange.start_step, start, start + local * step, step, **kwargs)
    return e.op(aten.add.Tensor, piece, first)


def triangle(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    rank = len(cut.result_shape())
    rows, columns = cut.result_axes(rank - 2), cut.result_axes(rank - 1)
    if not rows and not columns:
        return plain(e, cut, args, kwargs)
    local = cut.result_shape()
    diagonal: Any = cut.argument("diagonal", 0)
    if rows:
        diagonal = e.op(operator.add, e.offset(rows, local[-2]), diagonal)
    if columns:
        diagonal = e.op(operator.sub, diagonal, e.offset(columns, local[-1]))
    return e.op(cut.node.target, args[0], diagonal)


def dropout_mask(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    seed, op_id, p = args[:3]
    return e.op(runtime_ops.local_dropout_mask, seed, op_id, p, cut.result_spec(), e.coords)


def random_numbers(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    make = runtime_ops.local_uniform if "uniform" in str(cut.node.target) else runtime_ops.local_normal
    return e.op(make, args[0], args[1], cut.argument("dtype"), cut.result_spec(), e.coords)


def _own_rows(e: Emitter, index: Any, axes: tuple[int, ...], size: int) -> tuple[Any, Any]:
    """Indices counted from this device's first row, and which of them it owns."""
    index = e.op(aten.sub.Tensor, index, e.offset(axes, size))
    mine = e.op(aten.logical_and.default, e.op(aten.ge.Scalar, index, 0), e.op(aten.lt.Scalar, index, size))
    return e.op(aten.mul.Tensor, index, mine), mine


def _outside(e: Emitter, index: Any, size: int) -> Any:
    """Which indices are no row of the whole, so that no device owns them.

    Where nothing is split the kernels raise IndexError. Raised by the devices that hold such an index it would leave the others waiting;
    so it makes the result NaN on all of them, and the step is refused everywhere as one with a non-finite loss, before any update.
    """
    return e.op(aten.ne.Tensor, index, e.op(aten.clamp.default, index, 0, size - 1))


def embedding(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    axes = cut.operand_axes(0, 0)
    if not axes:
        return plain(e, cut, args, kwargs)
    index, mine = _own_rows(e, args[1], axes, cut.operand_shape(0)[0])
    rows = e.op(aten.embedding.default, args[0], index)
    scale = e.op(aten._to_copy.default, mine, dtype=cut.operand_dtype(0))
    scale = e.op(aten.masked_fill.Scalar, scale, _outside(e, args[1], cut.operand_whole(0)[0]), math.nan)
    return e.op(aten.mul.Tensor, rows, e.op(aten.unsqueeze.default, scale, -1))


def embedding_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    axes, rows = cut.result_axes(0), cut.result_shape()[0]
    if not axes:
        return plain(e, cut, args, kwargs)
    grad, index = args[:2]
    padding = cut.argument("padding_idx", -1)
    assert not cut.argument("scale_grad_by_freq", False), "capture refuses scale_grad_by_freq"
    local, mine = _own_rows(e, index, axes, rows)
    if padding >= 0:
        mine = e.op(aten.logical_and.default, mine, e.op(aten.ne.Scalar, index, padding))
    grad = e.op(aten.mul.Tensor, grad, e.op(aten.unsqueeze.default, mine, -1))
    return e.op(aten.embedding_dense_backward.default, grad, local, rows, -1, False)


def moe(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """Experts split over devices: each computes its own, from its first expert's number on."""
    operand = 4 if "backward" not in str(cut.node.target) else 5
    axes = cut.operand_axes(operand, 0)
    if not axes:
        return plain(e, cut, args, kwargs)
    return _call(e, cut, args, kwargs, first_expert=e.offset(axes, cut.operand_shape(operand)[0]))


# -- partial results ----------------------------------------------------------------------------------------------------------


def mean(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """The mean of a piece, divided by the number of pieces: a partial sum of the mean."""
    out = plain(e, cut, args, kwargs)
    pieces = cut.num_pieces_reduced()
    return out if pieces == 1 else e.op(aten.div.Scalar, out, pieces)


def elementwise_loss(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """The mean over a piece counts the piece's elements only: divided by the number of pieces it is that of the whole."""
    out = plain(e, cut, args, kwargs)
    pieces = math.prod(n for c, n in zip(cut.strategy.codes, cut.mesh, strict=True) if c >= 0)
    return out if pieces == 1 or cut.argument("reduction", _MEAN) != _MEAN else e.op(aten.div.Scalar, out, pieces)


def addmm(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """The bias is added once: where the reduced dim is split, by the first device along those axes."""
    axes = cut.operand_axes(1, 1)
    return plain(e, cut, [e.zero_unless_first(args[0], axes) if axes else args[0], *args[1:]], kwargs)


# -- with exchange ------------------------------------------------------------------------------------------------------------


def _exp_and_sum(e: Emitter, x: Any, dim: int, axes: tuple[int, ...]) -> tuple[Any, Any]:
    top = e.all_reduce(e.op(aten.amax.default, x, [dim], True), axes, "max")
    shifted = e.op(aten.sub.Tensor, x, top)
    total = e.all_reduce(e.op(aten.sum.dim_IntList, e.op(aten.exp.default, shifted), [dim], True), axes, "sum")
    return shifted, total


def _to_result(e: Emitter, cut: Cut, x: Any) -> Any:
    """half_to_float: a half-precision operand is computed and returned in float32."""
    dtype = cut.node.meta["val"].dtype
    return e.op(aten._to_copy.default, x, dtype=dtype) if cut.operand_dtype(0) != dtype else x


def softmax(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    axes = cut.result_axes(cut.argument("dim"))
    if not axes:
        return plain(e, cut, args, kwargs)
    shifted, total = _exp_and_sum(e, _to_result(e, cut, args[0]), cut.argument("dim"), axes)
    return e.op(aten.div.Tensor, e.op(aten.exp.default, shifted), total)


def log_softmax(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    axes = cut.result_axes(cut.argument("dim"))
    if not axes:
        return plain(e, cut, args, kwargs)
    shifted, total = _exp_and_sum(e, _to_result(e, cut, args[0]), cut.argument("dim"), axes)
    return e.op(aten.sub.Tensor, shifted, e.op(aten.log.default, total))


def _back(e: Emitter, cut: Cut, x: Any) -> Any:
    dtype = cut.node.meta["val"].dtype
    return e.op(aten._to_copy.default, x, dtype=dtype) if cut.operand_dtype(0) != dtype else x


def softmax_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    dim = cut.argument("dim")
    axes = cut.result_axes(dim)
    if not axes:
        return plain(e, cut, args, kwargs)
    product = e.op(aten.mul.Tensor, args[0], args[1])
    total = e.all_reduce(e.op(aten.sum.dim_IntList, product, [dim], True), axes, "sum")
    return _back(e, cut, e.op(aten.addcmul.default, product, args[1], total, value=-1))


def log_softmax_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    dim = cut.argument("dim")
    axes = cut.result_axes(dim)
    if not axes:
        return plain(e, cut, args, kwargs)
    total = e.all_reduce(e.op(aten.sum.dim_IntList, args[0], [dim], True), axes, "sum")
    return _back(e, cut, e.op(aten.addcmul.default, args[0], e.op(aten.exp.default, args[1]), total, value=-1))


_MEAN = 1  # torch's code for reduction="mean"


def nll_loss(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    rank = len(cut.operand_shape(0))
    classes = min(1, rank - 1)
    batch = cut.operand_axes(0, 0) if rank > 1 else ()
    vocab = cut.operand_axes(0, classes)
    if not batch and not vocab:
        return plain(e, cut, args, kwargs)
    logp, target = args[0], args[1]
    ignore = cut.argument("ignore_index", -100)
    if not vocab:
        total = _call(e, cut, args, kwargs, reduction=2)
        loss, weight = e.op(operator.getitem, total, 0), e.op(operator.getitem, total, 1)
    else:
        index, mine = _own_rows(e, target, vocab, cut.operand_shape(0)[classes])
        counted = e.op(aten.ne.Scalar, target, ignore)
        picked = e.op(aten.gather.default, logp, classes, e.op(aten.unsqueeze.default, index, classes))
        picked = e.op(aten.mul.Tensor, e.op(aten.squeeze.dim, picked, classes), e.op(aten.logical_and.default, mine, counted))
        wrong = e.op(aten.logical_and.default, counted, _outside(e, target, cut.operand_whole(0)[classes]))
        picked = e.op(aten.masked_fill.Scalar, picked, wrong, math.nan)
        loss = e.op(aten.neg.default, e.op(aten.sum.default, picked))
        weight = e.op(aten.sum.default, e.op(aten._to_copy.default, counted, dtype=cut.operand_dtype(0)))
    weight = e.all_reduce(weight, batch, "sum") if batch else weight
    loss = e.all_reduce(loss, tuple(sorted(batch + vocab)), "sum")
    return (e.op(aten.div.Tensor, loss, weight) if cut.argument("reduction") == _MEAN else loss), weight


def nll_loss_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    classes = min(1, len(cut.result_shape()) - 1)
    vocab = cut.result_axes(classes)
    if not vocab:
        return plain(e, cut, args, kwargs)
    grad, target, total = args[0], args[2], args[6]
    index, mine = _own_rows(e, target, vocab, cut.result_shape()[classes])
    counted = e.op(aten.logical_and.default, mine, e.op(aten.ne.Scalar, target, cut.argument("ignore_index", -100)))
    if cut.argument("reduction") == _MEAN:
        grad = e.op(aten.div.Tensor, grad, total)
    value = e.op(aten.mul.Tensor, e.op(aten.neg.default, grad), counted)
    index, value = (e.op(aten.unsqueeze.default, x, classes) for x in (index, value))
    return e.op(one_per_row, list(cut.result_shape()), classes, index, value)


def _per_channel(e: Emitter, x: Any, rank: int) -> Any:
    """A (C,) tensor shaped to broadcast over (N, C, ...)."""
    return e.op(aten.reshape.default, x, [1, -1] + [1] * (rank - 2))


def batch_norm(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """Statistics of each device's part, one exchange of them, and the fused kernel that applies statistics it is given."""
    axes = cut.operand_axes(0, 0)
    if not axes:
        return plain(e, cut, args, kwargs)
    x, weight, bias = args[:3]
    whole, pieces = cut.operand_whole(0), math.prod(cut.mesh[axis] for axis in axes)
    count, eps = torch.Size(whole).numel() // whole[1], cut.argument("eps")
    compute = torch.promote_types(cut.operand_dtype(0), torch.float32)
    own = e.op(channel_moments, x, compute)
    every = e.wait(e.start(collectives.all_gather, own, axes, 0, 1))
    every = e.op(aten.view.default, every, [pieces, 2, -1])
    means, variances = e.op(aten.select.int, every, 1, 0), e.op(aten.select.int, every, 1, 1)
    mean = e.op(aten.mean.dim, means, [0])
    # All parts have the same size: the variance is the mean of theirs and the variance of their means.
    apart = e.op(aten.sub.Tensor, means, mean)
    var = e.op(aten.mean.dim, e.op(aten.addcmul.default, variances, apart, apart), [0])
    rstd = e.op(aten.rsqrt.default, e.op(aten.add.Scalar, var, eps))
    out = e.op(aten.native_batch_norm.default, x, weight, bias, mean, var, False, 0.0, eps)
    out = e.op(operator.getitem, out, 0)
    if cut.argument("running_mean") is None:
        return out, mean, rstd
    momentum = cut.argument("momentum")
    unbiased = e.op(aten.mul.Scalar, var, count / max(count - 1, 1))
    moved = [e.op(aten.lerp.Scalar, old, new, momentum) for old, new in ((args[3], mean), (args[4], unbiased))]
    return out, mean, rstd, *moved


def batch_norm_backward(e: Emitter, cut: Cut, args: Args, kwargs: Kwargs) -> Any:
    """The fused kernel gives each device's sums for weight and bias, which one exchange completes; then dx = a grad + b x + c."""
    axes = cut.operand_axes(0, 0)
    if not axes:
        return plain(e, cut, args, kwargs)
    grad, x, weight = args[:3]
    mean, rstd = args[5], args[6]
    whole, rank = cut.operand_whole(0), len(cut.operand_whole(0))
    count = torch.Size(whole).numel() // whole[1]
    eps = cut.argument("eps")
    own = e.op(aten.native_batch_norm_backward.default, grad, x, weight, None, None, mean, rstd, True, eps, [False, True, True])
    both = e.op(aten.stack.default, [e.op(operator.getitem, own, 1), e.op(operator.getitem, own, 2)])
    both = e.all_reduce(both, axes, "sum")
    dw, db = e.op(aten.select.int, both, 0, 0), e.op(aten.select.int, both, 0, 1)
    a = rstd if weight is None else e.op(aten.mul.Tensor, rstd, weight)
    b = e.op(aten.mul.Tensor, e.op(aten.mul.Tensor, a, rstd), e.op(aten.div.Scalar, dw, -count))
    c = e.op(aten.sub.Tensor, e.op(aten.mul.Tensor, a, e.op(aten.div.Scalar, db, -count)), e.op(aten.mul.Tensor, b, mean))
    compute = torch.promote_types(cut.operand_dtype(0), torch.float32)
    half = compute != cut.operand_dtype(0)
    if half:
        grad, x = (e.op(aten._to_copy.default, t, dtype=compute) for t in (grad, x))
    dx = e.op(aten.addcmul.default, _per_channel(e, c, rank), grad, _per_channel(e, a, rank))
    dx = e.op(aten.addcmul.default, dx, x, _per_channel(e, b, rank))
    if half:
        dx = e.op(aten._to_copy.default, dx, dtype=cut.operand_dtype(0))
    return dx, dw, db
