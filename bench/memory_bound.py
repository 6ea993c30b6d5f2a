"""The least seconds that a step can take when parameters and AdamW's state do not fit on the device: arithmetic alone.

Per element of the parameters a step has to do one of these (bytes; float32 parameter and two moments, computing in bfloat16):

    what                    device  host   to device   to host   updated by
    resident                  12      -        -           -     device
    moments fetched            4      8        8           8     device      m and v come and go
    fetched                    -     14       14          12     device      bfloat16 for the forward pass; later all of it
    fetched once               4     12       12          12     device      kept from the forward to the backward pass
    updated by the CPU         -     14        4           2     CPU         bfloat16 twice; the gradient goes
    updated by the CPU, once   2     14        2           2     CPU         bfloat16 kept from the forward to the backward pass

The best mix makes the longest of these least: computing, the link to the device, the link to the host, the CPU. Left out are activations
(which cost memory, copies or recomputation), gradients on the device, latencies, and that a phase can hide only its own copies: no plan is
faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from ortools.linear_solver import pywraplp

from opweave.cost_model.cluster import Cluster
from opweave.cost_model.transfers import cpu_update_seconds, device_update_seconds, transfer_coefficients


@dataclass(frozen=True, slots=True)
class Way:
    """Bytes per element on the device and on the host, and of copies; on_cpu: updated there."""

    device: float = 0.0
    host: float = 0.0
    to_device: float = 0.0
    to_host: float = 0.0
    on_cpu: bool = False


WAYS = {
    "resident": Way(device=12),
    "moments fetched": Way(4, 8, 8, 8),
    "fetched": Way(0, 14, 14, 12),
    "fetched once": Way(4, 12, 12, 12),
    "updated by the CPU": Way(0, 14, 4, 2, True),
    "updated by the CPU, fetched once": Way(2, 14, 2, 2, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """seconds: of the step. binds: what takes so long. seconds_of: each part's. shares: of the elements, per way. *_bytes: per device."""

    seconds: float
    binds: str
    seconds_of: dict[str, float]
    to_device_bytes: float
    to_host_bytes: float
    host_bytes: float
    shares: dict[str, float]


def least_seconds(num_elements: float, compute_s: float, room_bytes: float, host_bytes: float, cluster: Cluster) -> Bound | None:
    """The bound of one device. num_elements: of its parameters. compute_s: of a step that updates all of them on the device. room_bytes,
    host_bytes: there are. None where they do not fit both together."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    share = {name: solver.NumVar(0.0, 1.0, name) for name in WAYS}
    step_s = solver.NumVar(0.0, solver.infinity(), "step")

    def total(per_element: dict[str, float]):  # type: ignore[no-untyped-def]
        return sum(share[name] * (per_element[name] * num_elements) for name in WAYS)

    def each(field: str, factor: float = 1.0) -> dict[str, float]:
        return {name: getattr(way, field) * factor for name, way in WAYS.items()}

    in_s, out_s = (transfer_coefficients(way, cluster)[1] for way in ("host_to_device", "device_to_host"))
    saved_s = (device_update_seconds(num_elements, cluster) - cluster.device.launch_s) / num_elements
    parts = {
        "compute": compute_s - total(each("on_cpu", saved_s)), "host to device": total(each("to_device", in_s)),
        "device to host": total(each("to_host", out_s)), "CPU update": total(each("on_cpu", cpu_update_seconds(1.0, cluster))),
    }  # fmt: skip
    solver.Add(sum(share.values()) == 1.0)
    solver.Add(total(each("device")) * (1 / room_bytes) <= 1.0)
    solver.Add(total(each("host")) * (1 / host_bytes) <= 1.0)
    for part in parts.values():
        solver.Add(step_s >= part)
    solver.Minimize(step_s)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return None
    value = {name: variable.solution_value() for name, variable in share.items()}
    seconds = {name: part.solution_value() for name, part in parts.items()}

    def moved(field: str) -> float:
        return num_elements * sum(value[name] * getattr(way, field) for name, way in WAYS.items())

    return Bound(
        seconds=step_s.solution_value(), binds=max(seconds, key=lambda name: seconds[name]), seconds_of=seconds,
        to_device_bytes=moved("to_device"), to_host_bytes=moved("to_host"), host_bytes=moved("host"), shares=value,
    )  # fmt: skip
