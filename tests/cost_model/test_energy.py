"""Energy and money of a step."""

import dataclasses

import pytest
from opweave.cost_model.cluster import Cluster
from opweave.cost_model.energy import step_joules, step_price


def test_energy_and_price_of_a_step():
    cluster = dataclasses.replace(Cluster.preset("dgx-a100-640x2"), price_per_node_hour=36.0)
    assert step_joules(cluster, 0.5) == pytest.approx(0.5 * (16 * 400 + 2 * 800))
    assert step_price(cluster, 0.5) == pytest.approx(36 * 2 * 0.5 / 3600)


def test_unknown_figures_give_no_answer():
    cluster = Cluster.preset("cpu")
    assert step_price(cluster, 1.0) is None
    assert step_joules(dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, power_w=None)), 1.0) is None
