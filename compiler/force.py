"""Forced plans: the experts' recipes as restrictions of the choice graph, per mesh axis.

A recipe says what one mesh axis may do; "a+b" gives axis 0 recipe a and axis 1 recipe b; a single name is used on all axes, except that
the tensor-parallel recipes take the last axis (the fastest links) and leave the others to data parallelism. Within what is left the
solver still picks the cheapest plan, so a recipe is as good as its expert.

    ddp          ops split the batch; parameters, gradients and optimizer state whole on every device
    zero1        ddp, with optimizer state split
    zero2        ddp, with gradients and optimizer state split
    zero3        ddp, with parameters, gradients and optimizer state split; parameters are gathered where they are read, in the type in
                 which they are read
    megatron     tensor parallel: ops split weights' features (columns, rows, heads, vocabulary, experts), never batch or sequence;
                 activations between blocks are whole
    megatron_sp  megatron, with the sequence split where no weight is involved
    replicate    nothing is split (a reference for one device)
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import fx

from .choices import Restriction
from .factors import BoundOp, FactorMap, result_values
from .layout import REPLICATED
from .micro_batches import is_sum
from .rule import tensor_args
from .rule_table import UPDATE, op_name
from .step_graph import StepGraph
from .strategies import is_pass

RECIPES = ("ddp", "zero1", "zero2", "zero3", "megatron", "megatron_sp", "replicate")
_TENSOR = ("megatron", "megatron_sp")
_WEIGHT_OPS = ("mm", "bmm", "addmm", "convolution", "embedding", "opweave::moe_mlp")


@dataclass(frozen=True, slots=True)
class Quantities:
    """Which atoms of the graph are the batch, which the sequence and which dims of parameters (ids of `FactorMap.class_ids`)."""

    batch: frozenset[int]
    sequence: frozenset[int]
    batch_size: int = 0
    weights: frozenset[int] = frozenset()


def quantities(step: StepGraph, factors: FactorMap) -> Quantities:
    """Batch: the first dim of the batch's tensors, where most of them agree on its size; sequence: the second of integer ones."""
    placeholders = [n for n in step.graph.nodes if n.op == "placeholder"]
    inputs = list(zip(placeholders, step.inputs, strict=True))
    tensors = [n for n, i in inputs if i.kind == "batch" and n.meta["val"].dim() > 0]
    weights = frozenset(atom for n, i in inputs if i.kind == "param" for atom in factors.class_ids(n))
    if not tensors:
        return Quantities(frozenset(), frozenset(), weights=weights)
    size = Counter(int(n.meta["val"].shape[0]) for n in tensors).most_common(1)[0][0]
    batch: set[int] = set()
    sequence: set[int] = set()
    for n in tensors:
        for (dim, _), atom in zip(factors.splits(n), factors.class_ids(n), strict=True):
            if dim == 0 and n.meta["val"].shape[0] == size:
                batch.add(atom)
            elif dim == 1 and not n.meta["val"].is_floating_point():
                sequence.add(atom)
    return Quantities(frozenset(batch), frozenset(sequence), size, weights)


def op_atom_ids(node: fx.Node, bound: BoundOp, factors: FactorMap) -> dict[int, int]:
    """For each atom of an op the id of its quantity."""
    out: dict[int, int] = {}
    tensors = [*zip(bound.operands, tensor_args(node), strict=True), *zip(bound.results, result_values(node), strict=False)]
    for atoms, value in tensors:
        if atoms is not None and value is not None:
            out |= dict(zip(atoms, factors.class_ids(value), strict=True))
    return out


def recipes_per_axis(name: str, num_axes: int) -> tuple[str, ...]:
    """The recipe of each mesh axis. Raises ValueError for an unknown name or a number of parts that does not fit the mesh."""
    parts = tuple(part.strip() for part in name.split("+"))
    for part in parts:
        if part not in RECIPES:
            raise ValueError(f"unknown forced plan {part!r}; known are {', '.join(RECIPES)}, and 'a+b' with one part per mesh axis")
    if len(parts) == 1:
        if parts[0] in _TENSOR:
            return ("ddp",) * (num_axes - 1) + parts
        return parts * num_axes
    if len(parts) != num_axes:
        raise ValueError(f"forced plan {name!r} has {len(parts)} parts, the mesh has {num_axes} axes; give one part per axis")
    return parts


def restriction(name: str, step: StepGraph, factors: FactorMap, mesh: tuple[int, ...]) -> Restriction:
    """What a forced plan leaves in the choice graph. Raises ValueError where the batch cannot be split as the plan says."""
    recipes = recipes_per_axis(name, len(mesh))
    known = quantities(step, factors)
    if not known.batch_size and any(r.startswith(("ddp", "zero")) for r in recipes):
        raise ValueError(f"forced plan {name!r} splits the batch, but no tensor of the batch has a dimension to split")
    batch_axes = [n for n, r in zip(mesh, recipes, strict=True) if r.startswith(("ddp", "zero")) and n > 1]
    if batch_axes and all(known.batch_size % n for n in batch_axes):
        size, pieces = known.batch_size, math.prod(batch_axes)
        num = step.num_micro_batches
        what = "the batch" if num == 1 else f"each of {num} micro-batches"
        raise ValueError(
            f"forced plan {name!r} splits {what} over {pieces} devices, but its size {size} is not divisible by {pieces}; "
            f"give a batch of {num * (size + pieces - size % pieces)}, or let the solver choose (no force)"
        )
    params = {n for n, i in zip((n for n in step.graph.nodes if n.op == "placeholder"), step.inputs, strict=True) if i.kind == "param"}
    gradients = {tensor_args(n)[1] for n in step.ops if op_name(n) == UPDATE}

    def is_cast_of_pieces(node: fx.Node, recipe: str) -> bool:
        """What is gathered or reduced in a narrower type is cast in pieces."""
        cast = op_name(node) == "_to_copy.default"
        return cast and ((recipe == "zero3" and tensor_args(node)[0] in params) or (recipe in ("zero2", "zero3") and node in gradients))

    def op(node: fx.Node, bound: BoundOp, axis: int, codes: list[int]) -> list[int]:
        recipe = recipes[axis]
        if op_name(node) == UPDATE:
            return [REPLICATED] if recipe in ("ddp", "replicate") else _split_if_possible(codes)
        if recipe == "replicate":
            return [REPLICATED]
        atoms = op_atom_ids(node, bound, factors)
        passes = [c for c in codes if is_pass(c)]
        if is_sum(node) and recipe in ("zero2", "zero3"):
            return [*_split_if_possible(codes), *passes]
        if is_cast_of_pieces(node, recipe):
            return list(dict.fromkeys([*_split_if_possible(codes), REPLICATED, *passes]))
        if recipe not in _TENSOR:
            batch = [c for c in codes if c >= 0 and atoms.get(c) in known.batch]
            return batch or [REPLICATED, *passes]
        heavy = _has_weight(node, params) and op_name(node).split(".")[0] in _WEIGHT_OPS
        left_out = known.batch if recipe == "megatron_sp" and not heavy else known.batch | known.sequence
        split = [c for c in codes if c >= 0 and atoms.get(c) not in left_out]
        return split if heavy and split else [REPLICATED, *split, *passes]

    def stored(node: fx.Node, axis: int, codes: list[int]) -> list[int]:
        if recipes[axis] == "zero3":
            return _split_if_possible(codes)
        return codes if recipes[axis] in _TENSOR else [REPLICATED]

    def gradient(axis: int, atom: int) -> bool:
        return recipes[axis] not in ("ddp", "zero1", "replicate")

    own = tuple(axis for axis, recipe in enumerate(recipes) if recipe in _TENSOR)
    return Restriction(name=name, op=op, stored=stored, gradient=gradient, own_reads=own)


def _split_if_possible(codes: list[int]) -> list[int]:
    return [c for c in codes if c >= 0] or [REPLICATED]


def _has_weight(node: fx.Node, params: set[fx.Node]) -> bool:
    """Whether an op reads a parameter, directly or through views and casts of it."""
    for arg in tensor_args(node):
        seen = arg
        while seen.op == "call_function" and len(tensor_args(seen)) == 1:
            seen = tensor_args(seen)[0]
        if seen in params:
            return True
    return False
