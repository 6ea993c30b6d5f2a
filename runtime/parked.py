"""Tensors in tiers behind the device, and on their way there and back: what the functions of `tiers` yield."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

# From near to far. These are also names of memory pools.
TIERS = ("host", "disk")


class Copy(Protocol):
    """A copy on its way, by a thread (`workers.Work`) or by a stream of the device (`cuda_copies.StreamCopy`)."""

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""

    def wait(self) -> None:
        """Return when it has ended. Raises what went wrong."""

    def finish(self) -> None:
        """Return when it has ended, well or not."""

    def join(self) -> None:
        """From here on the device's program sees it done. Raises what went wrong, where that is known by then."""

    def abandon(self) -> None:
        """Nobody will join it, and the memory on the device is free from here on."""


class Place:
    """Where a tensor's bytes are in a tier, and the copies that are at work there: the last one in, and those out since then."""

    __slots__ = ("__weakref__", "num_bytes", "reading", "writing")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.writing: Copy | None = None
        self.reading: list[Copy] = []

    @property
    def copies(self) -> list[Copy]:
        """All that are at work: what overwriting must wait for."""
        found = self.reading if self.writing is None else [self.writing, *self.reading]
        return [copy for copy in found if not copy.is_done]

    def read_by(self, copy: Copy) -> None:
        """A copy out has started."""
        self.reading = [*(other for other in self.reading if not other.is_done), copy]

    def written_by(self, copy: Copy) -> None:
        """A copy in has started, behind all others."""
        self.writing, self.reading = copy, []


class HostPlace(Place):
    """A tensor in host memory. give_back: called with the place when it dies."""

    __slots__ = ("give_back", "tensor")

    def __init__(self, tensor: torch.Tensor, num_bytes: int, give_back: Callable[[HostPlace], None] | None = None) -> None:
        super().__init__(num_bytes)
        self.tensor = tensor
        self.give_back = give_back

    def __del__(self) -> None:
        if self.give_back is not None:
            self.give_back(self)


class Parked:
    """A tensor stored in a tier: its layout, the device it belongs to, and its place.

    cast: the same in a narrower type, where that is what the device fetches (see `tiers.fetch_cast`).
    """

    __slots__ = ("cast", "device", "dtype", "place", "shape", "stride", "tier")

    def __init__(self, like: torch.Tensor, tier: str, place: Any, device: torch.device) -> None:
        self.shape = like.shape
        self.stride = like.stride()
        self.dtype = like.dtype
        self.device = device
        self.tier = tier
        self.place = place
        self.cast: Parked | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, and of its pool that it takes; without `cast`."""
        return self.place.num_bytes

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def empty(self, device: torch.device | None = None) -> torch.Tensor:
        """New memory with the tensor's layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device or self.device)

    def __repr__(self) -> str:
        return f"Parked({self.dtype}, {tuple(self.shape)}, {self.tier})"


class Parking:
    """A tensor on its way into a tier. held: what must live on the device until then. parked: what it will be, not complete yet."""

    __slots__ = ("copy", "held", "parked")

    def __init__(self, parked: Parked, copy: Copy | None, held: Sequence[torch.Tensor]) -> None:
        self.parked = parked
        self.copy = copy
        self.held = tuple(held)

    def settle(self) -> Parked:
        """See `tiers.settle`."""
        try:
            if self.copy is not None:
                self.copy.join()
        finally:
            self.held = ()
        return self.parked

    def __del__(self) -> None:
        if self.copy is not None:
            self.copy.abandon()


class Fetching:
    """A tensor on its way to the device. held: its memory there."""

    __slots__ = ("copy", "held")

    def __init__(self, tensor: torch.Tensor, copy: Copy | None) -> None:
        self.copy = copy
        self.held = (tensor,)

    def arrive(self) -> torch.Tensor:
        """See `tiers.arrive`."""
        if self.copy is not None:
            self.copy.join()
        return self.held[0]

    def __del__(self) -> None:
        if self.copy is not None:
            self.copy.abandon()


class Updating:
    """An update on its way. results: what it will yield. grads: the gradients, alive until then."""

    __slots__ = ("copy", "grads", "results")

    def __init__(self, results: list[Parked], copy: Copy | None, grads: Sequence[Parking | Parked]) -> None:
        self.results = results
        self.copy = copy
        self.grads = list(grads)

    def updated(self) -> list[Parked]:
        """See `tiers.updated`."""
        try:
            if self.copy is not None:
                self.copy.wait()
        finally:
            self.grads = []
        return self.results
