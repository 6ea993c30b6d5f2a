"""Seconds of moving bytes between tiers (device, host, disk) and of an optimizer update on the CPU.

All figures are for one device while every device of its node does the same: the links to the host are already given that way
(`Cluster.device_to_host`), the disk and the host's cores are divided by the devices of the node here.
"""

from __future__ import annotations

from typing import Literal, get_args

from .cluster import Cluster, Link
from .collectives import interpolate

Direction = Literal["device_to_host", "host_to_device", "host_to_disk", "disk_to_host"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)


def transfer_coefficients(direction: str, cluster: Cluster) -> tuple[float, float]:
    """(seconds, seconds per byte) of one device's transfer. Raises ValueError for an unknown direction or a missing disk."""
    link = _link(direction, cluster)
    sharers = cluster.devices_per_node if "disk" in direction else 1
    return link.start_s + link.latency_s, sharers / link.rate_bytes_per_s


def transfer_seconds(direction: str, num_bytes: float, cluster: Cluster) -> float:
    """Seconds one device waits for `num_bytes` of its own to move; measured tables ("copy" of the link) take precedence."""
    link = _link(direction, cluster)
    points = link.tables.get("copy", {}).get("1") if link.tables else None
    if points:
        sharers = cluster.devices_per_node if "disk" in direction else 1
        return interpolate(points, num_bytes * sharers)
    fixed, per_byte = transfer_coefficients(direction, cluster)
    return fixed + per_byte * num_bytes


def cpu_update_seconds(num_elements: float, cluster: Cluster) -> float:
    """Seconds to update `num_elements` parameters of one device on the host, all devices of the node doing so at once."""
    return num_elements * cluster.devices_per_node / cluster.host.update_elements_per_s


def cpu_add_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Seconds to add `num_bytes` of one device to a sum on the host (two reads, one write), all devices of the node doing so at once."""
    return 3 * num_bytes * cluster.devices_per_node / cluster.host.memory_bandwidth_bytes_per_s


def device_update_seconds(num_elements: float, cluster: Cluster) -> float:
    """Seconds of the fused optimizer on the device: measured elements per second, else 28 bytes per element at the memory's bandwidth."""
    device = cluster.device
    rate = device.update_elements_per_s or device.memory_bandwidth_bytes_per_s / 28
    return device.launch_s + num_elements / rate


def _link(direction: str, cluster: Cluster) -> Link:
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown transfer {direction!r}; known are {', '.join(DIRECTIONS)}")
    if direction == "device_to_host":
        return cluster.device_to_host
    if direction == "host_to_device":
        return cluster.host_to_device
    if cluster.disk is None:
        raise ValueError(f"cluster {cluster.name!r} has no disk; give one in the cluster file to plan for the disk tier")
    return cluster.disk.read if direction == "disk_to_host" else cluster.disk.write
