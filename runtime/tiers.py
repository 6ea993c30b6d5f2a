"""Tiers of memory behind the device: host memory and disk. The functions a local graph calls to move values there and back.

    offload(x, tier) -> Parking      the copy has started; x lives on the device until it is settled
    settle(parking) -> Parked        the copy is complete; x may be freed
    fetch(parked) -> Fetching        a copy into a new device tensor has started; any number of times
    arrive(fetching) -> tensor       that tensor, complete
    write_back(parked, x) -> Parking     overwrite what is stored; settle gives the Parked of the same place
    add_up(total, parked, dtype) -> Parked   the sum over micro-batches so far with one more (`micro_batches.accumulate` on the tier "host")
    host_update(params, grads, states, ...) -> Updating     the optimizer on the CPU, in place on tensors of the tier "host"
    updated(updating, settled) -> [Parked]   parameters, then states, as `update.fused_update` returns them; the gradients are settled then

A parameter that the device reads in a narrower type only is stored twice on the host: as it is, and in that type (`Parked.cast`).

    fetch_cast(parked) -> Fetching       the narrow one, for the device
    write_back_cast(parked, x) -> Parking    the same that was updated on the device, beside `write_back`
    send_gradient(parked, x) -> Parking  the gradient of that type into the memory of the narrow one, which is worthless from then on; an
                                         update makes it anew
    defer_update(params, grads, states, ...)     as host_update, but it runs in the next step, with the hyper-parameters of this one
    start_deferred(params, states, fqns) -> [Parked]     it starts; whatever reads what is stored waits for it

`settle`, `arrive` and `updated` run as they are; the others are names that an executor binds to the `TierStore` of its rank. A place in a
tier is given back when the last reference to its `Parked` dies. Every copy keeps shape, strides and bits; a tensor with gaps between its
elements is stored contiguous.

The content of a tier is scratch: it is worth nothing after the process. A checkpoint is a copy of its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .copies import ThreadCopies
from .cuda_copies import StreamCopies
from .disk import DiskFile, TierError
from .parked import TIERS, Fetching, Parked, Parking, Place, Updating
from .workers import Workers

if TYPE_CHECKING:
    from .update import Updater

__all__ = [
    "TIERS", "Fetching", "Parked", "Parking", "TierError", "TierOptions", "TierStore", "Traffic", "Updating",
    "add_up", "arrive", "defer_update", "fetch", "fetch_cast", "host_update", "offload", "send_gradient", "settle", "start_deferred",
    "updated", "write_back", "write_back_cast",
]  # fmt: skip


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


def add_up(total: Parked | None, parked: Parked, dtype: torch.dtype) -> Parked:
    """Start adding to the sum of the micro-batches so far, in place. total: None at the first one, whose memory becomes the sum's where it
    is of its dtype; in a graph it is not written, the text of the program puts it in."""
    raise _unbound("add_up")


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


def fetch_cast(parked: Parked) -> Any:
    """Start copying the narrow form of a stored tensor into a new device tensor."""
    raise _unbound("fetch_cast")


def write_back_cast(parked: Parked, x: torch.Tensor) -> Any:
    """Start overwriting the narrow form of a parameter with `x`, of that type; the wide one is written by itself."""
    raise _unbound("write_back_cast")


def send_gradient(parked: Parked, x: torch.Tensor) -> Any:
    """Start overwriting the narrow form of a parameter with its gradient `x`, of that type."""
    raise _unbound("send_gradient")


def defer_update(
    params: list[Parked],
    grads: list[Parked],
    states: list[list[Parked]],
    kind: str,
    group: int,
    fqns: list[str],
    loss: torch.Tensor | None = None,
) -> list[Parked]:
    """Keep an update for the next step's `start_deferred` of the same fqns. Returns what is stored: parameters, then states."""
    raise _unbound("defer_update")


def start_deferred(params: list[Parked], states: list[list[Parked]], fqns: list[str]) -> list[Parked]:
    """Start the update that the last step left, where there is one. Returns parameters, then states, which know that they are written."""
    raise _unbound("start_deferred")


def settle(parking: Parking) -> Parked:
    """The stored tensor, once it is complete; what was copied is let go. Raises TierError."""
    return parking.settle()


def arrive(fetching: Fetching) -> torch.Tensor:
    """The device tensor, once it is complete. Raises TierError."""
    return fetching.arrive()


def updated(updating: Updating, settled: Sequence[Parked] = ()) -> list[Parked]:
    """The stored parameters and states, flat, once they are updated. settled: the gradients. Raises what the update raised."""
    return updating.updated()


# ----------------------------------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions:
    """disk_path: folder of the disk tier; None: the system's folder for temporary files. num_io_threads: copies at a time; 0: each
    copy is complete when it has started."""

    disk_path: str | os.PathLike[str] | None = None
    num_io_threads: int = 2

    def __post_init__(self) -> None:
        if self.num_io_threads < 0:
            raise ValueError(f"num_io_threads is {self.num_io_threads}; it must be 0 (no threads) or more")


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
        self._offloaded_bytes = 0
        self._fetched_bytes = 0
        self._io = Workers(self.options.num_io_threads, "tier copies")
        self._updates = Workers(min(self.options.num_io_threads, 1), "host update")
        self._deferred: dict[tuple[str, ...], Callable[[], Updating]] = {}
        self._resumed: dict[tuple[str, ...], Updating] = {}
        self._disk: DiskFile | None = None
        self._by_device: dict[torch.device, ThreadCopies | StreamCopies] = {}

    def bindings(self, updater: Updater | None) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What an executor calls instead of the graph's functions. updater: may be None where nothing has data."""
        return {
            offload: self.offload,
            fetch: self.fetch,
            write_back: self.write_back,
            add_up: self.add_up,
            fetch_cast: self.fetch_cast,
            write_back_cast: self.write_back_cast,
            send_gradient: self.send_gradient,
            host_update: functools.partial(self.host_update, updater),
            defer_update: functools.partial(self.defer_update, updater),
            start_deferred: self.start_deferred,
        }

    @property
    def copied(self) -> tuple[int, int]:
        """Bytes whose copy into the tiers and out of them was started so far."""
        return (self._offloaded_bytes, self._fetched_bytes)

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
        return self._write(self.reserve(x, tier, device or x.device), x)

    def write_back(self, parked: Parked, x: torch.Tensor) -> Parking:
        """See the function of this name. Raises ValueError where `x` does not fit."""
        if x.shape != parked.shape or x.dtype != parked.dtype:
            raise ValueError(f"{parked} is overwritten with {x.dtype} of shape {tuple(x.shape)}; both must be alike")
        if x.stride() != parked.stride and x.numel() > 1:
            x = parked.empty(x.device).copy_(x)
        return self._write(parked, x)

    def fetch(self, parked: Parked, device: torch.device | None = None) -> Fetching:
        """See the function of this name. device: where to; where it belongs unless given."""
        into, place = parked.empty(device), parked.place
        if into.device.type == "meta":
            return Fetching(into, None)
        copy = self._copies(into.device).read(place, into, [place.writing] if place.writing is not None else [])
        place.read_by(copy)
        self._fetched_bytes += parked.num_bytes
        return Fetching(into, copy)

    def fetch_cast(self, parked: Parked) -> Fetching:
        """See the function of this name."""
        return self.fetch(_cast_of(parked))

    def write_back_cast(self, parked: Parked, x: torch.Tensor) -> Parking:
        """See the function of this name."""
        return self.write_back(_cast_of(parked), x)

    def send_gradient(self, parked: Parked, x: torch.Tensor) -> Parking:
        """See the function of this name."""
        return self.write_back(_cast_of(parked), x)

    def reserve(self, like: torch.Tensor, tier: str, device: torch.device) -> Parked:
        """A place for a tensor like this one; its content comes later. Raises TierError without room, ValueError on another tier."""
        if tier not in TIERS:
            raise ValueError(f"there is no tier {tier!r} beside the device; there are {TIERS}")
        num_bytes = like.numel() * like.element_size()
        if device.type == "meta":
            return Parked(like, tier, Place(num_bytes), device)
        place = self._copies(device).host_place(like, num_bytes) if tier == "host" else self.disk.place(num_bytes)
        return Parked(like, tier, place, device)

    def _write(self, parked: Parked, x: torch.Tensor) -> Parking:
        if parked.device.type == "meta":
            return Parking(parked, None, (x,))
        copy = self._copies(x.device).write(parked.place, x, parked.place.copies)
        parked.place.written_by(copy)
        self._offloaded_bytes += parked.num_bytes
        return Parking(parked, copy, (x,))

    def _copies(self, device: torch.device) -> ThreadCopies | StreamCopies:
        if device not in self._by_device:
            self._by_device[device] = StreamCopies(device, self._io) if device.type == "cuda" else ThreadCopies(self._io)
        return self._by_device[device]

    # -- updates ------------------------------------------------------------------------------------------------------

    def add_up(self, total: Parked | None, parked: Parked, dtype: torch.dtype) -> Parked:
        """See the function of this name."""
        if total is None and parked.dtype == dtype:
            return parked
        is_first = total is None
        if total is None:
            like = torch.empty_strided(parked.shape, parked.stride, dtype=dtype, device="meta")
            total = self.reserve(like, "host", parked.device)
        if total.device.type == "meta":
            return total
        into, place = total.place, parked.place
        before = [copy for copy in (into.writing, place.writing) if copy is not None]

        def run() -> None:
            for copy in before:
                copy.wait()  # raises where what is summed has not arrived
            if is_first:
                into.tensor.copy_(place.tensor)
            else:
                into.tensor.add_(place.tensor)

        work = self._updates.submit(run, [*into.copies, *place.copies])
        into.written_by(work)
        place.read_by(work)
        return total

    def host_update(
        self,
        updater: Updater | None,
        params: list[Parked],
        grads: Sequence[Parking | Parked],
        states: list[list[Parked]],
        kind: str,
        group: int,
        fqns: list[str],
        loss: torch.Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Updating:
        """See the function of this name. options: hyper-parameters, where not those of the time when it runs. Raises ValueError where
        something is not on the host."""
        sources = [grad.parked if isinstance(grad, Parking) else grad for grad in grads]
        results = params + [state for slots in states for state in slots]
        for parked in (*results, *sources):
            if parked.tier != "host":
                raise ValueError(f"{parked} cannot be updated on the CPU where it is; parameters, gradients and states must be on the host")
        if params and params[0].device.type == "meta":
            return Updating(results, None, grads)
        loss_ready = torch.cuda.current_stream(loss.device).record_event() if loss is not None and loss.is_cuda else None

        arriving = [grad.copy if isinstance(grad, Parking) else grad.place.writing for grad in grads]

        def run() -> None:
            for copy in arriving:
                if copy is not None:
                    copy.wait()  # raises where the gradient has not arrived
            if loss_ready is not None:
                loss_ready.synchronize()
            assert updater is not None, "an update of data has an updater"
            with torch.no_grad():
                new = updater.fused_update(
                    [p.place.tensor for p in params], [g.place.tensor for g in sources],
                    [[s.place.tensor for s in slots] for slots in states], kind, group, fqns, loss, options,
                )  # fmt: skip
                for parked, value in zip(results, new, strict=True):
                    if value.data_ptr() != parked.place.tensor.data_ptr():
                        parked.place.tensor.copy_(value)
                    if parked.cast is not None:
                        parked.cast.place.tensor.copy_(value)

        written = [*results, *(parked.cast for parked in results if parked.cast is not None)]
        work = self._updates.submit(run, [copy for parked in (*written, *sources) for copy in parked.place.copies])
        for parked in written:
            parked.place.written_by(work)
        return Updating(results, work, grads)

    def defer_update(
        self,
        updater: Updater | None,
        params: list[Parked],
        grads: list[Parked],
        states: list[list[Parked]],
        kind: str,
        group: int,
        fqns: list[str],
        loss: torch.Tensor | None = None,
    ) -> list[Parked]:
        """See the function of this name."""
        if updater is not None:
            key, options = tuple(fqns), updater.options_now(group)
            if key in self._resumed:
                self._resumed.pop(key).updated()  # long done: what was stored has been read since
            self._deferred[key] = lambda: self.host_update(updater, params, grads, states, kind, group, fqns, loss, options)
        return params + [state for slots in states for state in slots]

    def start_deferred(self, params: list[Parked], states: list[list[Parked]], fqns: list[str]) -> list[Parked]:
        """See the function of this name."""
        key = tuple(fqns)
        if key in self._deferred:
            self._resumed[key] = self._deferred.pop(key)()
        return params + [state for slots in states for state in slots]

    def finish_updates(self) -> None:
        """Do what was deferred: what is stored, and the count of updates, are then those of the last step. Raises what an update raised."""
        for key in list(self._deferred):
            self._resumed[key] = self._deferred.pop(key)()
        while self._resumed:
            self._resumed.popitem()[1].updated()

    # -- outside of a program, at once -----------------------------------------------------------------------------------

    def park(self, x: torch.Tensor, tier: str, device: torch.device | None = None, cast: torch.dtype | None = None) -> Parked:
        """`x` stored in a tier. device: where it is fetched to. cast: the narrower type in which it is stored too."""
        parked = settle(self.offload(x.detach(), tier, device))
        if cast is not None:
            parked.cast = settle(self.offload(x.detach().to(cast), tier, device))
        return parked

    def load(self, parked: Parked, device: torch.device | None = None) -> torch.Tensor:
        """A copy of what is stored."""
        self.finish_updates()
        return arrive(self.fetch(parked, device))

    def overwrite(self, parked: Parked, x: torch.Tensor) -> None:
        """Replace what is stored."""
        self.finish_updates()
        settle(self.write_back(parked, x.detach()))
        if parked.cast is not None:
            settle(self.write_back(parked.cast, x.detach().to(parked.cast.dtype)))


def _cast_of(parked: Parked) -> Parked:
    assert parked.cast is not None, f"{parked} is stored in one type"
    return parked.cast


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dims."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
