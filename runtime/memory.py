"""Bytes of live values, exactly, in each pool (device, host, disk): what was alive at the worst moment, and which instruction made it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..torch_compat import storage_identity
from .collectives import Pending
from .parked import TIERS, Fetching, Parked, Parking, Updating

POOLS = ("device", *TIERS)
Owners = tuple[tuple[str, int], ...]  # (who made it, bytes), largest first
Limits = int | Mapping[str, int] | None


class MemoryLimitError(MemoryError):
    """The step needs more memory than it may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The device: peak_bytes: most bytes at once. stored_bytes: parameters, buffers and state in it. at: the instruction where. owners:
    what was alive then. Every pool: pools: most bytes at once. pool_owners: what was alive then. pool_at: the instruction where."""

    peak_bytes: int
    stored_bytes: int
    at: str
    owners: Owners
    pools: dict[str, int] = field(default_factory=dict)
    pool_owners: dict[str, Owners] = field(default_factory=dict)
    pool_at: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Block:
    """One storage or place: num_slots values refer to it; alive from event `born` up to and without event `died`."""

    pool: str
    num_bytes: int
    owner: int
    born: int
    num_slots: int = 0
    died: int = 1 << 62


@dataclass(slots=True)
class _Pool:
    """Bytes in use. peak_at: event and slot of the peak. peak_workspace_bytes: what the op there took for itself."""

    limit_bytes: int | None
    current_bytes: int = 0
    stored_bytes: int = 0
    peak_bytes: int = 0
    peak_at: tuple[int, int] = (0, 0)
    peak_workspace_bytes: int = 0


class MemoryAccount:
    """Counts distinct storages, and places in tiers, as instructions report them.

    names: slot → name, for people. stored: slots that are never freed. limit_bytes: more raise MemoryLimitError; of the device, or by pool.
    """

    def __init__(self, names: Sequence[str], stored: Iterable[int], limit_bytes: Limits = None) -> None:
        limits = pool_limits(limit_bytes)
        self.names = names
        self.stored = set(stored)
        self.live: dict[tuple[str, int], _Block] = {}
        self.of_slot: dict[int, set[tuple[str, int]]] = {}
        self.blocks: list[_Block] = []
        self.now = 0
        self.pools = {name: _Pool(limits.get(name)) for name in POOLS}

    def track(self, slot: int, value: Any, workspace_bytes: int = 0) -> None:
        """An instruction has made `value`, with so much memory on the device for itself, or a value has let go of something. Raises
        MemoryLimitError."""
        self.now += 1
        before = self.of_slot.get(slot, ())
        keys = self.of_slot[slot] = set()
        for pool, identity, num_bytes in _parts(value):
            key = (pool, identity)
            if not num_bytes or key in keys:
                continue
            keys.add(key)
            block = self.live.get(key)
            if block is None:
                block = self.live[key] = self._born(pool, num_bytes, slot)
            block.num_slots += 1
        self._release(before)
        for name, count in self.pools.items():
            used = count.current_bytes + (workspace_bytes if name == "device" else 0)
            if used > count.peak_bytes:
                count.peak_bytes = used
                count.peak_at = (self.now, slot)
                count.peak_workspace_bytes = used - count.current_bytes
                if count.limit_bytes is not None and count.peak_bytes > count.limit_bytes:
                    raise MemoryLimitError(self._over(name))

    def drop(self, slots: Iterable[int]) -> None:
        """The values of these slots are gone."""
        for slot in slots:
            if slot not in self.stored:
                self._release(self.of_slot.pop(slot, ()))

    def report(self) -> MemoryReport:
        """What was the worst moment of each pool."""
        owners = {name: self._owners(name) for name in POOLS}
        at = {name: self.names[pool.peak_at[1]] if pool.peak_bytes else "" for name, pool in self.pools.items()}
        device = self.pools["device"]
        return MemoryReport(
            peak_bytes=device.peak_bytes,
            stored_bytes=device.stored_bytes,
            at=at["device"],
            owners=owners["device"],
            pools={name: pool.peak_bytes for name, pool in self.pools.items()},
            pool_owners=owners,
            pool_at=at,
        )

    def _born(self, pool: str, num_bytes: int, slot: int) -> _Block:
        block = _Block(pool, num_bytes, slot, self.now)
        self.blocks.append(block)
        self.pools[pool].current_bytes += num_bytes
        self.pools[pool].stored_bytes += num_bytes if slot in self.stored else 0
        return block

    def _release(self, keys: Iterable[tuple[str, int]]) -> None:
        for key in keys:
            block = self.live[key]
            block.num_slots -= 1
            if block.num_slots == 0:
                block.died = self.now + 1
                self.pools[block.pool].current_bytes -= block.num_bytes
                del self.live[key]

    def _owners(self, pool: str) -> Owners:
        (event, slot), workspace = self.pools[pool].peak_at, self.pools[pool].peak_workspace_bytes
        alive = [(self.names[b.owner], b.num_bytes) for b in self.blocks if b.pool == pool and b.born <= event < b.died]
        alive += [(f"{self.names[slot]}'s workspace", workspace)] if workspace else []
        return tuple(sorted(alive, key=lambda pair: (-pair[1], pair[0])))

    def _over(self, name: str) -> str:
        pool = self.pools[name]
        largest = ", ".join(f"{owner} {num_bytes}" for owner, num_bytes in self._owners(name)[:5])
        return (
            f"the step needs at least {pool.peak_bytes} bytes on the {name} at {self.names[pool.peak_at[1]]}, {pool.limit_bytes} are "
            f"allowed; parameters, buffers and optimizer state are {pool.stored_bytes} of them. Largest: {largest}. Plan again with this "
            "limit, use more devices or a smaller batch, or raise the limit."
        )


def pool_limits(limit_bytes: Limits) -> dict[str, int]:
    """Limits by pool; a plain number is the device's. Raises ValueError on an unknown pool."""
    if limit_bytes is None:
        return {}
    limits = dict(limit_bytes) if isinstance(limit_bytes, Mapping) else {"device": limit_bytes}
    unknown = sorted(limits.keys() - set(POOLS))
    if unknown:
        raise ValueError(f"there is no memory pool {unknown[0]!r}; limits can be given for {POOLS}")
    return limits


def _parts(value: Any) -> Iterator[tuple[str, int, int]]:
    """(pool, identity, bytes) of everything a value keeps alive."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield "device", storage_identity(storage), storage.nbytes()  # not its address: tensors without data have none
    elif isinstance(value, Parked):
        yield value.tier, id(value.place), value.num_bytes
        if value.cast is not None:
            yield from _parts(value.cast)
    elif isinstance(value, (Pending, Fetching)):
        yield from _each(value.held)
    elif isinstance(value, Parking):
        yield from _each((*value.held, value.parked))
    elif isinstance(value, Updating):
        # What a gradient on its way holds on the device is its own.
        yield from _each((*value.results, *(grad.parked if isinstance(grad, Parking) else grad for grad in value.grads)))
    elif isinstance(value, (list, tuple)):
        yield from _each(value)


def _each(values: Iterable[Any]) -> Iterator[tuple[str, int, int]]:
    for value in values:
        yield from _parts(value)
