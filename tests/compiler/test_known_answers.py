"""Known answers: where every expert agrees on the plan, the solver finds it. Golden plans pin what it finds."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opweave as ow
from opweave.cost_model.cluster import Cluster

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


class Block(nn.Module):
    """A transformer MLP block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks over (batch, sequence, width)."""

    def __init__(self, width: int, inner: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.float().pow(2).mean()


class Vocabulary(nn.Module):
    """An embedding, a head over a large vocabulary, and their loss."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), ids.flatten())


def on_meta(make):
    with torch.device("meta"):
        return make()


def planned(model, batch, cluster, **options):
    return ow.plan(model, cluster, batch, optimizer=torch.optim.AdamW(model.parameters()), **options)


def node(plan, name):
    """The decision about one op."""
    return next(d for d in plan.decisions if d.kind == "op" and name in d.nodes)


def golden(plan, name):
    """The plan by module, without times. Written anew with OPWEAVE_GOLDEN=1."""
    rows = [f"{row['path']}: {row['name']} [{row['layout']}]" for row in plan.modules if row["name"] or row["layout"]]
    text = f"mesh {'x'.join(map(str, plan.mesh))}\n" + "\n".join([f"{k}: {v}" for k, v in plan.patterns.items()] + rows) + "\n"
    path = GOLDEN / f"plan_{name}.txt"
    if os.environ.get("OPWEAVE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.fixture
def dgx():
    return Cluster.preset("dgx-a100-640")


def test_small_model_large_batch_is_data_parallel(dgx):
    model = on_meta(lambda: Net(512, 2048, 4))
    plan = planned(model, (torch.empty(256, 512, 512, device="meta"),), dgx)
    assert set(plan.patterns) <= {"data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3"}
    assert plan.patterns["data parallel"] == 8
    golden(plan, "data_parallel")


def test_tight_memory_is_zero_3(dgx):
    model = on_meta(lambda: Net(8192, 32768, 8))
    batch = (torch.empty(128, 128, 8192, device="meta"),)
    whole = sum(p.numel() for p in model.parameters()) * 16
    plan = planned(model, batch, dgx, mesh=(8,), memory_limit=whole / 8 * 1.9)
    assert plan.patterns["ZeRO-3"] >= 16  # both large weights of every block
    assert plan.patterns.get("data parallel", 0) + plan.patterns.get("sequence parallel", 0) == 16  # without attention these cost the same
    assert plan.predicted["peak_bytes"]["device"] <= whole / 8 * 1.9
    golden(plan, "zero3")


def test_wide_layers_small_batch_fast_links_are_column_then_row(dgx):
    model = on_meta(lambda: Net(8192, 32768, 4))
    plan = planned(model, (torch.empty(1, 64, 8192, device="meta"),), dgx, mesh=(8,))
    assert plan.patterns["tensor parallel (column)"] == 4
    assert plan.patterns["tensor parallel (row)"] == 4
    golden(plan, "column_row")


def test_column_then_row_costs_one_reduction_per_block_half():
    """Forward and backward of a block: one all-reduce each, or the equivalent pair of reduce-scatter and all-gather."""
    torch.manual_seed(0)
    report = ow.verify(Net(32, 128, 1), (torch.randn(2, 8, 32),), ranks=(2,), force="megatron")
    kinds = report.collectives
    reductions = kinds.get("all_reduce", 0) + kinds.get("reduce_scatter", 0)
    assert reductions <= 4, kinds  # 2 of the block, at most 2 of the loss and its scale


def test_large_vocabulary_is_vocabulary_parallel(dgx):
    model = on_meta(lambda: Vocabulary(262144, 4096))
    plan = planned(model, (torch.empty(1, 512, dtype=torch.int64, device="meta"),), dgx, mesh=(8,))
    assert plan.patterns["vocabulary parallel"] >= 2  # softmax and loss
    for op in ("_log_softmax", "nll_loss_forward"):
        assert node(plan, op).name == "vocabulary parallel"
    golden(plan, "vocabulary")


def test_a_slow_link_between_nodes_changes_the_plan(dgx):
    """On two nodes tensor parallelism stays inside a node; with links as fast between nodes as inside it need not."""
    model = on_meta(lambda: Net(8192, 32768, 2))
    batch = (torch.empty(16, 64, 8192, device="meta"),)
    two = Cluster.preset("dgx-a100-640", nodes=2)
    fast = dataclasses.replace(two, inter_node=two.intra_node)
    slow_plan, fast_plan = (planned(model, batch, c, mesh=(2, 8)) for c in (two, fast))
    assert fast_plan.solver["objective_s"] < slow_plan.solver["objective_s"]


def test_more_memory_never_costs_time(dgx):
    model = on_meta(lambda: Net(4096, 16384, 4))
    batch = (torch.empty(32, 128, 4096, device="meta"),)
    whole = sum(p.numel() for p in model.parameters()) * 16
    # What the solver minimises; the simulation of the program that comes out may see overlaps that the sum of costs does not.
    times = [planned(model, batch, dgx, mesh=(8,), memory_limit=whole * share).solver["objective_s"] for share in (0.22, 0.4, 1.0, 2.0)]
    assert times == sorted(times, reverse=True) or max(times) - min(times) < 1e-4 * max(times)


def test_equal_layers_share_their_decisions(dgx):
    model = on_meta(lambda: Net(1024, 4096, 6))
    plan = planned(model, (torch.empty(64, 128, 1024, device="meta"),), dgx, mesh=(8,))
    ups = [d for d in plan.decisions if d.kind == "op" and d.path.startswith("blocks.") and len(d.nodes) == 6]
    assert len(ups) > 10
