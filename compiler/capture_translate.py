"""How the recorder writes the ops that a captured graph holds in another form than ATen runs them.

Each handler gets (recorder, op, args, kwargs, lowered args, lowered kwargs), runs the op on fake tensors, and records what stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..torch_compat import functional_overload, named_arguments
from .capture_errors import CaptureError
from .capture_values import View

if TYPE_CHECKING:
    from .capture_record import Recorder

aten = torch.ops.aten
opweave = torch.ops.opweave
Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


# Attention: the kernel eager PyTorch picks on the CPU stands for the op of any device


@_handles("_scaled_dot_product_flash_attention_for_cpu")
def _attention(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    # Run as opweave's op: torch 2.11 says that the log-sum-exp of float64 is float32, which its own kernel contradicts.
    out = rec.run(opweave.attention.default, _attention_call(func, args, kwargs, args[0]), {})
    rec.bind_all(opweave.attention.default, out, _attention_call(func, lowered, lowered_kwargs, args[0]), {})
    return out


def _attention_call(func: Any, args: Any, kwargs: Any, q: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of `opweave::attention` for those of the CPU's kernel."""
    a = named_arguments(func, args, kwargs)
    return a["query"], a["key"], a["value"], a["attn_mask"], a["is_causal"], _scale(a["scale"], q)


@_handles("_scaled_dot_product_flash_attention_for_cpu_backward")
def _attention_backward(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = rec.run(func, args, kwargs)
    a = named_arguments(func, lowered, lowered_kwargs)
    call = (
        a["grad_out"], a["query"], a["key"], a["value"], a["attn_mask"], a["out"], a["logsumexp"], a["is_causal"],
        _scale(a["scale"], args[1]),
    )  # fmt: skip
    rec.bind_all(opweave.attention_backward.default, out, call, {})
    return out


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


# Products: fake tensors let pass what kernels refuse


@_handles("embedding")
def _embedding(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    named = named_arguments(func, args, kwargs)
    for option in ("scale_grad_by_freq", "sparse"):
        if named[option]:
            raise CaptureError(f"an embedding with {option}=True cannot be captured; leave it at False")
    return rec.record_plain(func, args, kwargs, lowered, lowered_kwargs)


@_handles("mm", "bmm", "addmm", "baddbmm", "convolution")
def _product(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    dtypes = sorted({str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)})
    if len(dtypes) > 1:
        raise CaptureError(
            f"{func._overloadpacket.__name__} gets {' and '.join(dtypes)} tensors; cast the batch to the type of the model's parameters "
            "(or the model to that of the batch), or capture with `autocast=`"
        )
    return rec.record_plain(func, args, kwargs, lowered, lowered_kwargs)


# Normalisation with running statistics, which torch changes without saying so


@_handles("native_batch_norm")
def _batch_norm(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = _with_wide_statistics(args, rec.run(func, args, kwargs))
    x, weight, bias, mean, var, training, momentum, eps = lowered
    if not training:
        rec.bind_all(aten._native_batch_norm_legit_no_training.default, out, (x, weight, bias, mean, var, momentum, eps), {})
    elif mean is None:
        rec.bind_all(aten._native_batch_norm_legit.no_stats, out, (x, weight, bias, True, momentum, eps), {})
    else:
        stats = (args[3], args[4])
        node = rec.bind_all(aten._native_batch_norm_legit_functional.default, (*out, *stats), lowered, {})
        new = _items(node)[3:]
        for tensor, item in zip(stats, new, strict=True):
            rec.store(tensor, item)
    return out


def _with_wide_statistics(args: Any, out: Any) -> Any:
    """Half inputs with float32 parameters have float32 statistics; torch's fake kernel says otherwise (2.13)."""
    wide = {t.dtype for t in args[1:5] if t is not None}
    if len(wide) != 1 or args[0].dtype in wide or not out[1].numel():
        return out
    return (out[0], *(t.to(*wide) for t in out[1:3]))


def _items(node: fx.Node) -> list[fx.Node]:
    """The getitem nodes of a node with several results, in order."""
    return sorted(node.users, key=lambda n: n.args[1])  # type: ignore[arg-type, return-value]


@_handles("native_batch_norm_backward")
def _batch_norm_backward(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = rec.run(func, args, kwargs)
    a = list(lowered)
    if a[7]:
        a[3] = a[4] = None  # training uses the saved statistics only, and the running ones have moved on
    rec.bind_all(func, out, tuple(a), {})
    return out


@_handles("convolution_backward")
def _convolution_backward(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    """One node per gradient, so that each has a rule of one result; the CPU kernels give the same bits."""
    out = rec.run(func, args, kwargs)
    mask = lowered[-1]
    for i, result in enumerate(out):
        if mask[i] and result is not None:
            only = [j == i for j in range(3)]
            rec.bind_all(func, [result if j == i else None for j in range(3)], (*lowered[:-1], only), {})
    return out


# Random numbers


def _random(rec: Recorder, target: Any, shape: Any, dtype: torch.dtype) -> fx.Node:
    """A tensor of random numbers in [0, 1) or normal ones."""
    args = (rec.seed_node(), rec.random_id(), list(shape), dtype)
    return rec.emit(target, args, {}, rec.val_of(tuple(shape), None, dtype))


def _dropped(rec: Recorder, p: float, shape: Any) -> fx.Node:
    """The bool mask of what is kept when elements are dropped with probability p."""
    args = (rec.seed_node(), rec.random_id(), round(p, 12), list(shape))
    return rec.emit(opweave.dropout_mask.default, args, {}, rec.val_of(tuple(shape), None, torch.bool))


@_handles("bernoulli_", "bernoulli")
def _bernoulli(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = func(*args, **{**kwargs, "generator": None})
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5 if func._overloadpacket.__name__ == "bernoulli_" else None)
    if isinstance(p, torch.Tensor) or p is None:
        probability = lowered[0] if p is None else lowered[1]
        like = args[0] if p is None else p
        drawn = _random(rec, opweave.uniform.default, out.shape, like.dtype)
        mask = rec.emit(aten.lt.Tensor, (drawn, probability), {}, rec.val_of(tuple(out.shape), None, torch.bool))
    else:
        mask = _dropped(rec, 1.0 - p, out.shape)
    return _give(rec, out, mask, args[0] if func._schema.is_mutable else None)


def _give(rec: Recorder, out: torch.Tensor, node: fx.Node, written: torch.Tensor | None) -> torch.Tensor:
    """`node` (any dtype) is the value of a fresh result, or of the tensor that was written."""
    if node.meta["val"].dtype != out.dtype:
        val = rec.val_of(tuple(out.shape), None, out.dtype)
        node = rec.emit(aten._to_copy.default, (node,), {"dtype": out.dtype}, val)
    if written is None:
        rec.values.bind(out, node, rec.val(out))
    else:
        rec.store(written, node)
    return out


@_handles("native_dropout")
def _native_dropout(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out, mask = func(*args, **kwargs)
    x, p = lowered[0], args[1]
    kept = _dropped(rec, p, args[0].shape)
    val = rec.val(out)
    node = rec.emit(aten.mul.Tensor, (x, kept), {}, val)
    rec.values.bind(out, rec.emit(aten.mul.Tensor, (node, 1.0 / (1.0 - p)), {}, val), val)
    rec.values.bind(mask, kept, rec.val(mask))
    return out, mask


@_handles("native_dropout_backward")
def _native_dropout_backward(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    val = rec.val(out)
    node = rec.emit(aten.mul.Tensor, (lowered[0], lowered[1]), {}, val)
    rec.values.bind(out, rec.emit(aten.mul.Tensor, (node, args[2]), {}, val), val)
    return out


@_handles("rand", "rand_like", "randn", "randn_like")
def _rand(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    normal = func._overloadpacket.__name__.startswith("randn")
    node = _random(rec, opweave.normal.default if normal else opweave.uniform.default, out.shape, out.dtype)
    return _give(rec, out, node, None)


@_handles("uniform_", "normal_")
def _uniform(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    """`uniform_(low, high)` or `normal_(mean, std)`."""
    out = func(*args, **{**kwargs, "generator": None})
    a = named_arguments(func, args, kwargs)
    val = rec.val_of(tuple(out.shape), None, out.dtype)
    if "mean" in a:
        node, factor, offset = _random(rec, opweave.normal.default, out.shape, out.dtype), a["std"], a["mean"]
    else:
        node, factor, offset = _random(rec, opweave.uniform.default, out.shape, out.dtype), a["to"] - a["from"], a["from"]
    if factor != 1:
        node = rec.emit(aten.mul.Tensor, (node, factor), {}, val)
    if offset != 0:
        node = rec.emit(aten.add.Tensor, (node, offset), {}, val)
    return _give(rec, out, node, args[0])


# Writes


@_handles("copy_")
def _copy(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    rec.store(args[0], lowered[1])
    return out


@_handles("fill_", "zero_")
def _fill(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    value = lowered[1] if len(lowered) > 1 else 0
    rec.store(args[0], value if isinstance(value, fx.Node) else _full(rec, out, value))
    return out


@_handles("t_", "transpose_", "unsqueeze_", "squeeze_", "swapaxes_", "swapdims_")
def _view_in_place(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    """The tensor object itself becomes a view of what it was."""
    view = functional_overload(func)
    before = rec.values.ref(args[0])
    out = func(*args, **kwargs)
    node = rec.emit(view, lowered, lowered_kwargs, rec.val(out))
    rec.values.rebind_view(args[0], before, node, rec.val(out), View(view, lowered[1:], lowered_kwargs))
    return out


@_handles("resize_", "resize_as_", "set_", "embedding_renorm_", "_resize_output_")
def _reject(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    name = func._overloadpacket.__name__
    way_out = "leave max_norm of the embedding at None" if name == "embedding_renorm_" else "make a new tensor instead"
    raise CaptureError(f"{name} changes a tensor in place in a way that cannot be captured; {way_out}")


# Tensors made from nothing: all are `full`


def _full(rec: Recorder, like: torch.Tensor, value: Any) -> fx.Node:
    val = rec.val_of(tuple(like.shape), None, like.dtype)
    if like.dtype == torch.bool:
        value = bool(value)
    return rec.emit(aten.full.default, (list(like.shape), value), {"dtype": like.dtype}, val)


_FILLS = {
    "zeros": 0, "ones": 1, "empty": 0, "new_zeros": 0, "new_ones": 1, "new_empty": 0, "zeros_like": 0, "ones_like": 1, "empty_like": 0,
}  # fmt: skip


@_handles(*_FILLS, "full", "new_full", "full_like", "scalar_tensor", "empty_strided", "new_empty_strided")
def _make(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    """Memory that torch leaves uninitialised is zero here: a captured step has one result."""
    out = func(*args, **kwargs)
    name = func._overloadpacket.__name__
    a = named_arguments(func, args, kwargs)
    value = _FILLS.get(name, a.get("fill_value", a.get("s", 0)))
    node = _full(rec, out, value)
    val = rec.val(out)
    if node.meta["val"] is not val and not out.is_contiguous():
        node = rec.emit(aten.empty_strided.default, (list(out.shape), list(out.stride())), {"dtype": out.dtype}, val)
        node = rec.emit(aten.fill.Scalar, (node, value), {}, val)
    rec.values.bind(out, node, val)
    return out


@_handles("cat")
def _cat(rec: Recorder, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
    """Without the empty tensors that key-value caches start from."""
    out = func(*args, **kwargs)
    val = rec.val(out)
    kept = [node for node, tensor in zip(lowered[0], args[0], strict=True) if tensor.numel()]
    if len(kept) == 1:
        same = kept[0].meta["val"] is val
        node = kept[0] if same else rec.emit(aten.clone.default, (kept[0],), {"memory_format": torch.contiguous_format}, val)
    else:
        node = rec.emit(func, (kept, *lowered[1:]) if kept else lowered, lowered_kwargs, val)
    rec.values.bind(out, node, val)
    return out
