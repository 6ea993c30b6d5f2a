"""What calibration has measured so far, equal on all ranks of the job and kept on disk, and where it was measured."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .cluster import Cluster


def machine() -> dict[str, Any]:
    """What measured times belong to: processor, cores, GPUs."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "gpus": names}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Software that the times depend on."""
    return {"torch": torch.__version__, "python": platform.python_version()}


def elsewhere(cluster: Cluster) -> str:
    """Why a calibrated cluster's prices may not hold on this machine, or ""."""
    if not cluster.calibration:
        return ""
    theirs, here = cluster.calibration.get("machine"), machine()
    if theirs != here:
        return f"cluster {cluster.name!r} was measured on another machine ({theirs}); this one is {here}"
    if cluster.calibration.get("versions", {}).get("torch") != versions()["torch"]:
        used = cluster.calibration.get("versions", {}).get("torch")
        return f"cluster {cluster.name!r} was measured with torch {used}, here is {versions()['torch']}"
    return ""


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def from_rank_0(value: Any) -> Any:
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(value: float | None) -> float | None:
    """Mean over the ranks; None where a rank has none."""
    (total,) = _over_ranks([math.nan if value is None else value], dist.ReduceOp.SUM)
    return None if math.isnan(total) else total / world()


def slowest(values: list[float]) -> list[float]:
    """Of each value the largest of all ranks'."""
    return _over_ranks(values, dist.ReduceOp.MAX)


def _over_ranks(values: list[float], op: Any) -> list[float]:
    """One all_reduce: collectives of Python objects take ten times as long, and thousands of samples are exchanged."""
    if world() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, op)
    return found.tolist()


class Journal:
    """Finished samples by name, kept on disk by rank 0 and equal on all ranks. A journal of another machine or setting starts anew."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self.path = path
        self.key = json.loads(json.dumps(key))
        self.samples: dict[str, Any] = from_rank_0(self._read() if rank() == 0 else {})
        self._unsaved = 0

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.is_file():
            return {}
        with contextlib.suppress(OSError, ValueError):
            data = json.loads(self.path.read_text())
            if data.get("key") == self.key:
                return data["samples"]
        return {}

    def take(self, name: str, run: Callable[[], Any]) -> Any:
        """The sample of this name, measured now where it is not there yet."""
        if name not in self.samples:
            self.samples[name] = run()
            self._unsaved += 1
            if self._unsaved >= 100:
                self.save()
        return self.samples[name]

    def save(self) -> None:
        self._unsaved = 0
        if self.path is None or rank() != 0:
            return
        part = self.path.with_name(self.path.name + ".new")
        part.write_text(json.dumps({"key": self.key, "samples": self.samples}))
        os.replace(part, self.path)

    def remove(self) -> None:
        if self.path is not None and rank() == 0:
            self.path.unlink(missing_ok=True)
