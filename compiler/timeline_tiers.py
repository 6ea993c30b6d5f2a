"""Copies between tiers on the timeline: what they yield on paper, which stream they are in, and their seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cost_model.cluster import Cluster
from ..cost_model.simulate import COMPUTE
from ..cost_model.transfers import cpu_add_seconds, cpu_update_seconds, transfer_seconds
from ..runtime import tiers
from .overlap import CPU, STREAMS
from .place_nodes import DIRECTIONS


@dataclass(frozen=True, slots=True)
class InTier:
    """A tensor that is stored in a tier, as `tiers.Parked`."""

    tier: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cast: torch.dtype | None = None  # stored in this type, too

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape_numel * self.dtype.itemsize

    @property
    def shape_numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @classmethod
    def of(cls, x: torch.Tensor, tier: str, cast: torch.dtype | None = None) -> InTier:
        """What offloading a tensor yields."""
        return cls(tier, tuple(x.shape), x.dtype, x.device, cast)

    @property
    def narrow(self) -> InTier:
        """The same in the other type."""
        assert self.cast is not None, f"{self} is stored in one type"
        return replace(self, dtype=self.cast, cast=None)


# What each start yields: (what its wait gives, tensors on the device that must live until then).
STARTS: dict[Any, Callable[..., tuple[Any, list[torch.Tensor]]]] = {
    tiers.offload: lambda x, tier: (InTier.of(x, tier), [x]),
    tiers.write_back: lambda parked, x: (parked, [x]),
    tiers.write_back_cast: lambda parked, x: (parked.narrow, [x]),
    tiers.send_gradient: lambda parked, x: (parked.narrow, [x]),
    tiers.fetch: lambda parked: (torch.empty(parked.shape, dtype=parked.dtype, device=parked.device), []),
    tiers.fetch_cast: lambda parked: (torch.empty(parked.shape, dtype=parked.cast, device=parked.device), []),
    tiers.host_update: lambda params, grads, states, *_: ([*params, *(s for slots in states for s in slots)], []),
}
WAIT = "wait"  # the class of what waits
WAITS = (tiers.settle, tiers.arrive, tiers.updated)
# What is there at once: stored tensors, and who reads them waits for what is at work on them.
DEFERRED: dict[Any, Callable[..., Any]] = {
    tiers.defer_update: lambda params, grads, states, *_: [*params, *(s for slots in states for s in slots)],
    tiers.start_deferred: lambda params, states, fqns: [*params, *(s for slots in states for s in slots)],
}


def copied_bytes(target: Any, args: tuple[Any, ...]) -> int:
    """Bytes on the device that a copy out holds until it is waited for; args: the values it is called with."""
    written = (tiers.write_back, tiers.write_back_cast, tiers.send_gradient)
    held = args[0] if target is tiers.offload else args[1] if target in written else None
    return held.numel() * held.element_size() if isinstance(held, torch.Tensor) else 0


def price(target: Any, args: tuple[Any, ...], cluster: Cluster) -> tuple[str, float, str]:
    """(stream, seconds, class) of a start, or of what the CPU adds up; args: the values it is called with."""
    if target is tiers.defer_update:
        return COMPUTE, 0.0, WAIT
    if target is tiers.add_up:
        return CPU, cpu_add_seconds(args[0].shape_numel * args[1].itemsize, cluster), "host_update"
    if target in (tiers.host_update, tiers.start_deferred):
        return CPU, cpu_update_seconds(sum(p.shape_numel for p in args[0]), cluster), "host_update"
    if target in (tiers.fetch, tiers.fetch_cast):
        source = args[0] if target is tiers.fetch else args[0].narrow
        tier, way, num_bytes = source.tier, "in", source.num_bytes
    else:
        tier = args[1] if target is tiers.offload else args[0].tier
        way, num_bytes = "out", copied_bytes(target, args)
    return STREAMS[tier, way], transfer_seconds(DIRECTIONS[tier, way], num_bytes, cluster), target.__name__
