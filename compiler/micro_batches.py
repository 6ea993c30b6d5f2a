"""Gradient accumulation in the compiler: how a batch is cut into micro-batches, and which ops of a captured step run once for each.

With `accumulate=K` the captured step is that of one micro-batch. Its loss is divided by K; the loss and every gradient go through an
`opweave::accumulate`, the sum over all micro-batches. Phases say the rest: forward and backward ops run K times, updates (and clipping,
which is of that phase) once. Plans, problems and programs are therefore as large as those of one batch, whatever K is.

The sum is linear, so what it adds up may be partial sums over a mesh axis: gradients are then exchanged once per step and not once per
micro-batch. Both are choices of the solver like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .capture_tree import batch_tensors, map_tensors
from .rule import tensor_args
from .rule_table import ACCUMULATE, CAST, UPDATE, op_name
from .step_graph import StepGraph

if TYPE_CHECKING:
    from .plan import Plan


def check_accumulate(num: Any) -> None:
    """Raises ValueError for anything but a whole number above 0."""
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise ValueError(f"accumulate is {num!r}; give the number of micro-batches of a step, a whole number from 1 (no accumulation)")


def micro_batches_asked(accumulate: int | None, plan: Plan | None) -> int:
    """`accumulate=` where it was given, else what the plan was made for, else 1. Raises what `check_accumulate` raises."""
    if accumulate is None:
        return plan.accumulate if plan is not None else 1
    check_accumulate(accumulate)
    return accumulate


def check_batch(batch: Any, num: int) -> None:
    """Raises ValueError where a batch cannot be cut into `num` equal micro-batches.

    Tensors are cut along their first dim. Those without dims, or with a first dim of 1 (it broadcasts), are the same for all micro-batches.
    """
    check_accumulate(num)
    sizes = {path: int(t.shape[0]) for path, t in batch_tensors(batch).items() if t.dim() and t.shape[0] != 1}
    if num == 1:
        return
    if not sizes:
        raise ValueError(f"accumulate is {num}, but no tensor of the batch has a first dim above 1 to cut into micro-batches")
    path, size = next(iter(sizes.items()))
    other = next((p for p in sizes if sizes[p] != size), None)
    if other is not None:
        raise ValueError(
            f"accumulate={num} cuts every tensor of the batch along its first dim, but {path!r} has {size} there and {other!r} has "
            f"{sizes[other]}. Give what all samples share a first dim of 1 (`x.unsqueeze(0)`), make it a buffer of the model, or take "
            "accumulate=1"
        )
    if size % num:
        divisors = ", ".join(str(k) for k in range(1, size + 1) if size % k == 0)
        raise ValueError(f"accumulate={num} does not cut the batch of {size} samples into equal parts; {divisors} would")


def micro_batch(batch: Any, num: int, index: int) -> Any:
    """Part `index` of a batch cut into `num` (a batch for which `check_batch` passes); its tensors are views."""

    def part(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] == 1:
            return tensor
        size = tensor.shape[0] // num
        return tensor[index * size : (index + 1) * size]

    return batch if num == 1 else map_tensors(batch, part)


def is_sum(value: fx.Node) -> bool:
    """Whether a value is a sum over micro-batches."""
    return value.op == "call_function" and op_name(value) == ACCUMULATE


def gradient_sums(step: StepGraph) -> dict[fx.Node, fx.Node]:
    """The sums of gradients over the micro-batches, each with what one micro-batch adds to it. None where there is one batch."""
    loss = step.output_values("loss")
    return {node: tensor_args(node)[0] for node in step.ops if is_sum(node) and node not in loss}


def update_of_sum(total: fx.Node) -> fx.Node | None:
    """The update that alone reads a sum of gradients; None where something else does too, or first (clipping)."""
    readers = list(total.users)
    return readers[0] if len(readers) == 1 and op_name(readers[0]) == UPDATE else None


def sent_to_sum(total: fx.Node) -> fx.Node:
    """What goes to a sum on the host: what is added, or that before it is cast to the sum's wider type. The sum is the same."""
    value = tensor_args(total)[0]
    if value.op != "call_function" or op_name(value) != CAST or len(value.users) != 1:
        return value
    narrow = tensor_args(value)[0]
    source, target = narrow.meta["val"].dtype, value.meta["val"].dtype
    return narrow if source.is_floating_point and source.itemsize < target.itemsize else value


def num_runs(step: StepGraph, phase: str) -> int:
    """How often the ops of a phase run in a step."""
    return 1 if phase == "update" else step.num_micro_batches


def first_behind(step: StepGraph) -> int:
    """Position in the graph of the first op that runs once, behind all micro-batches; that of the output where there is none."""
    for at, node in enumerate(step.graph.nodes):
        if node.op == "output" or (node.op == "call_function" and node.meta["op"].phase == "update"):
            return at
    raise AssertionError("a graph ends in its output")
