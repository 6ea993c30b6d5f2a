"""Small training steps of residual blocks, with one extreme of memory each; captured on the meta device, once."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from opweave.compiler.analyse import Analysis, analyse
from opweave.compiler.capture import capture


class Block(nn.Module):
    """A product, an activation and a product, with a residual around them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@functools.cache
def analysed(width: int, hidden: int, depth: int, batch_size: int) -> Analysis:
    with torch.device("meta"):
        model = Blocks(width, hidden, depth)
        x = torch.empty(batch_size, width)
    return analyse(capture(model, (x,), optimizer=torch.optim.AdamW(model.parameters())))


ACTIVATIONS = (64, 512, 8, 2048)
"""Little state, many samples: the results of the forward pass are nearly all of the memory."""

STATE = (1024, 4096, 4, 64)
"""Much state, few samples: parameters, gradients and optimizer state are nearly all of the memory."""
