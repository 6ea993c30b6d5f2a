"""Plan files: what is written is what is read, by value and by what it runs; an interrupted write leaves the old file."""

import json
import os

import pytest
import torch

import opweave as ow
from opweave import zoo
from opweave.compiler.plan import Decision, Plan
from opweave.compiler.verify import verify


@pytest.fixture(scope="module")
def plan():
    return verify(*zoo.load("gpt2-tiny"), (2, 2), force="zero3+megatron").plan


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    assert again.mesh == (2, 2) and all(isinstance(d, Decision) for d in again.decisions)
    # Zeros and empty texts are left out of the file and come back as such.
    assert [(d.kind, d.nodes, d.codes, d.phase) for d in again.decisions] == [(d.kind, d.nodes, d.codes, d.phase) for d in plan.decisions]


def test_the_file_is_plain_json(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["format"] == "opweave.plan" and data["version"] == 1 and data["mesh"] == [2, 2]
    assert {"model", "cluster", "decisions", "predicted", "solver", "patterns", "replicated_ops"} <= data.keys()
    assert {d["kind"] for d in data["decisions"]} == {"op", "input", "value", "read"}


def test_a_loaded_plan_runs_the_same_step(plan, tmp_path):
    """Bit for bit: the same program, not only an equally good one."""
    plan.save(tmp_path / "plan.json")
    model, batch = zoo.load("gpt2-tiny")
    first, second = (verify(model, batch, (2, 2), plan=p) for p in (plan, Plan.load(tmp_path / "plan.json")))
    assert first.losses == second.losses and first.collectives == second.collectives
    assert first.max_relative_difference == second.max_relative_difference


def test_an_interrupted_write_leaves_the_old_file(plan, tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    plan.save(file)
    before = file.read_text()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plan.save(file)
    assert file.read_text() == before


def test_the_fingerprint_follows_what_a_plan_depends_on():
    """Model, batch shape and optimizer change it; weights and learning rate do not."""
    cluster = ow.Cluster.preset("cpu", devices=1)

    def fingerprint(width=64, size=8, optimizer=torch.optim.SGD, **options):
        model = torch.nn.Linear(width, 4)

        def loss_fn(model, batch):
            return model(batch["x"]).square().mean()

        made = optimizer(model.parameters(), **({"lr": 0.1} | options))
        return ow.plan(model, cluster, {"x": torch.randn(size, width)}, optimizer=made, loss_fn=loss_fn).model["fingerprint"]

    base = fingerprint()
    assert base == fingerprint() == fingerprint(lr=0.5)
    others = [fingerprint(width=32), fingerprint(size=4), fingerprint(optimizer=torch.optim.AdamW), fingerprint(momentum=0.9)]
    assert base not in others and len(set(others)) == 4
