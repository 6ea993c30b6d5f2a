"""A custom op of your own, split by the planner after one line: `ow.pattern`.

    python examples/custom_op.py

The op is RMS normalisation with its scale, as a user would bring it from a library of fused kernels: registered with
`torch.library`, with a backward that is an op too. opweave cannot know what is inside; without a rule it runs whole on every device.
One row per op says what can be split. `ow.verify` then runs the planned step on 2 and on 2x2 ranks in this one process and compares it
with the plain model in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import opweave as ow

EPS = 1e-6


# -- the ops, as any library would register them ----------------------------------------------------------------------------


@torch.library.custom_op("mylib::scaled_norm", mutates_args=())
def scaled_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [batch, sequence, hidden], scale [hidden] -> x normalised over hidden, times scale."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale


@torch.library.custom_op("mylib::scaled_norm_backward", mutates_args=())
def scaled_norm_backward(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for x and for scale."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    normal = x * rstd
    inner = grad * scale
    dx = rstd * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    return dx, (grad * normal).sum((0, 1))


# Shapes without computing: what `torch.compile` asks of a custom op, too.
scaled_norm.register_fake(lambda x, scale: torch.empty_like(x))
scaled_norm_backward.register_fake(lambda grad, x, scale: (torch.empty_like(x), torch.empty_like(scale)))
scaled_norm.register_autograd(
    lambda ctx, grad: scaled_norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

# -- what opweave has to be told --------------------------------------------------------------------------------------------

# Batch and sequence can be split; hidden (h!) cannot, since the mean runs over it. In the backward, b and s are missing from the
# gradient of scale: splitting them leaves a partial sum there, and the planner adds the all-reduce, or a reduce-scatter, where it is
# cheapest.
RULES = {
    "mylib::scaled_norm": "b s h!, h! -> b s h!",
    "mylib::scaled_norm_backward": "b s h!, b s h!, h! -> b s h!, h!",
}


class Block(nn.Module):
    """A residual MLP with the custom op in front."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, sequence, width] -> the same shape."""
        return x + self.down(F.gelu(self.up(scaled_norm(x, self.scale))))


class Model(nn.Module):
    """Two blocks and a regression loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x, y [batch, sequence, width] -> loss."""
        return (self.blocks(x) - y).square().mean()


def main() -> None:
    """Verify without and with the rules, and show the difference they make."""
    torch.manual_seed(0)
    model = Model()
    batch = {"x": torch.randn(8, 16, 32), "y": torch.randn(8, 16, 32)}

    report = ow.verify(model, batch, ranks=(2,))
    for op in report.replicated_ops:
        print(f"without a rule: {op}")

    for name, rule in RULES.items():
        ow.pattern(name, rule)
    for ranks in ((2,), (2, 2)):
        report = ow.verify(model, batch, ranks=ranks)  # raises where the planned step is not the model's
        mesh, worst = "x".join(map(str, ranks)), report.max_relative_difference
        print(f"with the rules, mesh {mesh}: {report.plan.patterns}, collectives {report.collectives}")
        print(f"    largest relative difference after 3 steps: loss {worst['loss']:.1e}, parameters {worst['parameters']:.1e}")
        assert not report.replicated_ops, f"still not split: {report.replicated_ops}"
        for decision in report.plan.decisions:
            if decision.nodes[0].startswith("scaled_norm"):
                print(f"    {decision.nodes[0]} is split by: {decision.text}")


if __name__ == "__main__":
    main()
