"""Energy and money of a step: optional figures of the cluster file times the predicted step time."""

from __future__ import annotations

from .cluster import Cluster


def step_joules(cluster: Cluster, step_time_s: float) -> float | None:
    """Joules of all devices and hosts in one step at their stated power; None where the file has no power of the device.

    Power is taken as drawn for the whole step: an upper estimate, since waiting devices draw less.
    """
    if cluster.device.power_w is None:
        return None
    watts = cluster.num_devices * cluster.device.power_w + cluster.num_nodes * (cluster.host.power_w or 0.0)
    return watts * step_time_s


def step_price(cluster: Cluster, step_time_s: float) -> float | None:
    """Price of one step, in the currency of `price_per_node_hour`; None where the file has no price."""
    if cluster.price_per_node_hour is None:
        return None
    return cluster.price_per_node_hour * cluster.num_nodes * step_time_s / 3600
