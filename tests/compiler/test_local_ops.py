"""Local forms where a device must know more than its piece; that they compute the same is in test_parity."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opweave.compiler import force, planner
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.trainings import pretend_cluster, train_in_lockstep

WORDS = 16


class Words(nn.Module):
    """Predicts each label from its id alone. The table is tied to the head, so both are split by the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.head = nn.Linear(8, WORDS)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels):
        return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), labels.flatten())


def by_the_vocabulary(name, step, factors, mesh):
    """A forced plan in which what can be split by the vocabulary is, whether that pays or not."""
    megatron = force.restriction(name, step, factors, mesh)

    def op(node, bound, axis, codes):
        left = megatron.op(node, bound, axis, codes)
        return [code for code in left if code >= 0 and bound.flags[code] in ("*", "#")] or left

    return dataclasses.replace(megatron, op=op)


def trained(ids, labels, mesh):
    """Loss of one step in lockstep, parameters before and after."""
    model = Words()
    batch = {"ids": ids, "labels": labels}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    analysis = analyse(capture(model, batch, optimizer=optimizer))
    with mock.patch.object(planner, "restriction", by_the_vocabulary):
        plan = planner.plan_step(analysis, pretend_cluster(math.prod(mesh)), mesh=mesh, force="megatron")
    assert plan.patterns["vocabulary parallel"] >= 3  # embedding, log-softmax and loss
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = train_in_lockstep(analysis, plan, model, optimizer, batch, 1)
    return after.losses[0], before, after.values


@pytest.mark.parametrize("mesh", [(2,), (2, 2)])
@pytest.mark.parametrize(("what", "value"), [("labels", WORDS), ("labels", -1), ("ids", WORDS), ("ids", -1)])
def test_indices_outside_a_split_vocabulary_refuse_the_step(what, value, mesh):
    """PyTorch raises IndexError; here no rank knows alone, so the loss is NaN on all, and nothing is learned from such a batch."""
    batch = {"ids": torch.randint(WORDS, (4, 6)), "labels": torch.randint(WORDS, (4, 6))}
    batch[what][3, 2] = value
    loss, before, after = trained(**batch, mesh=mesh)
    assert math.isnan(loss)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_ignored_labels_do_not_count():
    ids, labels = torch.randint(WORDS, (4, 6)), torch.randint(WORDS, (4, 6))
    labels[0, :3] = -100
    loss, before, after = trained(ids, labels, (2,))
    logits = F.linear(before["embed.weight"][ids], before["embed.weight"], before["head.bias"])
    assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)
    assert not torch.equal(after["embed.weight"], before["embed.weight"])
