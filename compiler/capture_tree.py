"""Nested values of the user (batches, results of a loss function) as a flat list of tensors and back.

Known are dict (and other mappings), tuple, named tuple, list, dataclass, and whatever torch's pytree knows (transformers' output
classes). Leaves that are no tensors are constants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..torch_compat import tree_flatten, tree_unflatten

Visit = Callable[[str, torch.Tensor], Any]


def map_tensors(value: Any, visit: Visit, path: str = "", constant: Callable[[str, Any], None] | None = None) -> Any:
    """A copy of `value` with every tensor replaced by `visit(path, tensor)`; paths are like "images.0".

    constant(path, leaf) is told of the leaves that are no tensors.
    """

    def child(key: Any, item: Any) -> Any:
        return map_tensors(item, visit, f"{path}.{key}" if path else str(key), constant)

    if isinstance(value, torch.Tensor):
        return visit(path or "batch", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        changes = {f.name: child(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changes)
    if isinstance(value, Mapping):
        items = {key: child(key, item) for key, item in value.items()}
        return items if type(value) is dict else _like(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(child(name, item) for name, item in zip(value._fields, value, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(child(i, item) for i, item in enumerate(value))
    if constant is not None:
        constant(path or "batch", value)
    return value


def _like(value: Mapping, items: dict[str, Any]) -> Any:
    """A mapping of the same class where its constructor takes a dict, else a plain dict."""
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except Exception:
        return items


def batch_tensors(batch: Any) -> dict[str, torch.Tensor]:
    """Path -> tensor of a batch, in the order of the graph's batch inputs."""
    found: dict[str, torch.Tensor] = {}

    def visit(path: str, tensor: torch.Tensor) -> torch.Tensor:
        found[path] = tensor
        return tensor

    map_tensors(batch, visit)
    return found


def batch_constants(batch: Any) -> dict[str, Any]:
    """Path -> value of what is no tensor in a batch. A captured step has these built in: they must be the same at every step."""
    found: dict[str, Any] = {}
    map_tensors(batch, lambda _, tensor: tensor, constant=found.__setitem__)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """Stands for the tensor number `index` among the extra outputs."""

    index: int


@dataclasses.dataclass(slots=True, kw_only=True)
class ExtraSpec:
    """How to rebuild what a loss function returned beside the loss: a tree whose leaves are constants or slots for tensors."""

    spec: Any
    leaves: list[Any]

    def rebuild(self, tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> Any:
        """The extras with `tensors` (the graph's outputs of kind "extra", in order) put in."""
        leaves = [tensors[leaf.index] if isinstance(leaf, _Slot) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


def split_extras(extras: Any) -> tuple[list[torch.Tensor], ExtraSpec]:
    """(tensors, spec) of the extra values of a loss function."""
    leaves, spec = tree_flatten(extras)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    at = iter(range(len(tensors)))
    slots = [_Slot(next(at)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return tensors, ExtraSpec(spec=spec, leaves=slots)
