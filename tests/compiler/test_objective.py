"""What a plan minimises: time, price or energy, with figures that make the answers differ; and figures that are missing."""

from __future__ import annotations

import dataclasses
import json

import pytest
from residual_blocks import ACTIVATIONS, analysed
from torch import nn
from typer.testing import CliRunner

import opweave as ow
from opweave import cli
from opweave.compiler.frontier import Trials
from opweave.compiler.limits import memory_limits
from opweave.compiler.planner import plan_step
from opweave.cost_model.cluster import Cluster, ClusterError, Disk, Link
from opweave.cost_model.energy import step_joules, step_price

SMALL = (64, 256, 2, 64)


def machine(num_devices: int = 1, *, price: float | None = 3.6, **changes: object) -> Cluster:
    """CPUs that start ops at once and draw next to nothing while they wait, in a host that draws nothing."""
    cpu = Cluster.preset("cpu", devices=num_devices)
    device = dataclasses.replace(cpu.device, power_w=100.0, idle_power_w=1.0, memory_bytes=1 << 40, launch_s=0.0, view_s=0.0)
    host = dataclasses.replace(cpu.host, power_w=0.0)
    return dataclasses.replace(cpu, device=device, host=host, price_per_node_hour=price, **changes)


def computing_s(plan: ow.Plan) -> float:
    return plan.predicted["streams"]["compute"]


def test_energy_splits_what_time_replicates() -> None:
    """Between two devices a message takes longer than computing all of it twice, but computing twice draws twice the power."""
    slow = Link(latency_s=1e-4, start_s=1e-4, bandwidth_bytes_per_s=1e9)
    cluster = machine(2, intra_node=slow)
    fast, lean = (plan_step(analysed(*SMALL), cluster, objective=objective) for objective in ("time", "energy"))
    assert fast.predicted["step_time_s"] < lean.predicted["step_time_s"]
    assert computing_s(lean) < 0.8 * computing_s(fast)
    assert lean.predicted["joules"] < 0.8 * fast.predicted["joules"]


def test_energy_copies_what_time_computes_again() -> None:
    """A disk that is a little slower than computing again: a processor that waits for it draws a hundredth."""
    disk = Link(latency_s=1e-5, bandwidth_bytes_per_s=4e8)
    cluster = machine(disk=Disk(capacity_bytes=10**13, read=disk, write=disk))
    step = analysed(*ACTIVATIONS)
    limit = {"device": 0.7 * plan_step(step, cluster, places="keep").predicted["peak_bytes"]["device"], "disk": 1e13}
    fast, lean = (plan_step(step, cluster, memory_limit=limit, objective=objective) for objective in ("time", "energy"))
    assert fast.residency["recompute"]["count"] > lean.residency["recompute"]["count"]
    assert lean.residency["offload_disk"]["bytes"] > fast.residency["offload_disk"]["bytes"]
    assert fast.predicted["step_time_s"] < lean.predicted["step_time_s"] and lean.predicted["joules"] < fast.predicted["joules"]


def test_price_is_that_of_the_time_of_all_nodes() -> None:
    """On one cluster the cheapest plan is the fastest; of two clusters the slower may be the cheaper one."""
    step = analysed(*SMALL)
    cheap, dear = machine(1, price=1.0), machine(2, price=10.0, intra_node=Link(latency_s=1e-6, bandwidth_bytes_per_s=1e11))
    plans = {c.num_devices: plan_step(step, c, objective="cost") for c in (cheap, dear)}
    for cluster in (cheap, dear):
        plan, fastest = plans[cluster.num_devices], plan_step(step, cluster)
        assert plan.decisions == fastest.decisions and plan.predicted == fastest.predicted
        assert plan.predicted["price"] == pytest.approx(cluster.price_per_node_hour * plan.predicted["step_time_s"] / 3600)
    assert plans[2].predicted["step_time_s"] < plans[1].predicted["step_time_s"]
    assert plans[1].predicted["price"] < plans[2].predicted["price"]


def test_the_mesh_is_chosen_by_energy() -> None:
    """Four devices, two of them behind a slow link: no other mesh has a plan of less energy."""
    slow = Link(latency_s=2e-4, start_s=1e-4, bandwidth_bytes_per_s=1e8)
    cluster = machine(2, num_nodes=2, inter_node=slow)
    step = analysed(*SMALL)
    lean = plan_step(step, cluster, objective="energy")
    each = [plan_step(step, cluster, mesh=mesh, objective="energy") for mesh in cluster.mesh_candidates()]
    assert lean.predicted["joules"] <= min(plan.predicted["joules"] for plan in each) * 1.02
    assert {tuple(c["mesh"]) for c in lean.candidates} == set(cluster.mesh_candidates())


def test_figures_are_in_the_prediction_for_every_objective() -> None:
    cluster = machine(2)
    plan = plan_step(analysed(*SMALL), cluster)
    predicted = plan.predicted
    assert predicted["joules"] == step_joules(cluster, predicted["step_time_s"], computing_s(plan))
    assert predicted["price"] == step_price(cluster, predicted["step_time_s"])
    assert plan.objective == "time" and ow.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).objective == "time"
    without = machine(2, price=None)
    without = dataclasses.replace(without, device=dataclasses.replace(without.device, power_w=None))
    predicted = plan_step(analysed(*SMALL), without).predicted
    assert predicted["joules"] is None and predicted["price"] is None


def test_of_several_plans_the_frontier_takes_the_best_by_the_objective() -> None:
    slow = Link(latency_s=1e-4, start_s=1e-4, bandwidth_bytes_per_s=1e9)
    cluster, step = machine(2, intra_node=slow), analysed(*SMALL)
    fast, lean = (plan_step(step, cluster, objective=objective) for objective in ("time", "energy"))
    limits = memory_limits(None, cluster)
    for objective, best in (("time", fast), ("cost", fast), ("energy", lean)):
        trials = Trials(analysis=step, cluster=cluster, limits=limits, options={"objective": objective}, plans=[fast, lean])
        assert trials.best(limits) is best


@pytest.mark.parametrize("objective", ["time", "energy"])
def test_a_plan_for_a_cluster_file_is_the_same_each_time(objective: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    machine(4).save(tmp_path / "cluster.json")
    first, second = (plan_step(analysed(*SMALL), Cluster.load(tmp_path / "cluster.json"), objective=objective) for _ in range(2))
    assert first.predicted == second.predicted and first.decisions == second.decisions and first.mesh == second.mesh


@pytest.mark.parametrize("objective", ["speed", "", "Energy", None])
def test_unknown_objectives_are_refused(objective: str | None) -> None:
    cluster = machine()
    with pytest.raises(ClusterError, match=r"unknown objective .*; known are time, cost, energy"):
        plan_step(analysed(*SMALL), cluster, objective=objective)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=r"known are time, cost, energy"):
        ow.compile(nn.Linear(2, 2), cluster, objective=objective)  # type: ignore[arg-type]


def test_missing_figures_are_refused_before_anything_is_captured() -> None:
    cluster = machine(price=None)
    with pytest.raises(ClusterError, match="needs price_per_node_hour, which cluster 'cpu:1' does not state; write it into a cluster file"):
        ow.plan(nn.Linear(2, 2), cluster, None, objective="cost")
    cluster = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, power_w=None))
    with pytest.raises(ClusterError, match=r"needs device.power_w \(watts\), which cluster 'cpu:1' does not state; write it"):
        ow.plan(nn.Linear(2, 2), cluster, None, objective="energy")


def test_command_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    slow = Link(latency_s=1e-4, start_s=1e-4, bandwidth_bytes_per_s=1e9)
    file, plan_file = tmp_path / "cluster.json", tmp_path / "plan.json"
    machine(2, intra_node=slow).save(file)

    def run(*args: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
        return result.exit_code, result.stdout, " ".join(result.stderr.split())

    reports = {}
    for objective in ("time", "cost", "energy"):
        code, out, _ = run("plan", "mlp-tiny", "-c", file, "--objective", objective, "-o", plan_file, "--json")
        assert code == 0
        reports[objective] = json.loads(out)
        assert reports[objective]["objective"] == objective
    assert reports["energy"]["predicted"]["joules"] <= reports["time"]["predicted"]["joules"]
    shown = run("show", plan_file)[1]
    assert "energy of a step" in shown and "price of a step" in shown and "minimised" in shown
    simulated = json.loads(run("simulate", plan_file, "-c", file, "--json")[1])
    for name in ("joules", "price"):
        assert simulated[name] == pytest.approx(json.loads(run("show", plan_file, "--json")[1])["predicted"][name], rel=1e-6)
    points = json.loads(run("frontier", "mlp-tiny", "-c", file, "--objective", "energy", "--points", 2, "--json")[1])["points"]
    assert points[0]["joules"] >= points[-1]["joules"] > 0
    code, _, err = run("plan", "mlp-tiny", "-c", "cpu:1", "--objective", "cost")
    assert code == 2 and "needs price_per_node_hour" in err
    code, _, err = run("plan", "mlp-tiny", "-c", "cpu:1", "--objective", "speed")
    assert code == 2 and "known are time, cost, energy" in err
