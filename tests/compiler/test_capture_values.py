"""In-place ops are gone from the graph, and what they wrote is right, through views, too."""

import pytest
import torch
from capturing import assert_same_as_eager, model_of, x_of
from torch import nn


def _writes_to_views(m, x):
    y = m.lin(x)
    part = y[:, 2:6]
    part.mul_(2)
    y[0] = 3.0
    y.view(4, 32).t()[0].add_(1)
    return (y * part.sum()).sum()


def _writes_by_index(m, x):
    h = torch.zeros(8, 16)
    index = torch.arange(8)
    h.index_add_(0, index, m.lin(x))
    h[index, index] = m.lin(x)[:, 0]
    h.scatter_add_(1, torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    out = torch.empty(8, 16)
    torch.add(h.detach(), 1, out=out)
    return (h * out).sum()


def _augmented(m, x):
    y = m.lin(x)
    y += 1
    y /= 2
    y -= x
    y **= 2
    y[..., 0] *= 3
    y.permute(1, 0)[0].zero_()
    y.diagonal().fill_(1.0)
    y.unsqueeze_(0)
    return y.clamp_(max=2.0).mean()


def _reads_after_writes(m, x):
    y = m.lin(x).clone()
    row, rest = y[1], y[2:]
    before = row * 2
    y.masked_fill_(y > 0, 0.5)
    rest.sub_(0.25)
    return (before + row).sum() + rest.sum() + y.relu_().sum()


def _writes_through_transposes(m, x):
    y, z, w = m.lin(x).clone(), torch.zeros(16, 8), torch.ones(4, 2, 16)
    y.t().copy_(torch.arange(128.0).view(16, 8))
    z.t().add_(m.lin(x))
    w.permute(2, 0, 1).view(16, 8)[3:5].mul_(z[3:5])
    w.transpose(0, 1)[1].sub_(torch.ones(16))
    return y.view(-1).sum() + (z.view(-1) * torch.arange(128.0)).sum() + w.view(-1).square().sum()


@pytest.mark.parametrize(
    "function", [_writes_to_views, _writes_by_index, _augmented, _reads_after_writes, _writes_through_transposes]
)
def test_in_place_ops_are_gone_and_right(function):
    assert_same_as_eager(model_of(function), x_of())


def test_changed_buffers_are_outputs():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(16, 16)
            for name in ("count", "average", "untouched"):
                self.register_buffer(name, torch.ones(16 if name == "average" else ()))

        def forward(self, x):
            y = self.lin(x)
            self.count += 1
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
            return ((y - self.average) ** 2).sum() / self.count

    step = assert_same_as_eager(Counts(), x_of())
    assert [o.fqn for o in step.outputs if o.kind == "buffer"] == ["count", "average"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.BatchNorm1d(16, track_running_stats=False), nn.BatchNorm1d(16).eval()])
def test_batch_norm(norm):
    model = model_of(lambda m, x: (m.norm(m.lin(x)) ** 3).sum(), norm=norm)
    if not norm.training:
        model.eval()
    assert_same_as_eager(model, x_of())
