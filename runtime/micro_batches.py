"""Gradient accumulation in a program: what runs once per micro-batch, and what is summed over them.

A program of several micro-batches has exactly one call of `end`. What stands before it runs once for each of them, what stands behind it
once. Inputs that are not stored are those of one micro-batch. Of what a run makes, the next one finds only

    accumulate(x, is_fresh) -> total     the sum of x over the micro-batches so far; whoever reads it stands behind `end`
    end(names, old, new)                 new[i] in place of the input old[i] (buffers); names: the inputs that each micro-batch brings
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx


def accumulate(total: torch.Tensor | None, x: torch.Tensor, is_fresh: bool) -> torch.Tensor:
    """The sum so far with `x`, in place. total: None at the first micro-batch; in a graph it is not written, the text of the program puts
    it in. is_fresh: nothing else refers to the memory of `x`, so that it can become the sum's."""
    if total is None:
        return x if is_fresh else x.clone()
    return total.add_(x)


def end(names: Sequence[str], old: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    """See the module docstring."""
    raise RuntimeError("micro_batches.end marks a place in a program and is never called; the text of the program loops there")


def end_of(graph: fx.Graph) -> fx.Node | None:
    """The call of `end` in a graph; None in a program of one batch."""
    return next((node for node in reversed(graph.nodes) if node.op == "call_function" and node.target is end), None)
