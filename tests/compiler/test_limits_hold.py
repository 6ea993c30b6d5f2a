"""What is planned within a limit runs within it: random limits between the leanest plan's peak and that of keeping everything.

The executor stops a step that exceeds its limit, so a run that ends has kept it. Models, limits and tiers are drawn by a fixed seed.
"""

import functools
import random

import pytest
import torch

import opweave as ow
from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.frontier import Trials, device_peak, smallest
from opweave.compiler.planner import DoesNotFitError
from opweave.cost_model.cluster import Cluster

CPU = Cluster.preset("cpu", devices=1)
BATCHES = {
    "mlp-tiny": (64, 64), "opt-tiny": (4, 16), "vit-tiny": (8, 32), "convnet-tiny": (16, 32), "mixtral-tiny": (4, 16), "t5-tiny": (4, 16),
}  # fmt: skip
DISK_BYTES = 10**9


def loaded(name):
    model, batch = zoo.load(name, BATCHES[name])
    return model, batch, torch.optim.AdamW(model.parameters(), lr=1e-3)


@functools.cache
def ends(name: str) -> tuple[int, int]:
    """(peak of the leanest plan that was found, peak of the one that keeps everything)."""
    model, batch, optimizer = loaded(name)
    trials = Trials(analysis=analyse(capture(model, batch, optimizer=optimizer)), cluster=CPU, limits={"disk": float(DISK_BYTES)})
    found = smallest(trials, share=0.3)
    return device_peak(found.plan), found.unlimited_bytes


def runs_within(name: str, limits: dict[str, int], folder) -> bool:
    """Whether a plan was found; it must then run within its limits, as predicted."""
    model, batch, optimizer = loaded(name)
    step = ow.compile(model, CPU, optimizer=optimizer, memory_limit=limits, disk_path=folder)
    try:
        step.prepare(batch)
    except DoesNotFitError:
        return False
    assert float(step(batch)) > 0
    pools = step.executor.memory.pools
    step.executor.close()
    assert pools == step.plan.predicted["peak_bytes"]
    assert all(num_bytes <= limits.get(pool, 0) for pool, num_bytes in pools.items()), f"{pools} within {limits}"
    return True


def random_limits(name: str, seed: int) -> dict[str, int]:
    draw = random.Random(f"{name} {seed}")
    least, most = ends(name)
    limits = {"device": draw.randint(least, most)}
    return limits | ({"disk": DISK_BYTES} if seed % 3 else {})  # every third with recomputation only


@pytest.mark.parametrize("name", ["convnet-tiny"])
def test_a_random_limit_holds(name, tmp_path):
    found = [runs_within(name, random_limits(name, seed), tmp_path) for seed in (1, 2)]
    assert all(found), "from the leanest plan's peak on there is a plan"


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHES)
def test_random_limits_hold(name, tmp_path):
    found = {seed: runs_within(name, random_limits(name, seed), tmp_path) for seed in range(6)}
    assert all(fits for seed, fits in found.items() if seed % 3), "from the leanest plan's peak on there is a plan"
