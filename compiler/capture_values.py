"""Which graph node holds the current value of each tensor of the traced program, views and in-place writes included.

A traced program may write to a tensor that others view; a graph may not. Every tensor seen is a `Ref`: either the root of a storage or
a view of another ref. A write makes a new node for the written tensor, carries it up the chain of views to the root (by `slice_scatter`
and its like), and raises the storage's version; a ref whose version is behind makes its view again when it is next read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .capture_errors import CaptureError

aten = torch.ops.aten


class Storage:
    """Memory that one or more refs share; `version` counts the writes to it."""

    __slots__ = ("root", "version")

    def __init__(self) -> None:
        self.version = 0
        self.root: Ref | None = None


@dataclass(slots=True)
class View:
    """How a ref is seen from its parent: `op(parent, *args, **kwargs)`, the item `index` of it where that is a list."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None


@dataclass(slots=True)
class Ref:
    """One tensor of the traced program. `node` is its value as of `version`; val its shape, stride and dtype."""

    node: fx.Node
    val: torch.Tensor
    storage: Storage
    version: int = 0
    parent: Ref | None = None
    view: View | None = None


Emit = Callable[..., fx.Node]


class Values:
    """All refs by tensor identity. The tensors are kept alive, since an identity is one only as long as its owner lives."""

    def __init__(self, emit: Emit, val_of: Callable[..., torch.Tensor], constant: Callable[[torch.Tensor], fx.Node]) -> None:
        self._emit = emit
        self._val_of = val_of
        self._constant = constant
        self._refs: dict[int, Ref] = {}
        self._alive: list[torch.Tensor] = []

    def bind(self, tensor: torch.Tensor, node: fx.Node, val: torch.Tensor) -> None:
        """`tensor` is new memory whose value is `node`."""
        storage = Storage()
        ref = Ref(node, val, storage)
        storage.root = ref
        self._refs[id(tensor)] = ref
        self._alive.append(tensor)

    def bind_view(self, tensor: torch.Tensor, node: fx.Node, val: torch.Tensor, parent: torch.Tensor, view: View | None) -> None:
        """`tensor` is a view of `parent` (None: the same elements, shape and strides) with the current value `node`."""
        of = self._refs[id(parent)]
        ref = Ref(node, val, of.storage, of.storage.version, of, view)
        self._refs[id(tensor)] = ref
        self._alive.append(tensor)

    def rebind_view(self, tensor: torch.Tensor, before: Ref | None, node: fx.Node, val: torch.Tensor, view: View) -> None:
        """The tensor object itself was made a view of what it was (`x.t_()`)."""
        assert before is not None
        self._refs[id(tensor)] = Ref(node, val, before.storage, before.storage.version, before, view)

    def ref(self, tensor: torch.Tensor) -> Ref | None:
        return self._refs.get(id(tensor))

    def read(self, tensor: torch.Tensor) -> fx.Node:
        """The node that holds the tensor's current value; a tensor never seen before becomes a constant."""
        ref = self._refs.get(id(tensor))
        if ref is None:
            return self._constant(tensor)
        return ref.node if ref.version == ref.storage.version else self._refresh(ref)

    def write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """The tensor's memory now holds `node` (same shape and dtype)."""
        ref = self._refs.get(id(tensor))
        assert ref is not None, "a tensor was written before it was seen"
        self._write(ref, node)

    def written(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a bound tensor was written to."""
        ref = self._refs.get(id(tensor))
        return ref is not None and ref.storage.version > 0

    def _refresh(self, ref: Ref) -> fx.Node:
        if ref.parent is not None:
            node = self._refresh(ref.parent)
            ref.node = node if ref.view is None else self._apply(ref.view, node, ref)
        ref.version = ref.storage.version
        return ref.node

    def _apply(self, view: View, node: fx.Node, ref: Ref) -> fx.Node:
        if view.index is None:
            return self._emit(view.op, (node, *view.args), view.kwargs, ref.val)
        single = _single_of_list(view, ref)
        return self._emit(single[0], (node, *single[1]), {}, ref.val)

    def _write(self, ref: Ref, node: fx.Node) -> None:
        if ref.parent is None:
            ref.storage.version += 1
        else:
            self._write(ref.parent, self.lay_out(self._put(ref, node), ref.parent.val))
        ref.node, ref.version = node, ref.storage.version

    def lay_out(self, node: fx.Node, like: torch.Tensor) -> fx.Node:
        """The node's value with its dims in the order of the strides of `like`, dense: later views were checked against that."""
        val = node.meta["val"]
        order = _major_first(like.stride())
        stride = _permute(dense_stride(_permute(val.shape, order)), _inverse(order))
        if all(size < 2 or a == b for size, a, b in zip(val.shape, val.stride(), stride, strict=True)):
            return node
        return self._permuted(self._dense(self._permuted(node, order)), _inverse(order))

    def _permuted(self, node: fx.Node, dims: list[int]) -> fx.Node:
        val = node.meta["val"]
        if dims == list(range(len(dims))):
            return node
        permuted = self._val_of(_permute(val.shape, dims), _permute(val.stride(), dims), val.dtype)
        return self._emit(aten.permute.default, (node, dims), {}, permuted)

    def _dense(self, node: fx.Node) -> fx.Node:
        val = node.meta["val"]
        if val.is_contiguous():
            return node
        dense = self._val_of(tuple(val.shape), None, val.dtype)
        return self._emit(aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, dense)

    def _put(self, ref: Ref, node: fx.Node) -> fx.Node:
        """The parent's value with the elements of view `ref` replaced by `node`."""
        parent, view = ref.parent, ref.view
        assert parent is not None
        if view is None:
            return node
        op, args = (view.op, view.args) if view.index is None else _single_of_list(view, ref)
        name = op._overloadpacket.__name__
        if name in _SCATTER:
            old = parent.node if parent.version == parent.storage.version else self._refresh(parent)
            return self._emit(_SCATTER[name], (old, node, *args), {}, old.meta["val"])
        if name in ("t", "transpose", "permute"):
            return self._permuted(node, _inverse(_permutation(name, args, parent.val.dim())))
        if name in ("view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze"):
            shaped = self._val_of(tuple(parent.val.shape), None, parent.val.dtype)
            return self._emit(aten.view.default, (self._dense(node), list(parent.val.shape)), {}, shaped)
        raise CaptureError(
            f"an in-place write to a view made by {name} cannot be captured; "
            "write to a copy instead: `x = x.clone()`, or use the op without the trailing underscore"
        )


_SCATTER = {
    "slice": aten.slice_scatter.default,
    "select": aten.select_scatter.default,
    "diagonal": aten.diagonal_scatter.default,
    "as_strided": aten.as_strided_scatter.default,
}


def dense_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _permute(values: Sequence[int], dims: list[int]) -> tuple[int, ...]:
    return tuple(values[d] for d in dims)


def _inverse(dims: list[int]) -> list[int]:
    return [dims.index(i) for i in range(len(dims))]


def _major_first(stride: Sequence[int]) -> list[int]:
    """Dims from the largest stride to the smallest."""
    return sorted(range(len(stride)), key=lambda d: (-stride[d], d))


def _permutation(name: str, args: tuple[Any, ...], rank: int) -> list[int]:
    """`dims` such that the view is `permute(dims)`."""
    if name == "permute":
        return [d % rank for d in args[0]]
    first, second = (0, rank - 1) if name == "t" else (args[0] % rank, args[1] % rank)
    dims = list(range(rank))
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _single_of_list(view: View, ref: Ref) -> tuple[Any, tuple[Any, ...]]:
    """The (op, args) that gives one item of a list of views: a slice of split, a select of unbind."""
    index, args = view.index, view.args
    assert index is not None and ref.parent is not None
    name = view.op._overloadpacket.__name__
    if name == "unbind":
        return aten.select.int, (args[0] if args else 0, index)
    if name not in ("split", "split_with_sizes"):
        raise CaptureError(f"an in-place write to a view made by {name} cannot be captured; write to a copy instead: `x = x.clone()`")
    dim = args[1] if len(args) > 1 else 0
    start = args[0] * index if name == "split" else sum(args[0][:index])
    return aten.slice.Tensor, (dim, start, start + ref.val.shape[dim])
