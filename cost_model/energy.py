"""Energy and money of a step, from optional figures of the cluster file, and what they make a planner minimise.

A device draws `power_w` while it computes and `idle_power_w` while it waits; a host draws its power all the time:

    joules = devices (idle_power_w T + (power_w - idle_power_w) B) + nodes host.power_w T

with T the step time and B the seconds in which a device computes. For one cluster the price of a step is proportional to T. Its energy is
proportional to T + k B (`busy_weight`): an op that is run on every device instead of being split, to save a message, takes no time but
energy.
"""

from __future__ import annotations

from typing import Literal, get_args

from .cluster import Cluster, ClusterError

Objective = Literal["time", "cost", "energy"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
PREDICTED = {"time": "step_time_s", "cost": "price", "energy": "joules"}
"""The entry of a plan's prediction that an objective minimises."""
IDLE_SHARE = 0.3
"""Power of a waiting device as a share of `power_w` where the file has no `idle_power_w`; GPUs that hold a context draw 15 to 35 %."""

_WAY_OUT = "write it into a cluster file (`opweave clusters NAME --json` prints one) and give that as the cluster"


def check(objective: str, cluster: Cluster) -> None:
    """Raises ClusterError for an unknown objective, or one for which the cluster file lacks the figure."""
    if objective not in OBJECTIVES:
        raise ClusterError(f"unknown objective {objective!r}; known are {', '.join(OBJECTIVES)}")
    if objective == "energy" and cluster.device.power_w is None:
        raise ClusterError(f'objective "energy" needs device.power_w (watts), which cluster {cluster.name!r} does not state; {_WAY_OUT}')
    if objective == "cost" and cluster.price_per_node_hour is None:
        raise ClusterError(f'objective "cost" needs price_per_node_hour, which cluster {cluster.name!r} does not state; {_WAY_OUT}')


def _idle_w(cluster: Cluster) -> float:
    power, idle = cluster.device.power_w or 0.0, cluster.device.idle_power_w
    return min(power, IDLE_SHARE * power if idle is None else idle)


def busy_weight(objective: str, cluster: Cluster) -> float:
    """The k of the module's text: how much a second of computing counts beside a second of the step; 0 but for energy."""
    check(objective, cluster)
    if objective != "energy" or not cluster.device.power_w:
        return 0.0
    waiting = cluster.num_devices * _idle_w(cluster) + cluster.num_nodes * (cluster.host.power_w or 0.0)
    return cluster.num_devices * (cluster.device.power_w - _idle_w(cluster)) / max(waiting, 1e-9)


def step_joules(cluster: Cluster, step_time_s: float, busy_s: float | None = None) -> float | None:
    """Joules of all devices and hosts in one step; None where the file has no power of the device.

    busy_s: seconds in which each device computes; without it all of the step.
    """
    if cluster.device.power_w is None:
        return None
    busy = step_time_s if busy_s is None else min(busy_s, step_time_s)
    idle = _idle_w(cluster)
    device = idle * step_time_s + (cluster.device.power_w - idle) * busy
    return cluster.num_devices * device + cluster.num_nodes * (cluster.host.power_w or 0.0) * step_time_s


def step_price(cluster: Cluster, step_time_s: float) -> float | None:
    """Price of one step, in the currency of `price_per_node_hour`; None where the file has no price."""
    if cluster.price_per_node_hour is None:
        return None
    return cluster.price_per_node_hour * cluster.num_nodes * step_time_s / 3600
