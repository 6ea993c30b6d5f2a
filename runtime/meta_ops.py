"""Ops on tensors without data: equal calls are computed once.

Running an op on the device "meta" costs up to a millisecond of Python in torch, to find shapes. The layers of a model make the same calls
again and again, so the answer to a call on the same shapes, strides and arguments is remembered as shapes. Only of ops whose results are
new memory, each its own: a view has to be taken of the very tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..torch_compat import OpOverload, direct_call, storage_identity

_Recipe = tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None
_Known = tuple[list[_Recipe], bool]


class MetaOps:
    """Remembers what ops yield. One per planning: what it knows is never forgotten."""

    def __init__(self) -> None:
        # call -> (recipes of its results, whether they are a tuple); None: not to be remembered
        self._known: dict[Hashable, _Known | None] = {}

    def of(self, op: Any) -> Callable[..., Any]:
        """A function that does for meta tensors what `op` does."""
        target = direct_call(op)
        if not isinstance(op, OpOverload) or op.is_view:
            return target
        return lambda *args, **kwargs: self._call(op, target, args, kwargs)

    def _call(self, op: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            key = (op, _key(args), _key(tuple(kwargs.items())))
            is_new = key not in self._known
        except TypeError:  # an argument that cannot be a key
            return target(*args, **kwargs)
        known = None if is_new else self._known[key]
        if known is not None:
            made = [None if r is None else torch.empty_strided(r[0], r[1], dtype=r[2], device="meta") for r in known[0]]
            return tuple(made) if known[1] else made[0]
        result = target(*args, **kwargs)
        if is_new:
            self._known[key] = _recipes(result, args, kwargs)
        return result


def _key(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, float | int | bool):
        return (type(value), value)  # 1, 1.0 and True are equal, and mean different things
    return value


def _recipes(result: Any, args: Any, kwargs: Any) -> _Known | None:
    """How to make such results again; None where they share memory with anything."""
    is_tuple = isinstance(result, tuple)
    if isinstance(result, list):
        return None
    results = result if is_tuple else (result,)
    if not all(r is None or isinstance(r, torch.Tensor) for r in results):
        return None
    seen = {storage_identity(t.untyped_storage()) for t in _tensors((args, tuple(kwargs.values())))}
    recipes: list[_Recipe] = []
    for r in results:
        if r is None:
            recipes.append(None)
            continue
        storage = r.untyped_storage()
        if storage_identity(storage) in seen or storage.nbytes() != r.numel() * r.element_size() or not r.is_meta:
            return None
        seen.add(storage_identity(storage))
        recipes.append((tuple(r.shape), r.stride(), r.dtype))
    return recipes, is_tuple


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []
