"""opweave's own ops: what a captured graph contains beside ATen.

`opweave::attention` and `moe_mlp` are ops because their ATen form differs per device, `dropout_mask` because a random number here
is a function of its *global* place, `constant` because a graph holds no tensors, `update` because the optimizer is an op too,
and `accumulate` because a graph shows one micro-batch: it is the sum of its operand over all of them.
Importing this module defines them all, with a fake kernel each; kernels of attention and experts are in their own files.
"""

from __future__ import annotations

import math

import torch

from . import attention, moe, random
from .random import local_dropout_mask, local_normal, local_uniform

__all__ = ["local_dropout_mask", "local_normal", "local_uniform"]

DROPOUT_MASK = "(Tensor seed, int op_id, float p, int[] shape) -> Tensor"
UNIFORM = "(Tensor seed, int op_id, int[] shape, ScalarType dtype) -> Tensor"
CONSTANT = "(int[] shape, Scalar[] values, ScalarType dtype, Device? device=None) -> Tensor"
UPDATE = "(Tensor param, Tensor grad, Tensor[] state, str kind, int group) -> Tensor[]"
ACCUMULATE = "(Tensor x, int num) -> Tensor"


def _constant(shape: list[int], values: list, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device).reshape(shape)


def _constant_fake(shape: list[int], values: list, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    assert len(values) == math.prod(shape), f"{len(values)} values for shape {shape}"
    return torch.empty(shape, dtype=dtype, device=device)


def _update(param: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], kind: str, group: int) -> list[torch.Tensor]:
    raise RuntimeError(
        f"opweave::update ({kind}) stands for the optimizer in a captured graph and cannot be called; lowering replaces it by "
        "runtime.update, which applies torch's own optimizer kernels"
    )


def _update_fake(param: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], kind: str, group: int) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t in (param, *state)]


def _accumulate(x: torch.Tensor, num: int) -> torch.Tensor:
    raise RuntimeError(
        f"opweave::accumulate stands for a sum over {num} micro-batches in a captured graph and cannot be called; lowering replaces it by "
        "runtime.micro_batches"
    )


def _accumulate_fake(x: torch.Tensor, num: int) -> torch.Tensor:
    return torch.empty_like(x)


def _define() -> None:
    """Name, schema, kernel and fake kernel of each op, one row each."""
    rows = (
        ("attention", attention.SCHEMA, attention.forward, attention.forward_fake),
        ("attention_backward", attention.BACKWARD_SCHEMA, attention.backward, attention.backward_fake),
        ("moe_mlp", moe.SCHEMA, moe.forward, moe.forward_fake),
        ("moe_mlp_backward", moe.BACKWARD_SCHEMA, moe.backward, moe.backward_fake),
        ("dropout_mask", DROPOUT_MASK, random.dropout_mask, random.dropout_mask_fake),
        ("uniform", UNIFORM, random.uniform, random.random_fake),
        ("normal", UNIFORM, random.normal, random.random_fake),
        ("constant", CONSTANT, _constant, _constant_fake),
        ("update", UPDATE, _update, _update_fake),
        ("accumulate", ACCUMULATE, _accumulate, _accumulate_fake),
    )
    for name, schema, kernel, fake in rows:
        torch.library.define(f"opweave::{name}", schema)
        torch.library.impl(f"opweave::{name}", "default")(kernel)
        torch.library.register_fake(f"opweave::{name}")(fake)


_define()
