"""Tiers of memory behind the device: host memory and disk. The functions a local graph calls to move values there and back.

    offload(x, tier) -> Parking      the copy has started; x lives on the device until it is settled
    settle(parking) -> Parked        the copy is complete; x may be freed
    fetch(parked) -> Fetching        a copy into a new device tensor has started; any number of times
    arrive(fetching) -> tensor       that tensor, complete
    write_back(parked, x) -> Parking     overwrite what is stored; settle gives the Parked of the same place
    host_update(params, grads, states, ...) -> Updating     the optimizer on the CPU, in place on tensors of the tier "host"
    updated(updating) -> [Parked]    parameters, then states, as `update.fused_update` returns them

`settle`, `arrive` and `updated` run as they are; the others are names that an executor binds to the `TierStore` of its rank. A place in a
tier is given back when the last reference to its `Parked` dies. Every copy keeps shape, strides and bits; a tensor with gaps between its
elements is stored contiguous.

The content of a tier is scratch: it is worth nothing after the process. A checkpoint is a copy of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .disk import DiskFile, DiskPlace, TierError
from .workers import Work, Workers

if TYPE_CHECKING:
    from .update import Updater

__all__ = ["TIERS", "Fetching", "Parked", "Parking", "TierError", "TierOptions", "TierStore", "Traffic", "Updating"]

# Beside the device, from near to far. These are also names of memory pools.
TIERS = ("host", "disk")


# ---------------------------------------------------------------------------------------------------------------- names in graphs


def _unbound(name: str) -> RuntimeError:
    return RuntimeError(
        f"tiers.{name} was called outside an executor, so it has no store. Run the program with runtime.execute.Executor or "
        "runtime.lockstep.LockstepExecutor."
    )


def offload(x: torch.Tensor, tier: str) -> Any:
    """Start copying `x` to the tier "host" or "disk"."""
    raise _unbound("offload")


def fetch(parked: Parked) -> Any:
    """Start copying a stored tensor into a new device tensor."""
    raise _unbound("fetch")


def write_back(parked: Parked, x: torch.Tensor) -> Any:
    """Start overwriting a stored tensor with `x`, of its shape and dtype."""
    raise _unbound("write_back")


def host_update(
    params: list[Parked],
    grads: list[Parking],
    states: list[list[Parked]],
    kind: str,
    group: int,
    fqns: list[str],
    loss: torch.Tensor | None = None,
) -> Any:
    """Start `update.fused_update` on the CPU, in place, once the gradients have arrived on the host (they may be settled already)."""
    raise _unbound("host_update")


def settle(parking: Parking) -> Parked:
    """The stored tensor, once it is complete; what was copied is let go. Raises TierError."""
    return parking.settle()


def arrive(fetching: Fetching) -> torch.Tensor:
    """The device tensor, once it is complete. Raises TierError."""
    return fetching.arrive()


def updated(updating: Updating) -> list[Parked]:
    """The stored parameters and states, flat, once they are updated. Raises what the update raised."""
    return updating.updated()


# ------------------------------------------------------------------------------------------------------------------ what they yield


class Place(Protocol):
    """Where a tensor's bytes are in a tier."""

    num_bytes: int


@dataclass(slots=True, eq=False)
class HostPlace:
    """A tensor in host memory."""

    num_bytes: int
    tensor: torch.Tensor


@dataclass(slots=True, eq=False)
class NoPlace:
    """A place without content: of a tensor on the device "meta"."""

    num_bytes: int


@dataclass(slots=True, eq=False)
class _Use:
    """Who is at work on a place now."""

    writing: Work | None = None
    reading: list[Work] | None = None


class Parked:
    """A tensor stored in a tier: its layout, where it came from, and its place."""

    __slots__ = ("device", "dtype", "place", "shape", "stride", "tier", "use")

    def __init__(self, like: torch.Tensor, tier: str, place: Any, device: torch.device) -> None:
        self.shape = like.shape
        self.stride = like.stride()
        self.dtype = like.dtype
        self.device = device
        self.tier = tier
        self.place = place
        self.use = _Use()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, and of its pool that it takes."""
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
    """A tensor on its way into a tier. held: what must live on the device until then."""

    __slots__ = ("_parked", "_work", "held")

    def __init__(self, parked: Parked, work: Work | None, held: Sequence[torch.Tensor]) -> None:
        self._parked = parked
        self._work = work
        self.held = tuple(held)

    @property
    def parked(self) -> Parked:
        """What it will be; incomplete before `settle`."""
        return self._parked

    @property
    def works(self) -> tuple[Work, ...]:
        """What to wait for."""
        return () if self._work is None else (self._work,)

    def settle(self) -> Parked:
        """See the function of this name."""
        self.held = ()
        if self._work is not None:
            self._work.wait()
        return self._parked


class Fetching:
    """A tensor on its way to the device. held: its memory there."""

    __slots__ = ("_work", "held")

    def __init__(self, tensor: torch.Tensor, work: Work | None) -> None:
        self._work = work
        self.held = (tensor,)

    def arrive(self) -> torch.Tensor:
        """See the function of this name."""
        if self._work is not None:
            self._work.wait()
        return self.held[0]


class Updating:
    """An update on its way. results: what it yields. grads: the gradients, alive until then."""

    __slots__ = ("_results", "_work", "grads")

    def __init__(self, results: list[Parked], work: Work | None, grads: list[Any]) -> None:
        self._results = results
        self._work = work
        self.grads = grads

    @property
    def parts(self) -> list[Any]:
        """Everything it keeps alive."""
        return [*self._results, *self.grads]

    def updated(self) -> list[Parked]:
        """See the function of this name."""
        self.grads = []
        if self._work is not None:
            self._work.wait()
        return self._results


# ----------------------------------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions:
    """disk_path: folder of the disk tier; None: the system's folder for temporary files. num_io_threads: copies at a time; 0: each
    copy is complete when it has started."""

    disk_path: str | os.PathLike[str] | None = None
    num_io_threads: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes really copied between the device and the tiers: in the last step, and in all steps so far."""

    offloaded_bytes: int = 0
    fetched_bytes: int = 0
    total_offloaded_bytes: int = 0
    total_fetched_bytes: int = 0

    def then(self, before: tuple[int, int], after: tuple[int, int]) -> Traffic:
        """With one more step. before, after: the store's `copied` around it."""
        offloaded_bytes, fetched_bytes = after[0] - before[0], after[1] - before[1]
        return Traffic(
            offloaded_bytes=offloaded_bytes,
            fetched_bytes=fetched_bytes,
            total_offloaded_bytes=self.total_offloaded_bytes + offloaded_bytes,
            total_fetched_bytes=self.total_fetched_bytes + fetched_bytes,
        )


class TierStore:
    """The tiers of one rank. Methods are the graph functions of the same name.

    Nothing is made before it is needed: no thread, no file. `close` ends the threads and frees the disk; so does the last reference.
    """

    def __init__(self, options: TierOptions | None = None) -> None:
        self.options = options or TierOptions()
        self._copied = [0, 0]
        self._io = Workers(self.options.num_io_threads, "tier copies")
        self._updates = Workers(min(self.options.num_io_threads, 1), "host update")
        self._disk: DiskFile | None = None
        self._counting = threading.Lock()

    def bindings(self, updater: Updater | None) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What an executor calls instead of the graph's functions. updater: may be None where nothing has data."""
        return {
            offload: self.offload,
            fetch: self.fetch,
            write_back: self.write_back,
            host_update: functools.partial(self.host_update, updater),
        }

    @property
    def copied(self) -> tuple[int, int]:
        """Bytes copied into the tiers and out of them so far."""
        with self._counting:
            return (self._copied[0], self._copied[1])

    @property
    def disk(self) -> DiskFile:
        """The file of the disk tier, made now if need be. Raises TierError."""
        if self._disk is None:
            self._disk = DiskFile(self.options.disk_path)
        return self._disk

    def close(self) -> None:
        """Finish all copies, end the threads, free the disk. What is parked is lost."""
        self._io.close()
        self._updates.close()
        if self._disk is not None:
            self._disk.close()

    # -- copies -------------------------------------------------------------------------------------------------------

    def offload(self, x: torch.Tensor, tier: str, device: torch.device | None = None) -> Parking:
        """See the function of this name. device: where it is fetched to; where it is now unless given."""
        x = x if _is_dense(x) else x.contiguous()
        parked = self.reserve(x, tier, device or x.device)
        return self._write(parked, x)

    def write_back(self, parked: Parked, x: torch.Tensor) -> Parking:
        """See the function of this name. Raises ValueError where `x` does not fit."""
        if x.shape != parked.shape or x.dtype != parked.dtype:
            raise ValueError(f"{parked} is overwritten with {x.dtype} of shape {tuple(x.shape)}; both must be alike")
        if x.stride() != parked.stride and x.numel() > 1:
            x = parked.empty(x.device).copy_(x)
        return self._write(parked, x)

    def fetch(self, parked: Parked, device: torch.device | None = None) -> Fetching:
        """See the function of this name. device: where to; where it came from unless given."""
        into = parked.empty(device)
        if into.device.type == "meta":
            return Fetching(into, None)
        use = parked.use
        work = self._io.submit(functools.partial(self._read_now, parked, into), [use.writing] if use.writing else [])
        use.reading = [other for other in use.reading or () if not other.is_done] + [work]
        return Fetching(into, work)

    def reserve(self, like: torch.Tensor, tier: str, device: torch.device) -> Parked:
        """A place for a tensor like this one; its content comes later. Raises TierError without room, ValueError on another tier."""
        if tier not in TIERS:
            raise ValueError(f"there is no tier {tier!r} beside the device; there are {TIERS}")
        num_bytes = like.numel() * like.element_size()
        place: Place
        if device.type == "meta":
            place = NoPlace(num_bytes)
        elif tier == "host":
            place = HostPlace(num_bytes, torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu"))
        else:
            place = self.disk.place(num_bytes)
        return Parked(like, tier, place, device)

    def _write(self, parked: Parked, x: torch.Tensor) -> Parking:
        if parked.device.type == "meta":
            return Parking(parked, None, (x,))
        use = parked.use
        before = [work for work in (use.writing, *(use.reading or ())) if work is not None]
        use.writing = self._io.submit(functools.partial(self._write_now, parked, x), before)
        use.reading = None
        return Parking(parked, use.writing, (x,))

    def _write_now(self, parked: Parked, x: torch.Tensor) -> None:
        with torch.no_grad():
            if isinstance(parked.place, DiskPlace):
                parked.place.file.write(parked.place, memory_of(x))
            else:
                parked.place.tensor.copy_(x)
        with self._counting:
            self._copied[0] += parked.num_bytes

    def _read_now(self, parked: Parked, into: torch.Tensor) -> None:
        with torch.no_grad():
            if isinstance(parked.place, DiskPlace):
                parked.place.file.read(parked.place, memory_of(into))
            else:
                into.copy_(parked.place.tensor)
        with self._counting:
            self._copied[1] += parked.num_bytes

    # -- updates ------------------------------------------------------------------------------------------------------

    def host_update(
        self,
        updater: Updater | None,
        params: list[Parked],
        grads: list[Parking | Parked],
        states: list[list[Parked]],
        kind: str,
        group: int,
        fqns: list[str],
        loss: torch.Tensor | None = None,
    ) -> Updating:
        """See the function of this name. Raises ValueError where something is not on the host."""
        sources = [grad.parked if isinstance(grad, Parking) else grad for grad in grads]
        results = params + [state for slots in states for state in slots]
        for parked in (*results, *sources):
            if parked.tier != "host":
                raise ValueError(f"{parked} cannot be updated on the CPU where it is; parameters, gradients and states must be on the host")
        if params and params[0].device.type == "meta":
            return Updating(results, None, list(grads))

        def run() -> None:
            for grad in grads:
                for work in grad.works if isinstance(grad, Parking) else ():
                    work.wait()  # raises where the gradient has not arrived
            assert updater is not None, "an update of data has an updater"
            with torch.no_grad():
                new = updater.fused_update(
                    [p.place.tensor for p in params], [g.place.tensor for g in sources],
                    [[s.place.tensor for s in slots] for slots in states], kind, group, fqns, loss,
                )  # fmt: skip
                for parked, value in zip(results, new, strict=True):
                    if value.data_ptr() != parked.place.tensor.data_ptr():
                        parked.place.tensor.copy_(value)

        work = self._updates.submit(run, [work for parked in (*results, *sources) for work in _uses(parked)])
        for parked in results:
            parked.use.writing, parked.use.reading = work, None
        return Updating(results, work, list(grads))

    # -- outside of a program, at once -----------------------------------------------------------------------------------

    def park(self, x: torch.Tensor, tier: str, device: torch.device | None = None) -> Parked:
        """`x` stored in a tier. device: where it is fetched to."""
        return settle(self.offload(x.detach(), tier, device))

    def load(self, parked: Parked, device: torch.device | None = None) -> torch.Tensor:
        """A copy of what is stored."""
        return arrive(self.fetch(parked, device))

    def overwrite(self, parked: Parked, x: torch.Tensor) -> None:
        """Replace what is stored."""
        settle(self.write_back(parked, x.detach()))


def _uses(parked: Parked) -> list[Work]:
    use = parked.use
    return [work for work in (use.writing, *(use.reading or ())) if work is not None]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dims."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense CPU tensor, in the order of its memory. Keeps the tensor alive."""
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return memoryview(b"")
    array = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
