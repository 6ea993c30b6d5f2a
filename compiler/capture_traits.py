"""What the recorder knows of each op: how to treat it, and when it is no op at all."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from .. import torch_compat
from .capture_translate import HANDLERS

# Ops that yield their input's elements; with equal shape and strides they are no op at all.
_VIEWS_THAT_MAY_BE_NOTHING = {
    "view", "_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "expand", "slice", "permute", "transpose", "t", "squeeze",
    "unsqueeze",
}  # fmt: skip
_COPIES_THAT_MAY_BE_NOTHING = {"clone", "_to_copy", "lift_fresh_copy"}
# Views that keep the elements' order: two of them that end in the shape and strides they began with undo each other.
_RESHAPES = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """name: without namespace and overload. handler: what records it, if not the recorder itself. maybe_nothing: a view that is
    no op where it leaves shape and strides as they are; maybe_copy: a copy of which that holds. starts_with_input: a view of the
    whole input, whose memory begins where the input's does."""

    name: str
    handler: Callable[..., Any] | None
    is_view: bool
    is_write: bool
    is_random: bool
    maybe_nothing: bool
    maybe_copy: bool
    starts_with_input: bool


@lru_cache(maxsize=4096)
def traits_of(func: Any) -> Traits:
    """Traits of an ATen overload."""
    name = name_of(func)
    is_write = torch_compat.is_mutable(func)
    maybe_nothing = name in _VIEWS_THAT_MAY_BE_NOTHING
    return Traits(
        name=name,
        handler=HANDLERS.get(name),
        is_view=not is_write and any(r.alias_info is not None for r in func._schema.returns),
        is_write=is_write,
        is_random=torch_compat.is_random(func),
        maybe_nothing=maybe_nothing,
        maybe_copy=name in _COPIES_THAT_MAY_BE_NOTHING,
        starts_with_input=maybe_nothing and name != "slice",
    )


def name_of(target: Any) -> str:
    """Name of a node's target without namespace and overload."""
    return "getitem" if target is operator.getitem else target._overloadpacket.__name__


def undone(func: Any, name: str, lowered: Any, val: torch.Tensor) -> fx.Node | None:
    """The node x where the call is view(view(x)) and gives back x; val: the call's result."""
    inner = lowered[0]
    if not isinstance(inner, fx.Node) or inner.op != "call_function" or inner.target is operator.getitem:
        return None
    source = inner.args[0] if inner.args else None
    if not isinstance(source, fx.Node) or source.meta["val"] is not val:
        return None
    if name in _RESHAPES and name_of(inner.target) in _RESHAPES:
        return source
    if name in ("t", "transpose") and inner.target is func and inner.args[1:] == tuple(lowered[1:]):
        return source
    return None


def key_of(arg: Any) -> Any:
    """A hashable stand-in for an argument; numbers that are equal but of another type (1, 1.0, True) differ."""
    if isinstance(arg, fx.Node):
        return arg
    if isinstance(arg, (list, tuple)):
        return tuple([key_of(a) for a in arg])
    if isinstance(arg, dict):
        return tuple([(k, key_of(v)) for k, v in arg.items()])
    return repr(arg) if isinstance(arg, float) else (type(arg), arg)


def on_cpu(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments with any device replaced by the CPU: fake tensors of other devices are never made."""
    if not kwargs or kwargs.get("device") is None:
        return kwargs or {}
    return {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": torch.device("cpu")}


def dynamic_text(func: Any) -> str:
    """What is wrong with an op whose result depends on data, and the way out."""
    name = name_of(func)
    if name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
        return (
            "a Python value is taken from a tensor (`.item()`, `int(x)`, `if x.any():` or the like); a captured step runs the same ops for "
            "every batch. Compute with tensors instead (torch.where), or pass the value in the batch as a Python number"
        )
    return (
        f"the result of {name} has a shape that depends on data (nonzero, boolean-mask indexing, unique or the like); use torch.where or "
        "masked_fill, which keep the shape"
    )
