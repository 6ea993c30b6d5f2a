"""The rule table: one row per op. See `rule` for the notation.

To teach the planner a new op, add a row here and a line to `tests/golden/rules.txt` (printed by `tests/compiler/test_rule_table.py`,
which also splits, runs and puts together every rule on random inputs). Pointwise ops need no row: torch tags them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ..torch_compat import OpOverload
from . import local_ops
from .rule import Dim, Row, Rule, TensorDims, parse, results_of, tensor_args

aten = torch.ops.aten

# -- reading a node --------------------------------------------------------------------------------------------------


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an op by its schema name."""
    schema = node.target._schema  # type: ignore[union-attr]
    for i, arg in enumerate(schema.arguments):
        if arg.name == name:
            if i < len(node.args):
                return node.args[i]
            if name in node.kwargs:
                return node.kwargs[name]
            return arg.default_value if arg.has_default_value() else default
    return default


def shape(node: fx.Node) -> tuple[int, ...]:
    """Global shape of a value."""
    return tuple(int(s) for s in node.meta["val"].shape)


def letters(num: int, prefix: str = "d") -> list[Dim]:
    """`num` dims with a letter each."""
    return [(f"{prefix}{i}",) for i in range(num)]


def wrap(dim: int, rank: int) -> int:
    """A dim counted from the end, from the start."""
    return dim + rank if dim < 0 else dim


# -- makers: rules that depend on the node -----------------------------------------------------------------------------

UPDATE = "opweave::update.default"
"""The op that updates one parameter and its optimizer state."""
CAST = "_to_copy.default"
ACCUMULATE = "opweave::accumulate.default"
"""The op that sums its operand over the micro-batches of a step."""

# Pointwise ops that are linear in some tensor operands (indices into the tensor operands).
_LINEAR_POINTWISE: dict[str, tuple[tuple[int, ...], ...]] = {
    "mul.Tensor": ((0,), (1,)), "mul.Scalar": ((0,),), "div.Tensor": ((0,),), "div.Scalar": ((0,),), "neg.default": ((0,),),
    "clone.default": ((0,),), "where.self": ((1, 2),), "threshold_backward.default": ((0,),), "gelu_backward.default": ((0,),),
    "silu_backward.default": ((0,),), "tanh_backward.default": ((0,),), "sigmoid_backward.default": ((0,),),
    "hardtanh_backward.default": ((0,),), "hardswish_backward.default": ((0,),), "leaky_relu_backward.default": ((0,),),
    "elu_backward.default": ((0,),), "softplus_backward.default": ((0,),), "hardsigmoid_backward.default": ((0,),),
    ACCUMULATE: ((0,),),
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """ "add.Tensor" or "opweave::update.default": namespace (aten left out), name and overload."""
    return _target_name(node.target)


@lru_cache(maxsize=4096)
def _target_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"{target._schema.name.removeprefix('aten::')}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def _linear_pointwise(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    name = op_name(node)
    num = len(tensor_args(node))
    if name in ("add.Tensor", "sub.Tensor"):
        return ((0, 1),) if num == 2 else ()
    if name == CAST:
        source, target = tensor_args(node)[0].meta["val"].dtype, node.meta["val"].dtype
        widens = source.is_floating_point and target.is_floating_point and source.itemsize <= target.itemsize
        return ((0,),) if widens else ()
    return tuple(group for group in _LINEAR_POINTWISE.get(name, ()) if max(group) < num)


def pointwise(node: fx.Node) -> Rule:
    """Every result dim a letter; operands align on the right and broadcast dims of size one."""
    out = shape(node)
    names = letters(len(out))

    def operand(value: fx.Node) -> TensorDims:
        sizes = shape(value)
        skip = len(out) - len(sizes)
        return tuple(names[skip + i] if size == out[skip + i] else () for i, size in enumerate(sizes))

    operands = tuple(operand(v) for v in tensor_args(node))
    return Rule(operands=operands, results=(tuple(names),), linear=_linear_pointwise(node))


def view(node: fx.Node) -> Rule:
    """The same elements in the same order: factors are matched, see `factors`."""
    source = tensor_args(node)[0]
    return Rule(operands=(tuple(() for _ in shape(source)),), results=(tuple(() for _ in shape(node)),), linear=((0,),), view=True)


def permute(node: fx.Node) -> Rule:
    rank = len(shape(node))
    names = letters(rank)
    name = op_name(node).split(".")[0]
    if name == "t":
        order = list(range(rank))[::-1]
    elif name == "transpose":
        order = list(range(rank))
        a, b = wrap(node.args[1], rank), wrap(node.args[2], rank)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order = [wrap(d, rank) for d in argument(node, "dims")]
    return Rule(operands=(tuple(names),), results=(tuple(names[i] for i in order),), linear=((0,),))


def expand(node: fx.Node) -> Rule:
    source, out = shape(tensor_args(node)[0]), shape(node)
    names = letters(len(out))
    skip = len(out) - len(source)
    operand = tuple(names[skip + i] if size == out[skip + i] else () for i, size in enumerate(source))
    return Rule(operands=(operand,), results=(tuple(names),), linear=((0,),))


def _reduced_dims(node: fx.Node, key: str = "dim") -> tuple[list[int], bool]:
    rank = len(shape(tensor_args(node)[0]))
    dims = argument(node, key)
    if dims is None or dims == []:
        dims = list(range(rank))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [wrap(d, rank) for d in dims], bool(argument(node, "keepdim", False))


def reduction(kind: str | None, *, linear: bool = False, help: bool = False) -> Callable[[fx.Node], Rule]:
    """Rule of a reduction over `dim`. kind None: the reduced dims are needed whole (arg-max, variance)."""

    def make(node: fx.Node) -> Rule:
        rank = len(shape(tensor_args(node)[0]))
        dims, keep = _reduced_dims(node)
        names = letters(rank)
        flags = {names[d][0]: "!" for d in dims} if kind is None else {names[d][0]: "*" for d in dims} if help else {}
        result = tuple(() if i in dims else names[i] for i in range(rank) if keep or i not in dims)
        return Rule(
            operands=(tuple(names),), results=(result,) * len(results_of(node)), flags=flags, linear=((0,),) if linear else (),
            reduce=kind or "sum",
        )  # fmt: skip

    return make


def along(key: str, flag: str, operands: int, results: int = 1, linear: tuple[tuple[int, ...], ...] = ()) -> Callable[[fx.Node], Rule]:
    """All tensors have the same dims; the dim named by argument `key` has a flag."""

    def make(node: fx.Node) -> Rule:
        rank = len(shape(tensor_args(node)[0]))
        names = letters(rank)
        dim = argument(node, key)
        dims = [dim] if isinstance(dim, int) else list(dim)
        flags = {names[wrap(d, rank)][0]: flag for d in dims} if rank else {}
        return Rule(operands=(tuple(names),) * operands, results=(tuple(names),) * results, flags=flags, linear=linear)

    return make


def _piece(start: int, length: int, size: int) -> bool:
    """Whether [start, start+length) is one of the equal pieces of a dim."""
    return length > 0 and size % length == 0 and start % length == 0


def slice_rule(node: fx.Node) -> Rule:
    """A slice that is one of n equal pieces keeps the piece's factors free; any other slice needs the dim whole."""
    source, out = shape(tensor_args(node)[0]), shape(node)
    dim = wrap(argument(node, "dim", 0), len(source))
    start = argument(node, "start") or 0
    start = start + source[dim] if start < 0 else start
    step = argument(node, "step", 1)
    return _cut_dim(source, dim, out[dim] if step == 1 and _piece(start, out[dim], source[dim]) else None)


def _cut_dim(source: tuple[int, ...], dim: int, length: int | None, count: int = 1) -> Rule:
    names = letters(len(source))
    operand, result = list(names), list(names)
    flags: dict[str, str] = {}
    sizes: dict[str, int] = {}
    if length == source[dim]:
        pass
    elif length is None:
        operand[dim], result[dim] = ("whole",), ("cut",)
        flags = {"whole": "!", "cut": "!"}
    else:
        operand[dim], result[dim] = ("q", "n"), ("n",)
        flags, sizes = {"q": "!"}, {"q": source[dim] // length, "n": length}
    return Rule(operands=(tuple(operand),), results=(tuple(result),) * count, flags=flags, sizes=sizes, linear=((0,),))


def split_rule(node: fx.Node) -> Rule:
    source = shape(tensor_args(node)[0])
    dim = wrap(argument(node, "dim", 0), len(source))
    parts = [tuple(r.shape)[dim] for r in results_of(node) if r is not None]
    if len(set(parts)) == 1:
        return _cut_dim(source, dim, parts[0], len(parts))
    names = letters(len(source))
    results = [tuple((f"cut{k}",) if i == dim else n for i, n in enumerate(names)) for k in range(len(parts))]
    flags = {names[dim][0]: "!"} | {f"cut{k}": "!" for k in range(len(parts))}
    return Rule(operands=(tuple(names),), results=tuple(results), flags=flags, linear=((0,),))


def select_rule(node: fx.Node) -> Rule:
    source = shape(tensor_args(node)[0])
    dim = wrap(argument(node, "dim"), len(source))
    names = letters(len(source))
    return Rule(
        operands=(tuple(names),), results=(tuple(n for i, n in enumerate(names) if i != dim),), flags={names[dim][0]: "!"}, linear=((0,),)
    )


def slice_backward(node: fx.Node) -> Rule:
    """The slice's rule turned around: the gradient of a piece goes into zeros."""
    grad, out = shape(tensor_args(node)[0]), shape(node)
    dim = wrap(argument(node, "dim"), len(out))
    start = argument(node, "start") or 0
    start = start + out[dim] if start < 0 else start
    piece = grad[dim] if argument(node, "step", 1) == 1 and _piece(start, grad[dim], out[dim]) else None
    turned = _cut_dim(out, dim, piece)
    return Rule(operands=turned.results, results=turned.operands, flags=turned.flags, sizes=turned.sizes, linear=((0,),))


def select_backward(node: fx.Node) -> Rule:
    out = shape(node)
    dim = wrap(argument(node, "dim"), len(out))
    names = letters(len(out))
    return Rule(
        operands=(tuple(n for i, n in enumerate(names) if i != dim),), results=(tuple(names),), flags={names[dim][0]: "!"}, linear=((0,),)
    )


def cat_rule(node: fx.Node) -> Rule | None:
    values = tensor_args(node)
    out = shape(node)
    dim = wrap(argument(node, "dim", 0), len(out))
    if any(len(shape(v)) != len(out) for v in values):
        return None  # legacy: empty 1-d tensors among the operands
    sizes = [shape(v)[dim] for v in values]
    names = letters(len(out))
    linear = (tuple(range(len(values))),)
    if len(set(sizes)) == 1:
        result = tuple(("q", "n") if i == dim else name for i, name in enumerate(names))
        operand = tuple(("n",) if i == dim else name for i, name in enumerate(names))
        return Rule(
            operands=(operand,) * len(values), results=(result,), flags={"q": "!"}, sizes={"q": len(values), "n": sizes[0]}, linear=linear
        )
    operands = tuple(tuple((f"c{k}",) if i == dim else name for i, name in enumerate(names)) for k in range(len(values)))
    flags = {f"c{k}": "!" for k in range(len(values))} | {names[dim][0]: "!"}
    return Rule(operands=operands, results=(tuple(names),), flags=flags, linear=linear)


def stack_rule(node: fx.Node) -> Rule:
    values = tensor_args(node)
    rank = len(shape(node))
    dim = wrap(argument(node, "dim", 0), rank)
    names = letters(rank)
    operand = tuple(n for i, n in enumerate(names) if i != dim)
    return Rule(operands=(operand,) * len(values), results=(tuple(names),), flags={names[dim][0]: "!"}, linear=(tuple(range(len(values))),))


def generated(flag: str) -> Callable[[fx.Node], Rule]:
    """An op that makes a tensor from no tensor that matters (full, zeros_like, arange): each device makes its own piece."""

    def make(node: fx.Node) -> Rule:
        names = letters(len(shape(node)))
        values = tensor_args(node)
        operands: tuple[TensorDims, ...] = tuple(tuple((f"i{k}_{i}",) for i in range(len(shape(v)))) for k, v in enumerate(values))
        if operands and all(shape(v) == shape(node) for v in tensor_args(node)):
            operands = (tuple(names),) * len(operands)  # zeros_like: the operand's own layout is the natural one
        elif any(operands):
            flags = {n: "!" for dims in operands for (n,) in dims}
            return Rule(operands=operands, results=(tuple(names),), flags=flags | ({n: flag for (n,) in names} if flag else {}))
        return Rule(operands=operands, results=(tuple(names),), flags={n: flag for (n,) in names} if flag else {})

    return make


def embedding(node: fx.Node) -> Rule:
    index = letters(len(shape(tensor_args(node)[1])), "b")
    return Rule(operands=((("v",), ("h",)), tuple(index)), results=((*index, ("h",)),), flags={"v": "*"}, linear=((0,),))


def embedding_backward(node: fx.Node) -> Rule:
    index = letters(len(shape(tensor_args(node)[1])), "b")
    return Rule(operands=((*index, ("h",)), tuple(index)), results=((("v",), ("h",)),), flags={"v": "*"}, linear=((0,),))


def index_rule(node: fx.Node) -> Rule | None:
    """x[:, idx, :]: one index tensor (others None): its dims stand where the indexed dim was. Several: replicated."""
    source = shape(tensor_args(node)[0])
    indices = list(argument(node, "indices"))
    used = [i for i, v in enumerate(indices) if v is not None]
    if len(used) != 1 or indices[used[0]].meta["val"].dtype == torch.bool:
        return _several_indices(node, source, indices, used)
    at = used[0]
    names = letters(len(source))
    index = letters(len(shape(indices[at])), "i")
    result = (*names[:at], *index, *names[at + 1 :])
    return Rule(operands=(tuple(names), tuple(index)), results=(result,), flags={names[at][0]: "!"}, linear=((0,),))


def _several_indices(node: fx.Node, source: tuple[int, ...], indices: list[Any], used: list[int]) -> Rule | None:
    """x[a, b] with adjacent index tensors that broadcast together: indexed dims whole, index dims free."""
    tensors = [indices[i] for i in used]
    if any(t.meta["val"].dtype == torch.bool for t in tensors) or used != list(range(used[0], used[-1] + 1)):
        return None
    names = letters(len(source))
    joint = torch.broadcast_shapes(*[shape(t) for t in tensors])
    index = letters(len(joint), "i")

    def aligned(value: fx.Node) -> TensorDims:
        sizes = shape(value)
        skip = len(joint) - len(sizes)
        return tuple(index[skip + i] if s == joint[skip + i] else () for i, s in enumerate(sizes))

    result = (*names[: used[0]], *index, *names[used[-1] + 1 :])
    flags = {names[i][0]: "!" for i in used}
    return Rule(operands=(tuple(names), *map(aligned, tensors)), results=(result,), flags=flags, linear=((0,),))


def index_put_rule(node: fx.Node) -> Rule | None:
    """Gradient of x[:, idx]: values go into (accumulated) positions of one indexed dim; the index dims are reduced."""
    if not argument(node, "accumulate", False):
        return None
    source = shape(tensor_args(node)[0])
    indices = list(argument(node, "indices"))
    used = [i for i, v in enumerate(indices) if v is not None]
    if used != list(range(used[0], used[-1] + 1)) or any(indices[i].meta["val"].dtype == torch.bool for i in used):
        return None
    names = letters(len(source))
    flags = {names[i][0]: "!" for i in used}
    joint = torch.broadcast_shapes(*[shape(indices[i]) for i in used])
    index = letters(len(joint), "i")
    flags |= {n: "!" for (n,) in index}

    def aligned(value: fx.Node) -> TensorDims:
        sizes = shape(value)
        skip = len(joint) - len(sizes)
        return tuple(index[skip + i] if s == joint[skip + i] else () for i, s in enumerate(sizes))

    values = (*names[: used[0]], *index, *names[used[-1] + 1 :])
    if shape(tensor_args(node)[-1]) != tuple(source[: used[0]]) + tuple(joint) + tuple(source[used[-1] + 1 :]):
        return None
    return Rule(
        operands=(tuple(names), *(aligned(indices[i]) for i in used), values),
        results=(tuple(names),),
        flags=flags,
        linear=((0, len(used) + 1),),
    )


def gather_rule(node: fx.Node) -> Rule:
    """gather(x, dim, index): along other dims index may be shorter than x, which needs them whole; equal ones are free."""
    source, index = shape(tensor_args(node)[0]), shape(tensor_args(node)[1])
    dim = wrap(argument(node, "dim"), len(source))
    names, own = letters(len(source)), letters(len(source), "i")
    flags = {names[dim][0]: "!"}
    out: list[Dim] = []
    for i in range(len(source)):
        free = i != dim and source[i] == index[i]
        out.append(names[i] if free else own[i])
        if not free and i != dim:
            flags |= {names[i][0]: "!", own[i][0]: "!"}
    return Rule(operands=(tuple(names), tuple(out)), results=(tuple(out),), flags=flags, linear=((0,),))


def scatter_rule(node: fx.Node) -> Rule:
    """scatter(x, dim, index, src): the scattered dim whole, the others free where all sizes agree."""
    values = tensor_args(node)
    source = shape(values[0])
    dim = wrap(argument(node, "dim"), len(source))
    names = letters(len(source))
    flags = {names[dim][0]: "!"}
    operands: list[TensorDims] = [tuple(names)]
    for k, value in enumerate(values[1:]):
        dims: list[Dim] = []
        for i, size in enumerate(shape(value)):
            free = i != dim and all(shape(v)[i] == source[i] for v in values)
            dims.append(names[i] if free else (f"x{k}_{i}",))
            if not free:
                flags |= {names[i][0]: "!", f"x{k}_{i}": "!"}
            assert size >= 0
        operands.append(tuple(dims))
    return Rule(operands=tuple(operands), results=(tuple(names),), flags=flags)


def index_add_rule(node: fx.Node) -> Rule:
    """index_add(x, dim, index, source): segment sum; the summed positions are needed whole, other dims free."""
    values = tensor_args(node)
    rank = len(shape(values[0]))
    dim = wrap(argument(node, "dim"), rank)
    names = letters(rank)
    src = tuple(("e",) if i == dim else n for i, n in enumerate(names))
    return Rule(operands=(tuple(names), (("e",),), src), results=(tuple(names),), flags={names[dim][0]: "!", "e": "!"}, linear=((0, 2),))


def index_select_rule(node: fx.Node) -> Rule:
    rank = len(shape(tensor_args(node)[0]))
    dim = wrap(argument(node, "dim"), rank)
    names = letters(rank)
    return Rule(
        operands=(tuple(names), (("e",),)), results=(tuple(("e",) if i == dim else n for i, n in enumerate(names)),),
        flags={names[dim][0]: "!"}, linear=((0,),),
    )  # fmt: skip


def pad_rule(node: fx.Node) -> Rule:
    """Padded dims are needed whole, the others are free."""
    source, out = shape(tensor_args(node)[0]), shape(node)
    names, other = letters(len(source)), letters(len(source), "p")
    flags: dict[str, str] = {}
    result: list[Dim] = []
    for i, (a, b) in enumerate(zip(source, out, strict=True)):
        result.append(names[i] if a == b else other[i])
        if a != b:
            flags |= {names[i][0]: "!", other[i][0]: "!"}
    value = argument(node, "value", 0)
    return Rule(operands=(tuple(names),), results=(tuple(result),), flags=flags, linear=((0,),) if not value else ())


def leading(count: int, tensors: int, results: tuple[int, ...], linear: tuple[tuple[int, ...], ...] = ()) -> Callable[[fx.Node], Rule]:
    """All tensors share their first `count` dims (batch, channel) and need the rest whole (pools, upsampling).

    tensors: number of operands that do. results: for each result its number of shared dims.
    """

    def make(node: fx.Node) -> Rule:
        flags: dict[str, str] = {}
        shared = letters(count, "n")
        serial = 0

        def dims(val: torch.Tensor) -> TensorDims:
            nonlocal serial
            lead = count - (1 if len(val.shape) < len(tensor_args(node)[0].meta["val"].shape) else 0)
            rest = []
            for _ in range(len(val.shape) - lead):
                rest.append((f"w{serial}",))
                flags[f"w{serial}"] = "!"
                serial += 1
            return (*shared[count - lead :], *rest)

        operands = tuple(dims(v.meta["val"]) for v in tensor_args(node))
        assert len(operands) == tensors, f"{node.target} has {len(operands)} tensor operands, expected {tensors}"
        outs = tuple(dims(r) if r is not None else () for r in results_of(node))
        assert len(outs) == len(results)
        return Rule(operands=operands, results=outs, flags=flags, linear=linear)

    return make


def _spatial(num: int, prefix: str, flags: dict[str, str]) -> list[Dim]:
    dims = letters(num, prefix)
    flags |= {n: "!" for (n,) in dims}
    return dims


def convolution(node: fx.Node) -> Rule | None:
    """n (g c) x!, (g o) c k! -> n (g o) y!: batch, groups, input channels (reduced) and output channels."""
    values = tensor_args(node)
    if argument(node, "transposed"):
        return _conv_transposed(node)
    groups = argument(node, "groups")
    x, w, y = shape(values[0]), shape(values[1]), shape(node)
    flags: dict[str, str] = {}
    num = len(x) - 2
    kernel = _spatial(num, "k", flags)
    xs, ys = _conv_spatial(x, y, w, num, flags, node)
    cin: Dim = ("g", "c") if groups > 1 else ("c",)
    cout: Dim = ("g", "o") if groups > 1 else ("o",)
    operands = [(("n",), cin, *xs), (cout, ("c",), *kernel)]
    if len(values) > 2:
        operands.append((cout,))
        flags["c"] = "!"  # a bias would be added once per piece
    sizes = {"g": groups, "c": w[1], "o": y[1] // groups} if groups > 1 else {}
    return Rule(
        operands=tuple(operands), results=((("n",), cout, *ys),), flags=flags, sizes=sizes, linear=() if len(values) > 2 else ((0,), (1,))
    )


def _conv_spatial(
    x: tuple[int, ...], y: tuple[int, ...], w: tuple[int, ...], num: int, flags: dict[str, str], node: fx.Node
) -> tuple[list[Dim], list[Dim]]:
    """Spatial letters of a convolution: shared where the kernel is one point wide with stride one, else needed whole."""
    stride, padding = argument(node, "stride"), argument(node, "padding")
    xs: list[Dim] = []
    ys: list[Dim] = []
    for i in range(num):
        point = w[2 + i] == 1 and stride[i if len(stride) > 1 else 0] == 1 and padding[i if len(padding) > 1 else 0] == 0
        xs.append((f"x{i}",))
        ys.append((f"x{i}",) if point else (f"y{i}",))
        if not point:
            flags |= {f"x{i}": "!", f"y{i}": "!"}
    return xs, ys


def _conv_transposed(node: fx.Node) -> Rule | None:
    if argument(node, "groups") != 1:
        return None
    values = tensor_args(node)
    flags: dict[str, str] = {}
    num = len(shape(values[0])) - 2
    xs, ks, ys = _spatial(num, "x", flags), _spatial(num, "k", flags), _spatial(num, "y", flags)
    operands: list[TensorDims] = [(("n",), ("c",), *xs), (("c",), ("o",), *ks)]
    if len(values) > 2:
        operands.append((("o",),))
        flags["c"] = "!"
    return Rule(operands=tuple(operands), results=((("n",), ("o",), *ys),), flags=flags, linear=() if len(values) > 2 else ((0,), (1,)))


def convolution_backward(node: fx.Node) -> Rule | None:
    """(grad, x, w) -> dx | dw | db. Capture asks for one of them per node; a letter a result does not depend on is whole there."""
    mask = argument(node, "output_mask")
    values = tensor_args(node)
    grad, x, w = (shape(v) for v in values)
    num = len(x) - 2
    flags: dict[str, str] = {}
    groups, transposed = argument(node, "groups"), argument(node, "transposed")
    if transposed and groups != 1:
        return None
    kernel = _spatial(num, "k", flags)
    if transposed:
        xs, ys = _spatial(num, "x", flags), _spatial(num, "y", flags)
    else:
        xs, ys = _conv_spatial(x, grad, w, num, flags, node)
    cin: Dim = ("g", "c") if groups > 1 else ("c",)
    cout: Dim = ("g", "o") if groups > 1 else ("o",)
    wdims: TensorDims = (("c",), ("o",), *kernel) if transposed else (cout, ("c",), *kernel)
    tensors = {"grad": (("n",), cout, *ys), "x": (("n",), cin, *xs), "w": wdims}
    results: list[TensorDims] = [tensors["x"] if mask[0] else (), tensors["w"] if mask[1] else (), (cout,) if mask[2] else ()]
    if sum(mask) > 1 and mask[2]:
        flags |= {"c": "!"}
    if mask[0] and (mask[1] or mask[2]):
        flags |= {"o": "!", "n": flags.get("n", "")}
    if mask[2] and not mask[1]:
        flags |= {"c": "!"}
    linear: tuple[tuple[int, ...], ...] = ((0,),)
    if mask[0] and not mask[1] and not mask[2]:
        linear = ((0,), (2,))
    if mask[1] and not mask[0] and not mask[2]:
        linear = ((0,), (1,))
    sizes = {"g": groups, "c": w[1], "o": grad[1] // groups} if groups > 1 else {}
    return Rule(
        operands=(tensors["grad"], tensors["x"], tensors["w"]), results=tuple(results), flags={k: v for k, v in flags.items() if v},
        sizes=sizes, linear=linear,
    )  # fmt: skip


def layer_norm(node: fx.Node) -> Rule:
    """Leading dims free, normalised dims whole; results: output, mean, rstd (normalised dims of size one)."""
    values = tensor_args(node)
    rank, inner = len(shape(values[0])), len(argument(node, "normalized_shape"))
    names = letters(rank)
    lead, norm = tuple(names[: rank - inner]), tuple(names[rank - inner :])
    stat = (*lead, *(() for _ in norm))
    return Rule(
        operands=((*lead, *norm), *(norm for _ in values[1:])), results=((*lead, *norm), stat, stat), flags={n: "!" for (n,) in norm}
    )


def layer_norm_backward(node: fx.Node) -> Rule:
    values = tensor_args(node)
    rank, inner = len(shape(values[0])), len(argument(node, "normalized_shape"))
    names = letters(rank)
    lead, norm = tuple(names[: rank - inner]), tuple(names[rank - inner :])
    stat = (*lead, *(() for _ in norm))
    affine = [norm] * (len(values) - 4)
    results = results_of(node)
    return Rule(
        operands=((*lead, *norm), (*lead, *norm), stat, stat, *affine),
        results=((*lead, *norm), *(norm if r is not None else () for r in results[1:])), flags={n: "!" for (n,) in norm}, linear=((0,),),
    )  # fmt: skip


def batch_norm(node: fx.Node) -> Rule:
    """n* c s!...: statistics over the global batch; splitting the batch has a local form that exchanges sums."""
    values = tensor_args(node)
    rank = len(shape(values[0]))
    space = letters(rank - 2, "s")
    full = (("n",), ("c",), *space)
    operands = [full] + [(("c",),)] * (len(values) - 1)
    training = _is_training(node)
    flags = {n: "!" if training else "" for (n,) in space} | {"n": "#" if training else ""}
    results: list[TensorDims] = []
    for i, r in enumerate(results_of(node)):
        results.append(
            full
            if i == 0
            else (("c",),)
            if r is not None and r.dim() == 1 and r.numel()
            else tuple(() for _ in (r.shape if r is not None else ()))
        )
    return Rule(operands=tuple(operands), results=tuple(results), flags={k: v for k, v in flags.items() if v})


def _is_training(node: fx.Node) -> bool:
    name = op_name(node)
    return "no_training" not in name and bool(argument(node, "training", argument(node, "train", True)))


def batch_norm_backward(node: fx.Node) -> Rule:
    values = tensor_args(node)
    rank = len(shape(values[0]))
    space = letters(rank - 2, "s")
    full = (("n",), ("c",), *space)
    operands = [full, full] + [(("c",),)] * (len(values) - 2)
    train = bool(argument(node, "train", True))
    flags = {n: "!" for (n,) in space} | ({"n": "#"} if train else {"n": "!"})
    results = tuple(full if i == 0 else (("c",),) if r is not None else () for i, r in enumerate(results_of(node)))
    return Rule(operands=tuple(operands), results=results, flags=flags)


def group_norm(node: fx.Node) -> Rule:
    """native_group_norm(x, w, b, N, C, HxW, groups): batch and groups free."""
    values = tensor_args(node)
    group = argument(node, "group")
    x = shape(values[0])
    names = letters(len(x) - 2, "s")
    flags = {n: "!" for (n,) in names} | {"c": "!"}
    channel: Dim = ("g", "c")
    stat = (("n",), ("g",))
    return Rule(
        operands=((("n",), channel, *names), *([(channel,)] * (len(values) - 1))), results=((("n",), channel, *names), stat, stat),
        flags=flags, sizes={"g": group, "c": x[1] // group},
    )  # fmt: skip


def group_norm_backward(node: fx.Node) -> Rule:
    values = tensor_args(node)
    group = argument(node, "group")
    x = shape(values[0])
    names = letters(len(x) - 2, "s")
    flags = {n: "!" for (n,) in names} | {"c": "!"}
    channel: Dim = ("g", "c")
    full = (("n",), channel, *names)
    stat = (("n",), ("g",))
    results = tuple(full if i == 0 else (channel,) if r is not None else () for i, r in enumerate(results_of(node)))
    return Rule(
        operands=(full, full, stat, stat, *([(channel,)] * (len(values) - 4))), results=results, flags=flags,
        sizes={"g": group, "c": x[1] // group}, linear=((0,),),
    )  # fmt: skip


def attention(node: fx.Node) -> Rule:
    """Grouped heads: q has g groups of r heads, keys and values one head per group. A mask broadcasts over batch and heads."""
    values = tensor_args(node)
    backward = "backward" in op_name(node)
    q, k = (shape(v) for v in (values[1:3] if backward else values[:2]))
    ratio = q[1] // k[1]
    heads: Dim = ("g", "r") if ratio > 1 else ("g",)
    qd = (("b",), heads, ("s",), ("d",))
    kd = (("b",), ("g",), ("t",), ("d",))
    vd = (("b",), ("g",), ("t",), ("e",))
    od = (("b",), heads, ("s",), ("e",))
    lse = (("b",), heads, ("s",))
    flags = {"s": "!", "t": "!", "d": "!", "e": "!"}
    sizes = {"g": k[1], "r": ratio} if ratio > 1 else {}
    has_mask = argument(node, "mask") is not None
    mask: tuple[TensorDims, ...] = ()
    if has_mask:
        sizes_m = shape(values[4] if backward else values[3])
        full = (("b",), heads, ("s",), ("t",))
        target = (q[0], q[1], q[2], k[2])
        skip = 4 - len(sizes_m)
        mask = (tuple(full[skip + i] if s == target[skip + i] and s > 1 else () for i, s in enumerate(sizes_m)),)
    if backward:
        return Rule(operands=(od, qd, kd, vd, *mask, od, lse), results=(qd, kd, vd), flags=flags, sizes=sizes, linear=())
    return Rule(operands=(qd, kd, vd, *mask), results=(od, lse), flags=flags, sizes=sizes)


def _nll_dims(logp: tuple[int, ...]) -> tuple[TensorDims, TensorDims]:
    """Dims of the log-probabilities (classes second, first where there is no batch) and of the targets."""
    if len(logp) == 1:
        return (("v",),), ()
    space = letters(len(logp) - 2, "s")
    return (("b",), ("v",), *space), (("b",), *space)


def nll_loss(node: fx.Node) -> Rule:
    """nll_loss_forward(logp, target): results loss and total weight; batch and vocabulary are split with help."""
    values = tensor_args(node)
    logp, target = _nll_dims(shape(values[0]))
    weight: tuple[TensorDims, ...] = ((("v",),),) if len(values) > 2 else ()
    if argument(node, "reduction") == 0:
        return Rule(operands=(logp, target, *weight), results=(target, ()), flags={"v": "!"})
    flags = {n: "!" for (n,) in target} | {"b": "#", "v": "!" if weight or len(logp) == 1 else "#"}
    return Rule(operands=(logp, target, *weight), results=((), ()), flags=flags)


def nll_loss_backward(node: fx.Node) -> Rule:
    values = tensor_args(node)
    logp, target = _nll_dims(shape(values[1]))
    grad = target if len(shape(values[0])) else ()
    weight: tuple[TensorDims, ...] = ((("v",),),) if len(values) > 4 else ()
    flags = {"v": "!" if weight or len(logp) == 1 or grad else "*"}
    return Rule(operands=(grad, logp, target, *weight, ()), results=(logp,), flags=flags)


def elementwise_loss(node: fx.Node) -> Rule:
    """mse_loss and its kind: elementwise, then reduced as `reduction` says; the mean of a piece is scaled by its local form."""
    values = tensor_args(node)
    backward = "backward" in op_name(node)
    whole = shape(values[1] if backward else values[0])
    names = letters(len(whole))

    def aligned(value: fx.Node) -> TensorDims:
        sizes = shape(value)
        skip = len(whole) - len(sizes)
        return tuple(names[skip + i] if size == whole[skip + i] else () for i, size in enumerate(sizes))

    operands = tuple(aligned(v) for v in values)
    if backward:
        return Rule(operands=operands, results=(tuple(names),), linear=((0,),))
    reduction = argument(node, "reduction", 1)
    flags = {n: "*" for (n,) in names} if reduction == 1 else {}
    return Rule(operands=operands, results=(tuple(names) if reduction == 0 else (),), flags=flags)


def select_scatter(node: fx.Node) -> Rule:
    """x with x[:, i] replaced: the selected dim whole."""
    x = shape(node)
    dim = wrap(argument(node, "dim"), len(x))
    names = letters(len(x))
    src = tuple(n for i, n in enumerate(names) if i != dim)
    return Rule(operands=(tuple(names), src), results=(tuple(names),), flags={names[dim][0]: "!"}, linear=((0, 1),))


def slice_scatter(node: fx.Node) -> Rule:
    """x with x[:, a:b] replaced: the sliced dim whole."""
    x = shape(node)
    dim = wrap(argument(node, "dim", 0), len(x))
    names = letters(len(x))
    src = tuple(("cut",) if i == dim else n for i, n in enumerate(names))
    return Rule(operands=(tuple(names), src), results=(tuple(names),), flags={names[dim][0]: "!", "cut": "!"}, linear=((0, 1),))


def update(node: fx.Node) -> Rule:
    """Optimizer update: elementwise over parameter, gradient and state."""
    names = tuple(letters(len(shape(tensor_args(node)[0]))))
    count = len(tensor_args(node))
    return Rule(operands=(names,) * count, results=(names,) * (count - 1))


def repeat_rule(node: fx.Node) -> Rule:
    """x.repeat(n, ...): a dim repeated once is free, a repeated one becomes (n! d)."""
    source, out = shape(tensor_args(node)[0]), shape(node)
    names = letters(len(out))
    skip = len(out) - len(source)
    flags: dict[str, str] = {}
    sizes: dict[str, int] = {}
    result: list[Dim] = []
    for i, size in enumerate(out):
        inner = source[i - skip] if i >= skip else 1
        if inner == size:
            result.append(names[i])
        else:
            q = f"q{i}"
            flags[q] = "!"
            sizes |= {q: size // inner, names[i][0]: inner}
            result.append((q, names[i][0]) if inner > 1 else (q,))
    operand = tuple(names[skip + i] if s > 1 or out[skip + i] == 1 else () for i, s in enumerate(source))
    return Rule(operands=(operand,), results=(tuple(result),), flags=flags, sizes=sizes, linear=((0,),))


def same_dims(node: fx.Node) -> Rule:
    """All dims needed whole except those before the last two (tril and triu)."""
    names = letters(len(shape(node)))
    return Rule(operands=(tuple(names),), results=(tuple(names),), flags={n: "*" for (n,) in names[-2:]}, linear=((0,),))


def bias_matmul(node: fx.Node) -> Rule:
    """addmm(bias, x, w): the reduction k would add the bias once per piece, so the local form gives it to the first only."""
    bias = shape(tensor_args(node)[0])
    return parse(f"{'n' if len(bias) == 1 else 'm n'}, m k, k n -> m n" if bias != (1,) else "1, m k, k n -> m n")


def moe(node: fx.Node) -> Rule:
    """Experts: tokens, experts (partial sum), inner features (partial sum) and output columns."""
    values = tensor_args(node)
    backward = "backward" in op_name(node)
    down = shape(values[-1] if not backward else values[5])
    sizes = {"z": 2, "f": down[2]}
    x, idx, wts = (("t",), ("i",)), (("t",), ("k",)), (("t",), ("k",))
    gate_up, downs = (("e",), ("z", "f"), ("i",)), (("e",), ("o",), ("f",))
    flags = {"z": "!", "i": "!", "k": "!", "e": "*"}
    if backward:
        flags["o"] = "!"
        return Rule(operands=((("t",), ("o",)), x, idx, wts, gate_up, downs), results=(x, wts, gate_up, downs), flags=flags, sizes=sizes)
    return Rule(operands=(x, idx, wts, gate_up, downs), results=((("t",), ("o",)),), flags=flags, sizes=sizes)


# -- the table ----------------------------------------------------------------------------------------------------------

_BOTH = ((0,), (1,))
_VIEWS = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "_reshape_alias", "_reshape_copy")

_LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy")

TABLE: dict[str, Row] = {
    # matrix products
    "mm": Row(rule="m k, k n -> m n", linear=_BOTH),
    "bmm": Row(rule="b m k, b k n -> b m n", linear=_BOTH),
    "mv": Row(rule="m k, k -> m", linear=_BOTH),
    "dot": Row(rule="k, k -> ", linear=_BOTH),
    "addmm": Row(rule=bias_matmul, local=local_ops.addmm),
    "baddbmm": Row(rule="b m n, b m k!, b k! n -> b m n"),
    # attention and experts
    "opweave::attention": Row(rule=attention),
    "opweave::attention_backward": Row(rule=attention),
    "opweave::moe_mlp": Row(rule=moe, local=local_ops.moe),
    "opweave::moe_mlp_backward": Row(rule=moe, local=local_ops.moe),
    "opweave::dropout_mask": Row(rule=generated(""), local=local_ops.dropout_mask),
    "opweave::uniform": Row(rule=generated(""), local=local_ops.random_numbers),
    "opweave::normal": Row(rule=generated(""), local=local_ops.random_numbers),
    "opweave::constant": Row(rule=generated("!")),
    "opweave::update": Row(rule=update),
    "opweave::accumulate": Row(rule=pointwise, local=local_ops.accumulate),
    # views
    **{name: Row(rule=view, local=local_ops.view) for name in _VIEWS},
    "permute": Row(rule=permute),
    "transpose": Row(rule=permute),
    "t": Row(rule=permute),
    "expand": Row(rule=expand, local=local_ops.result_shape),
    "repeat": Row(rule=repeat_rule),
    "slice": Row(rule=slice_rule, local=local_ops.slice_piece),
    "slice_backward": Row(rule=slice_backward, local=local_ops.slice_backward),
    "select": Row(rule=select_rule),
    "select_backward": Row(rule=select_backward, local=local_ops.select_backward),
    "select_scatter": Row(rule=select_scatter),
    "slice_scatter": Row(rule=slice_scatter),
    "split": Row(rule=split_rule, local=local_ops.split),
    "unsafe_split": Row(rule=split_rule, local=local_ops.split),
    "split_with_sizes": Row(rule=split_rule, local=local_ops.split),
    "unbind": Row(rule=lambda node: _unbind(node)),
    "cat": Row(rule=cat_rule),
    "stack": Row(rule=stack_rule),
    "constant_pad_nd": Row(rule=pad_rule),
    "flip": Row(rule=along("dims", "!", 1, linear=((0,),))),
    "roll": Row(rule=along("dims", "!", 1, linear=((0,),))),
    # reductions
    "sum": Row(rule=reduction("sum", linear=True)),
    "mean": Row(rule=reduction("sum", linear=True, help=True), local=local_ops.mean),
    "amax": Row(rule=reduction("max")),
    "amin": Row(rule=reduction("min")),
    "max": Row(rule=reduction(None)),
    "min": Row(rule=reduction(None)),
    "argmax": Row(rule=reduction(None)),
    "argmin": Row(rule=reduction(None)),
    "any": Row(rule=reduction(None)),
    "all": Row(rule=reduction(None)),
    "prod": Row(rule=reduction(None)),
    "var": Row(rule=reduction(None)),
    "var_mean": Row(rule=reduction(None)),
    "std": Row(rule=reduction(None)),
    "logsumexp": Row(rule=reduction(None)),
    "linalg_vector_norm": Row(rule=reduction(None)),
    "cumsum": Row(rule=along("dim", "!", 1, linear=((0,),))),
    "cumprod": Row(rule=along("dim", "!", 1)),
    "sort": Row(rule=along("dim", "!", 1, 2)),
    "argsort": Row(rule=along("dim", "!", 1)),
    "topk": Row(rule=lambda node: _topk(node)),
    # softmax and losses
    "_safe_softmax": Row(rule=along("dim", "!", 1)),
    "_softmax": Row(rule=along("dim", "#", 1), local=local_ops.softmax),
    "_log_softmax": Row(rule=along("dim", "#", 1), local=local_ops.log_softmax),
    "_softmax_backward_data": Row(rule=along("dim", "#", 2), local=local_ops.softmax_backward),
    "_log_softmax_backward_data": Row(rule=along("dim", "#", 2), local=local_ops.log_softmax_backward),
    "nll_loss_forward": Row(rule=nll_loss, local=local_ops.nll_loss),
    **{name: Row(rule=elementwise_loss, local=local_ops.elementwise_loss) for name in _LOSSES},
    **{f"{name}_backward": Row(rule=elementwise_loss, local=local_ops.elementwise_loss) for name in _LOSSES},
    "binary_cross_entropy_with_logits": Row(rule=elementwise_loss, local=local_ops.elementwise_loss),
    "nll_loss2d_forward": Row(rule=nll_loss, local=local_ops.nll_loss),
    "nll_loss2d_backward": Row(rule=nll_loss_backward, local=local_ops.nll_loss_backward),
    "nll_loss_backward": Row(rule=nll_loss_backward, local=local_ops.nll_loss_backward),
    # indexing
    "embedding": Row(rule=embedding, local=local_ops.embedding),
    "embedding_dense_backward": Row(rule=embedding_backward, local=local_ops.embedding_backward),
    "index": Row(rule=index_rule),
    "index_put": Row(rule=index_put_rule),
    "_unsafe_index_put": Row(rule=index_put_rule),
    "index_select": Row(rule=index_select_rule),
    "index_add": Row(rule=index_add_rule),
    "gather": Row(rule=gather_rule),
    "scatter": Row(rule=scatter_rule),
    "scatter_add": Row(rule=scatter_rule),
    "tril": Row(rule=same_dims, local=local_ops.triangle),
    "triu": Row(rule=same_dims, local=local_ops.triangle),
    # tensors from nothing
    **{
        name: Row(rule=generated(""), local=local_ops.result_shape)
        for name in ("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
    },
    **{name: Row(rule=generated("")) for name in ("full_like", "zeros_like", "ones_like", "empty_like")},
    "arange": Row(rule=generated("*"), local=local_ops.arange),
    # convolution, pooling, normalisation
    "convolution": Row(rule=convolution, local=local_ops.convolution),
    "convolution_backward": Row(rule=convolution_backward, local=local_ops.convolution),
    "max_pool2d_with_indices": Row(rule=leading(2, 1, (2, 2))),
    "max_pool2d_with_indices_backward": Row(rule=leading(2, 3, (2,), ((0,),))),
    "max_pool3d_with_indices": Row(rule=leading(2, 1, (2, 2))),
    "max_pool3d_with_indices_backward": Row(rule=leading(2, 3, (2,), ((0,),))),
    "avg_pool2d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "avg_pool2d_backward": Row(rule=leading(2, 2, (2,), ((0,),))),
    "avg_pool3d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "avg_pool3d_backward": Row(rule=leading(2, 2, (2,), ((0,),))),
    "_adaptive_avg_pool2d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "_adaptive_avg_pool2d_backward": Row(rule=leading(2, 2, (2,), ((0,),))),
    "_adaptive_avg_pool3d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "_adaptive_avg_pool3d_backward": Row(rule=leading(2, 2, (2,), ((0,),))),
    "upsample_nearest2d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "upsample_nearest2d_backward": Row(rule=leading(2, 1, (2,), ((0,),)), local=local_ops.input_size),
    "upsample_nearest3d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "upsample_nearest3d_backward": Row(rule=leading(2, 1, (2,), ((0,),)), local=local_ops.input_size),
    "upsample_bilinear2d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "upsample_bilinear2d_backward": Row(rule=leading(2, 1, (2,), ((0,),)), local=local_ops.input_size),
    "upsample_trilinear3d": Row(rule=leading(2, 1, (2,), ((0,),))),
    "upsample_trilinear3d_backward": Row(rule=leading(2, 1, (2,), ((0,),)), local=local_ops.input_size),
    "native_layer_norm": Row(rule=layer_norm),
    "native_layer_norm_backward": Row(rule=layer_norm_backward),
    "native_group_norm": Row(rule=group_norm, local=local_ops.group_norm),
    "native_group_norm_backward": Row(rule=group_norm_backward, local=local_ops.group_norm),
    "_native_batch_norm_legit_functional": Row(rule=batch_norm, local=local_ops.batch_norm),
    "_native_batch_norm_legit": Row(rule=batch_norm, local=local_ops.batch_norm),
    "_native_batch_norm_legit_no_training": Row(rule=batch_norm),
    "native_batch_norm": Row(rule=batch_norm, local=local_ops.batch_norm),
    "native_batch_norm_backward": Row(rule=batch_norm_backward, local=local_ops.batch_norm_backward),
}


def _unbind(node: fx.Node) -> Rule:
    source = shape(tensor_args(node)[0])
    dim = wrap(argument(node, "dim", 0), len(source))
    names = letters(len(source))
    result = tuple(n for i, n in enumerate(names) if i != dim)
    return Rule(operands=(tuple(names),), results=(result,) * source[dim], flags={names[dim][0]: "!"}, linear=((0,),))


def _topk(node: fx.Node) -> Rule:
    source = shape(tensor_args(node)[0])
    dim = wrap(argument(node, "dim", -1), len(source))
    names = letters(len(source))
    result = tuple(("top",) if i == dim else n for i, n in enumerate(names))
    return Rule(operands=(tuple(names),), results=(result, result), flags={names[dim][0]: "!", "top": "!"})


_USER_ROWS: dict[str, Row] = {}


def pattern(
    op: str, rule: str, *, linear: tuple[tuple[int, ...], ...] = (), reduce: str = "sum", local: Callable[..., Any] | None = None
) -> None:
    """Teach the planner a custom op: `ow.pattern("mylib::scale_rows", "m n, m -> m n")`.

    op: "namespace::name" (all overloads) or "namespace::name.overload". rule, linear, reduce: see `compiler.rule`. local: for letters
    with "*" or "#", the function that writes the local form. Raises RuleError where the rule does not parse, ValueError for a bad op name
    or a reduction that is none of sum, max, min.
    """
    if "::" not in op:
        raise ValueError(f"op {op!r} has no namespace; write 'mylib::{op}' as registered with torch.library")
    if reduce not in ("sum", "max", "min"):
        raise ValueError(f"reduce={reduce!r} is not one of 'sum', 'max', 'min'")
    parsed = parse(rule, linear=linear, reduce=reduce)
    if {"*", "#"} & set(parsed.flags.values()) and local is None:
        raise ValueError(f"rule {rule!r} has a letter with '*' or '#', which needs local=, the function that writes the op's local form")
    _USER_ROWS[op] = Row(rule=rule, linear=linear, reduce=reduce, local=local)


def row_of(node: fx.Node) -> Row | None:
    """The row of an op: the user's, the table's, or pointwise by torch's tag."""
    target = node.target
    if target is operator.getitem or not isinstance(target, OpOverload):
        return None
    full = target._schema.name
    for key in (f"{full}.{target._overloadname}", full):
        if key in _USER_ROWS:
            return _USER_ROWS[key]
    row = TABLE.get(full.removeprefix("aten::"))
    if row is None and (torch.Tag.pointwise in target.tags or full in _POINTWISE_EXTRA):
        return _POINTWISE
    return row


def is_user_row(node: fx.Node) -> bool:
    """Whether the op's rule was added with `pattern`."""
    target = node.target
    return isinstance(target, OpOverload) and bool({target._schema.name, f"{target._schema.name}.{target._overloadname}"} & set(_USER_ROWS))


_POINTWISE = Row(rule=pointwise)
# Pointwise in every respect, though torch does not tag them so.
_POINTWISE_EXTRA = {
    f"aten::{name}"
    for name in (
        "_to_copy", "clone", "masked_fill", "where", "alias", "detach", "fill", "copy", "lift_fresh_copy", "softplus_backward",
        "hardtanh_backward", "hardswish_backward", "hardsigmoid_backward", "elu_backward", "leaky_relu_backward", "mish_backward",
        "rrelu_with_noise_backward", "log_sigmoid_backward", "softshrink_backward", "hardshrink_backward",
    )
}  # fmt: skip


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of an op node; None where it has none and runs replicated."""
    row = row_of(node)
    return row.bind(node) if row is not None else None
