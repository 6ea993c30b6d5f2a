"""What tests of micro-batches share: models that make them hard, and the usual loop of backward passes before one update."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opweave import zoo
from opweave.compiler.capture import default_loss
from opweave.compiler.micro_batches import micro_batch

STEPS = 3
ONE = "cpu:1"


class Tied(nn.Module):
    """A tied and a frozen weight, a gradient that is the batch itself, one that two parameters share, a counting buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.scale, self.a, self.b = nn.Parameter(torch.rand(4, 8)), nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = self.frozen(torch.tanh(self.hidden(self.embed(ids)))) + (self.a + self.b)
        loss = F.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())
        return loss + (self.scale * weights.sum(0)).sum() + self.a.sum()


def tied() -> tuple[nn.Module, Any]:
    return Tied(), {"ids": torch.randint(16, (8, 4)), "labels": torch.randint(16, (8, 4)), "weights": torch.randn(8, 4, 8)}


class Shifting(nn.Module):
    """Keeps its last two inputs: the new value of one buffer is the old one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("before", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before = self.last
        self.last = x.mean(0)
        return (self.layer(x) + self.before).square().mean()


class Deep(nn.Module):
    """Its activations outweigh its parameters by far."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layer(x), 0.5, training=True).square().mean()


def load(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    own = {"tied": tied, "shifting": lambda: (Shifting(), {"x": torch.randn(8, 4)})}
    return own[name]() if name in own else zoo.load(name)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True, **options)


def eager_loop(model: nn.Module, batch: Any, num: int, clip: float | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What users write by hand."""
    optimizer = adamw(model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for i in range(num):
            loss = default_loss(model, micro_batch(batch, num, i)) / num
            loss.backward()
            total = total + loss.detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        losses.append(float(total))
    return losses, dict(model.state_dict())
