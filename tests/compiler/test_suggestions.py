"""What would make a step fit: every suggestion was tried."""

import dataclasses

import pytest
import torch

from opweave import zoo
from opweave.compiler.api import plan
from opweave.compiler.planner import DoesNotFitError
from opweave.compiler.suggestions import available, batch_size, first_part, what_would_fit
from opweave.cost_model.cluster import Cluster

CPU = Cluster.resolve("cpu:1")
LIMIT = 60_000


def mlp():
    model, batch = zoo.load("mlp-tiny")
    return model, batch, torch.optim.AdamW(model.parameters())


def test_every_suggestion_that_fits_is_a_plan():
    model, batch, optimizer = mlp()
    with pytest.raises(DoesNotFitError):
        plan(model, CPU, batch, optimizer=optimizer, memory_limit=LIMIT)
    found = what_would_fit(model, CPU, batch, optimizer=optimizer, memory_limit=LIMIT)
    assert found.limits == {"device": LIMIT} and found.untried == []
    changes = {s.change.partition(":")[0].split()[0]: s for s in found.suggestions}
    assert set(changes) == {"--memory-limit", "--autocast", "--accumulate", "--batch"} and len(found.suggestions) == 8
    times = [s.same_work_s for s in found.suggestions if s.fits]
    assert times == sorted(times) and all(not s.fits for s in found.suggestions[len(times) :])
    larger = next(s for s in found.suggestions if "a larger device" in s.change)
    assert larger.fits and LIMIT < larger.peak_bytes["device"] <= found.least_bytes
    made = plan(model, CPU, batch, optimizer=optimizer, memory_limit=found.least_bytes)
    assert made.predicted["step_time_s"] == pytest.approx(larger.step_time_s)
    assert found.peak_at and sum(row["bytes"] for row in found.peak_owner) <= found.least_bytes
    with pytest.raises(DoesNotFitError):
        plan(model, CPU, batch, optimizer=optimizer, memory_limit=found.refused_bytes)


def test_disk_is_suggested_where_it_helps():
    model, batch, optimizer = mlp()
    found = what_would_fit(model, CPU, batch, optimizer=optimizer, memory_limit=110_000)
    disk = next(s for s in found.suggestions if "all of the disk" in s.change)
    assert disk.fits and disk.peak_bytes["device"] <= 110_000 and disk.peak_bytes["disk"] > 0


def test_no_time_is_said():
    model, batch, optimizer = mlp()
    found = what_would_fit(model, CPU, batch, optimizer=optimizer, memory_limit=LIMIT, budget_s=0.0)
    assert len(found.untried) == 7 and len(found.suggestions) == 1, "a larger device is known without a search, coarsely"
    assert found.refused_bytes == 0


def test_tiers_there_are():
    assert available(CPU) == {"disk": CPU.disk.capacity_bytes}
    dgx = Cluster.preset("dgx-a100-640")
    assert available(dgx) == {"host": dgx.host_bytes_per_device, "disk": dgx.disk.capacity_bytes // 8}
    assert available(dataclasses.replace(CPU, disk=None)) == {}


def test_a_smaller_batch():
    batch = {"x": torch.zeros(8, 3), "more": [torch.ones(8, dtype=torch.int64)], "scale": 2.0}
    assert batch_size(batch) == 8
    half = first_part(batch, 2)
    assert half["x"].shape == (4, 3) and half["more"][0].shape == (4,) and half["scale"] == 2.0
    assert batch_size({"x": torch.zeros(8, 3), "edges": torch.zeros(2, 9)}) is None, "which size is the batch's nobody says"
    assert batch_size({"x": torch.zeros(())}) is None
