"""Bytes of live tensors, exactly: what was alive at the worst moment, and which instruction made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_compat import storage_identity
from .collectives import Pending


class MemoryLimitError(MemoryError):
    """The step needs more memory than it may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """peak_bytes: most bytes at once. stored_bytes: parameters, buffers and state in it. at: the instruction where. owners: (who made
    it, bytes) of what was alive then, largest first."""

    peak_bytes: int
    stored_bytes: int
    at: str
    owners: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class _Block:
    """One storage: num_slots values refer to it; alive from event `born` up to and without event `died`."""

    num_bytes: int
    owner: int
    born: int
    num_slots: int = 0
    died: int = 1 << 62


class MemoryAccount:
    """Counts distinct storages as instructions report them.

    names: slot → name, for people. stored: slots that are never freed. limit_bytes: more raises MemoryLimitError.
    """

    def __init__(self, names: Sequence[str], stored: Iterable[int], limit_bytes: int | None = None) -> None:
        self.names = names
        self.stored = set(stored)
        self.limit_bytes = limit_bytes
        self.live: dict[int, _Block] = {}
        self.of_slot: dict[int, list[int]] = {}
        self.blocks: list[_Block] = []
        self.now = 0
        self.current_bytes = 0
        self.stored_bytes = 0
        self.peak_bytes = 0
        self.peak_at = (0, 0)  # event, slot

    def track(self, slot: int, value: Any) -> None:
        """An instruction has made `value`. Raises MemoryLimitError."""
        self.now += 1
        pointers = self.of_slot[slot] = []
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            pointer = storage_identity(storage)  # not its address: tensors without data have none
            if not storage.nbytes() or pointer in pointers:
                continue
            block = self.live.get(pointer)
            if block is None:
                block = self.live[pointer] = _Block(storage.nbytes(), slot, self.now)
                self.blocks.append(block)
                self.current_bytes += block.num_bytes
                self.stored_bytes += block.num_bytes if slot in self.stored else 0
            block.num_slots += 1
            pointers.append(pointer)
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes = self.current_bytes
            self.peak_at = (self.now, slot)
            if self.limit_bytes is not None and self.peak_bytes > self.limit_bytes:
                raise MemoryLimitError(self._over())

    def drop(self, slots: Iterable[int]) -> None:
        """The values of these slots are gone."""
        for slot in slots:
            if slot in self.stored:
                continue
            for pointer in self.of_slot.pop(slot, ()):
                block = self.live[pointer]
                block.num_slots -= 1
                if block.num_slots == 0:
                    block.died = self.now + 1
                    self.current_bytes -= block.num_bytes
                    del self.live[pointer]

    def report(self) -> MemoryReport:
        """What was the worst moment."""
        event, slot = self.peak_at
        alive = [(self.names[b.owner], b.num_bytes) for b in self.blocks if b.born <= event < b.died]
        owners = tuple(sorted(alive, key=lambda pair: (-pair[1], pair[0])))
        return MemoryReport(peak_bytes=self.peak_bytes, stored_bytes=self.stored_bytes, at=self.names[slot], owners=owners)

    def _over(self) -> str:
        report = self.report()
        largest = ", ".join(f"{name} {num_bytes}" for name, num_bytes in report.owners[:5])
        return (
            f"the step needs at least {report.peak_bytes} bytes on the device at {report.at}, {self.limit_bytes} are allowed; "
            f"parameters, buffers and optimizer state are {report.stored_bytes} of them. Largest: {largest}. Plan again with this "
            "limit, use more devices or a smaller batch, or raise the limit."
        )


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, Pending):
        return value.held
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return ()
