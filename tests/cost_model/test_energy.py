"""Energy and money of a step."""

import dataclasses

import pytest

from opweave.cost_model.cluster import Cluster, ClusterError
from opweave.cost_model.energy import busy_weight, check, step_joules, step_price


def test_energy_and_price_of_a_step():
    cluster = dataclasses.replace(Cluster.preset("dgx-a100-640x2"), price_per_node_hour=36.0)
    assert step_joules(cluster, 0.5) == pytest.approx(0.5 * (16 * 400 + 2 * 800))
    assert step_price(cluster, 0.5) == pytest.approx(36 * 2 * 0.5 / 3600)


def test_waiting_devices_draw_less():
    cluster = Cluster.preset("dgx-a100-640x2")
    device = dataclasses.replace(cluster.device, idle_power_w=100.0)
    cluster = dataclasses.replace(cluster, device=device)
    assert step_joules(cluster, 0.5, busy_s=0.2) == pytest.approx(16 * (100 * 0.5 + 300 * 0.2) + 2 * 800 * 0.5)
    assert step_joules(cluster, 0.5, busy_s=0.5) == pytest.approx(step_joules(cluster, 0.5))


def test_energy_is_proportional_to_what_a_planner_minimises():
    cluster = Cluster.preset("dgx-a100-640x2")
    k = busy_weight("energy", cluster)
    joules = [step_joules(cluster, t, busy_s=b) / (t + k * b) for t, b in ((0.5, 0.5), (0.5, 0.1), (2.0, 1.0))]
    assert joules == pytest.approx([joules[0]] * 3)
    assert busy_weight("time", cluster) == 0


def test_objectives_need_their_figures():
    cluster = Cluster.preset("cpu")
    with pytest.raises(ClusterError, match='objective "cost" needs price_per_node_hour'):
        check("cost", cluster)
    with pytest.raises(ClusterError, match="unknown objective 'speed'; known are time, cost, energy"):
        check("speed", cluster)
    without = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, power_w=None))
    with pytest.raises(ClusterError, match=r'objective "energy" needs device\.power_w'):
        check("energy", without)


def test_unknown_figures_give_no_answer():
    cluster = Cluster.preset("cpu")
    assert step_price(cluster, 1.0) is None
    assert step_joules(dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, power_w=None)), 1.0) is None
