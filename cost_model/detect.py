"""`Cluster.detect`: this machine as a cluster, from what the system says and a measurement of about a second.

Under torch.distributed the description covers the whole job and rank 0's numbers are sent to all ranks, so that every rank makes the
same plan. Measured constants are rough (one size each); `opweave calibrate` measures properly.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .cluster import FORMAT, VERSION, Cluster

_MEASURED = "measured: Cluster.detect, one size, best of a few runs"
_SYSTEM = "measured: reported by the operating system"
_OVERLAP = "assumption: a fifth of compute hides messages; in python -m bench.peers on two cores 0.5 hid too much, 0 too little"
_ASSUMED = "assumption: not measured by Cluster.detect; run `opweave calibrate`"


def detect_cluster(quick: bool = True) -> Cluster:
    """Describe this machine or, under torch.distributed, the job. `quick` skips the timing of matrix products at a second size."""
    distributed = dist.is_available() and dist.is_initialized()
    data = _describe(quick)
    if distributed:
        data["intra_node"] = _measure_all_reduce(data)
        data["sources"]["intra_node"] = _MEASURED
        box = [data]
        dist.broadcast_object_list(box, src=0)
        data = box[0]
    return Cluster.from_dict(data)


def _describe(quick: bool) -> dict[str, Any]:
    per_node = _devices_per_node()
    data = _describe_cuda(per_node) if torch.cuda.is_available() else _describe_cpu(per_node, quick)
    initialised = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if initialised else int(os.environ.get("WORLD_SIZE", per_node)) if _under_torchrun() else per_node
    data["num_nodes"] = max(1, world // per_node)
    return data


def _devices_per_node() -> int:
    """Ranks on this node under torchrun, else the CUDA devices, else one process."""
    if dist.is_available() and dist.is_initialized():
        return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if _under_torchrun():
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, torch.cuda.device_count())


def _under_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control group's where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total


def best_seconds(run: Callable[[], Any], budget_s: float = 0.15, at_least: int = 3) -> float:
    """Shortest of several runs of `run` within about `budget_s` seconds; the first run is a warm-up."""
    run()
    best, started, runs = float("inf"), time.perf_counter(), 0
    while runs < at_least or time.perf_counter() - started < budget_s:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        runs += 1
    return best


def _matmul_flops(dtype: torch.dtype, size: int) -> float:
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, b), 0.1)


def _describe_cpu(per_node: int, quick: bool) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _total_memory()
    size = 384 if quick else 768
    flops = {str(d).removeprefix("torch."): _matmul_flops(d, size) for d in (torch.float32, torch.float64)}
    flops["bfloat16"] = _matmul_flops(torch.bfloat16, 256)
    source, target = torch.ones(1 << 23), torch.empty(1 << 23)
    bandwidth = 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
    launch = best_seconds(lambda: torch.add(source[:8], source[:8]), 0.02)
    update = 0.6 * bandwidth / 28
    copy = {"latency_s": launch, "bandwidth_bytes_per_s": bandwidth / 2}
    device = {
        "name": f"cpu-{cores}-cores",
        "kind": "cpu",
        "memory_bytes": memory // (2 * per_node),
        "usable_fraction": 0.9,
        "memory_bandwidth_bytes_per_s": bandwidth,
        "peak_flops": flops,
        "launch_s": launch,
        "view_s": launch / 2,
        "update_elements_per_s": update,
    }
    host = {
        "memory_bytes": memory // 2,
        "memory_bandwidth_bytes_per_s": bandwidth * per_node,
        "cores": cores,
        "update_elements_per_s": update * per_node,
    }
    sources = {
        "device": _MEASURED,
        "device.memory_bytes": _SYSTEM + "; half is the device tier, half the host tier, shared by the ranks",
        "device.usable_fraction": "assumption: a tenth is left to the system",
        "device.update_elements_per_s": "assumption: 28 bytes per element at 60 % of the measured memory bandwidth",
        "host": _MEASURED,
        "host.memory_bytes": _SYSTEM,
        "host.usable_fraction": "assumption: a tenth is left to the system",
        "host.update_elements_per_s": "assumption: 28 bytes per element at 60 % of the measured memory bandwidth",
        "device_to_host": _MEASURED,
        "host_to_device": _MEASURED,
    }
    return _assemble("detected-cpu", per_node, device, host, copy, sources, overlap=0.2)


def _describe_cuda(per_node: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    memory = _total_memory()
    flops = {str(d).removeprefix("torch."): _cuda_matmul_flops(d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    source = torch.ones(1 << 26, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _cuda_seconds(lambda: target.copy_(source))
    pinned = torch.empty(1 << 24, pin_memory=True)
    up = pinned.nbytes / _cuda_seconds(lambda: target[: 1 << 24].copy_(pinned, non_blocking=True))
    device = {
        "name": properties.name,
        "kind": "cuda",
        "memory_bytes": properties.total_memory,
        "usable_fraction": 0.95,
        "reserved_bytes": 2 << 30,
        "memory_bandwidth_bytes_per_s": bandwidth,
        "peak_flops": flops,
        "launch_s": 4e-6,
    }
    host = {
        "memory_bytes": memory,
        "memory_bandwidth_bytes_per_s": 100e9,
        "cores": os.cpu_count() or 1,
        "update_elements_per_s": 1.5e9,
    }
    sources = {
        "device": _MEASURED,
        "device.memory_bytes": _SYSTEM,
        "device.launch_s": _ASSUMED,
        "device.usable_fraction": _ASSUMED,
        "device.reserved_bytes": _ASSUMED,
        "host": _ASSUMED,
        "host.memory_bytes": _SYSTEM,
        "device_to_host": _MEASURED,
        "host_to_device": _MEASURED,
    }
    copy = {"latency_s": 1e-5, "bandwidth_bytes_per_s": up}
    return _assemble("detected-cuda", per_node, device, host, copy, sources, overlap=0.8)


def _cuda_seconds(run: Callable[[], Any]) -> float:
    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    return best_seconds(synchronised, 0.1)


def _cuda_matmul_flops(dtype: torch.dtype) -> float:
    size = 2048 if dtype == torch.float64 else 4096
    a = torch.randn(size, size, device="cuda").to(dtype)
    return 2 * size**3 / _cuda_seconds(lambda: torch.mm(a, a))


def _assemble(
    name: str, per_node: int, device: dict[str, Any], host: dict[str, Any], copy: dict[str, Any], sources: dict[str, str], overlap: float
) -> dict[str, Any]:
    disk_bytes = shutil.disk_usage(tempfile.gettempdir()).free
    cuda = device["kind"] == "cuda"
    intra = {"latency_s": 1e-6, "start_s": 8e-6, "bandwidth_bytes_per_s": 2e10} if cuda else _GLOO
    disk = {
        "capacity_bytes": max(disk_bytes, 10**6),
        "read": {"latency_s": 1e-4, "bandwidth_bytes_per_s": 1e9},
        "write": {"latency_s": 1e-4, "bandwidth_bytes_per_s": 5e8},
    }
    links = {"intra_node": _ASSUMED, "inter_node": _ASSUMED, "disk": _ASSUMED, "overlap": _OVERLAP}
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "num_nodes": 1,
        "devices_per_node": per_node,
        "device": device,
        "host": host,
        "intra_node": dict(intra),
        "inter_node": {"latency_s": 1e-4, "start_s": 1e-4, "bandwidth_bytes_per_s": 1.25e9},
        "device_to_host": dict(copy),
        "host_to_device": dict(copy),
        "disk": disk,
        "overlap": overlap,
        "sources": links | sources,
    }


_GLOO = {"latency_s": 4e-5, "start_s": 6e-5, "bandwidth_bytes_per_s": 2e9}


def _measure_all_reduce(data: dict[str, Any]) -> dict[str, Any]:
    """Fit start and rate of the whole job's all_reduce from a small and a large message; all ranks call it."""
    n = dist.get_world_size()
    if n == 1:
        return data["intra_node"]
    where = "cuda" if data["device"]["kind"] == "cuda" and dist.get_backend() == "nccl" else "cpu"
    tensors = [torch.zeros(elements, device=where) for elements in (256, 1 << 20)]
    return all_reduce_link(n, [t.nbytes for t in tensors], _fixed_runs(tensors, 40))


def all_reduce_link(n: int, num_bytes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Latency and rate of a ring of n devices from the seconds of a small and a large all_reduce.

    On a busy machine the small one may have taken as long as the large one, or longer. At least half of the large one's time counts as
    sending, so that the rate is at most twice what was seen.
    """
    sending = max(seconds[1] - seconds[0], seconds[1] / 2)
    start = min(seconds[0], seconds[1] / 2)
    rate = 2 * (n - 1) / n * (num_bytes[1] - num_bytes[0]) / sending
    return {"latency_s": start / (2 * (n - 1)) / 2, "start_s": start / 2, "bandwidth_bytes_per_s": max(rate, 1e6)}


def _fixed_runs(tensors: Sequence[torch.Tensor], runs: int) -> list[float]:
    """Typical seconds of a fixed number of all_reduces of each tensor (the number must not depend on a clock: ranks would disagree).

    The tensors take turns, so that what else the machine does meets all alike. Each all_reduce comes after a piece of computation, as in
    a step: in a tight loop both ranks are awake and in step, which flatters the link.
    """
    work = torch.ones(256, 256, device=tensors[0].device)
    seconds: list[list[float]] = [[] for _ in tensors]
    for _ in range(runs):
        for tensor, times in zip(tensors, seconds, strict=True):
            for _ in range(3):
                work = work @ work * 1e-3
            times.append(_timed(lambda tensor=tensor: dist.all_reduce(tensor), tensor.is_cuda))  # type: ignore[misc]
    # A low quantile: other work on the machine only ever adds, and so does waking a rank that sleeps.
    return [sorted(times)[runs // 8] for times in seconds]


def _timed(run: Callable[[], Any], is_cuda: bool) -> float:
    if is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
