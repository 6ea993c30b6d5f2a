"""Transfers between tiers and updates on the host."""

import dataclasses

import pytest

from opweave.cost_model.cluster import Cluster
from opweave.cost_model.transfers import cpu_update_seconds, device_update_seconds, transfer_coefficients, transfer_seconds

DGX = Cluster.preset("dgx-a100-640")


def test_host_copies_use_their_link():
    assert transfer_seconds("device_to_host", 12.8e9, DGX) == pytest.approx(1.0, rel=1e-3)
    fixed, per_byte = transfer_coefficients("host_to_device", DGX)
    assert transfer_seconds("host_to_device", 1e6, DGX) == pytest.approx(fixed + per_byte * 1e6)


def test_disk_and_cores_are_shared_by_the_devices_of_a_node():
    one = dataclasses.replace(DGX, devices_per_node=1)
    assert transfer_coefficients("disk_to_host", DGX)[1] == pytest.approx(8 * transfer_coefficients("disk_to_host", one)[1])
    assert cpu_update_seconds(1e9, DGX) == pytest.approx(8 * cpu_update_seconds(1e9, one))
    assert cpu_update_seconds(1e6, DGX) > device_update_seconds(1e6, DGX)


def test_measured_copies_take_precedence():
    link = dataclasses.replace(DGX.device_to_host, tables={"copy": {"1": [[1e3, 1e-5], [1e6, 1e-3]]}})
    assert transfer_seconds("device_to_host", 1e6, dataclasses.replace(DGX, device_to_host=link)) == pytest.approx(1e-3)


def test_errors():
    with pytest.raises(ValueError, match="unknown transfer 'up'; known are device_to_host"):
        transfer_seconds("up", 1, DGX)
    with pytest.raises(ValueError, match="has no disk"):
        transfer_seconds("disk_to_host", 1, dataclasses.replace(DGX, disk=None))
