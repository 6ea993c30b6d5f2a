"""Every private torch name opweave touches, each with the version it was checked on.

Supported are torch 2.11 to 2.13. The names below were found in 2.13, as marked, and checked on 2.11 and 2.12 by the tests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (  # 2.13
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode  # 2.13
from torch.utils._python_dispatch import _disable_current_modes  # 2.13
from torch.utils._pytree import tree_flatten, tree_unflatten  # 2.13: also knows transformers' output classes

__all__ = [
    "DYNAMIC_OUTPUT_ERRORS",
    "DispatchMode",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "backward_sequence_number",
    "forward_sequence_number",
    "fresh_fake",
    "functional_overload",
    "is_constant",
    "is_mutable",
    "is_random",
    "mutated_arguments",
    "named_arguments",
    "no_dispatch_modes",
    "quiet_fake_tensors",
    "tree_flatten",
    "tree_unflatten",
]

OpOverload = torch._ops.OpOverload  # 2.13

# What a fake tensor raises where a result's shape or value depends on data.
DYNAMIC_OUTPUT_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)


def forward_sequence_number() -> int:
    """Number of the autograd node made last on this thread (the one of the op now being dispatched)."""
    return torch.autograd._get_sequence_nr() - 1  # 2.13


def backward_sequence_number() -> int:
    """Number of the autograd node whose backward is running; -1 outside of one."""
    node = torch._C._current_autograd_node()  # 2.13
    return -1 if node is None else node._sequence_nr()


def is_mutable(op: Any) -> bool:
    """Whether an ATen overload declares that it writes to an argument."""
    return op._schema.is_mutable


def is_random(op: Any) -> bool:
    """Whether an ATen overload draws random numbers."""
    return torch.Tag.nondeterministic_seeded in op.tags


def mutated_arguments(op: Any) -> list[tuple[int, str]]:
    """(position, name) of the arguments an overload writes to."""
    return [(i, a.name) for i, a in enumerate(op._schema.arguments) if _writes(a)]


def functional_overload(op: Any) -> Any:
    """The overload that computes what `op` (in-place or out=) writes, without writing; None where torch has none.

    It takes the same arguments, less those named `out`.
    """
    packet = op._overloadpacket
    name = packet._qualified_op_name.split("::")[1]
    base = "index_put" if name == "_index_put_impl_" else name.removesuffix("_")
    candidates = getattr(torch.ops.aten, base, None)
    if candidates is None:
        return None
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if not (a.kwarg_only and _writes(a)) and a.name != "unsafe"]
    for overload in candidates.overloads():
        found = getattr(candidates, overload)
        if not found._schema.is_mutable and [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            return found
    return None


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def no_dispatch_modes() -> AbstractContextManager[Any]:
    """Within, ops run on real tensors: no dispatch mode sees them."""
    return _disable_current_modes()


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Within, a failing op on fake tensors raises without logging its traceback as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # 2.13
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def fresh_fake(mode: FakeTensorMode, like: torch.Tensor) -> torch.Tensor:
    """A new fake CPU tensor with the shape, strides and dtype of `like`; several times faster than running an op for it."""
    with torch._C._DisableTorchDispatch():  # 2.13: the mode does the same around its own kernels
        element = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(mode, element, _CPU)


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether the value of a fake tensor is known."""
    return getattr(tensor, "constant", None) is not None  # 2.13


_CPU = torch.device("cpu")


def named_arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in."""
    named = {}
    for i, arg in enumerate(op._schema.arguments):
        named[arg.name] = args[i] if i < len(args) else kwargs.get(arg.name, arg.default_value)
    return named


# ------------------------------------------------------------------------------------------------------------------- runtime

# Renamed in 2.13; the old names warn there. Same arguments: (output, input, [op], group, async_op).
all_gather_single = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
reduce_scatter_single = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor

# The update kernels behind torch.optim's `fused=True`: in place on lists of tensors.
fused_adam = torch._fused_adam_  # 2.13
fused_adamw = torch._fused_adamw_  # 2.13
fused_sgd = torch._fused_sgd_  # 2.13
foreach_add_ = torch._foreach_add_  # 2.13


def direct_call(op: Any) -> Any:
    """What an overload's `__call__` calls; saves a Python frame per call."""
    return op._op if isinstance(op, OpOverload) else op  # 2.13


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell torch's learning-rate schedulers that the optimizer has made a step (they warn otherwise). Checked on 2.13."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def storage_identity(storage: torch.UntypedStorage) -> int:
    """A number two tensors share exactly while they share this storage. Checked on 2.13."""
    return storage._cdata


def returns_alias(op: Any) -> bool:
    """Whether an overload declares that a result may share memory with an argument."""
    return any(result.alias_info is not None for result in op._schema.returns)  # 2.13
