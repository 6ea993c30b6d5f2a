"""Copies between CPU memory and the tiers, by threads."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .disk import CHUNK_BYTES, DiskPlace
from .parked import Copy, HostPlace

if TYPE_CHECKING:
    from .workers import Workers

LARGE_PAGE_BYTES = 2 << 20
PAGE_BYTES = mmap.PAGESIZE
# Without Python's lock, as all functions called through ctypes.
_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else lambda *_: 0


class ThreadCopies:
    """The copies of tensors in CPU memory. Disk I/O, checksums and large copies all run without Python's lock."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def host_place(self, like: torch.Tensor, num_bytes: int) -> HostPlace:
        """Host memory with the layout of a tensor."""
        return HostPlace(torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu"), num_bytes)

    def write(self, place: HostPlace | DiskPlace, x: torch.Tensor, after: Sequence[Copy]) -> Copy:
        """Start copying `x` to a place once `after` is done."""
        return self.workers.submit(functools.partial(_write, place, x), after)

    def read(self, place: HostPlace | DiskPlace, into: torch.Tensor, after: Sequence[Copy]) -> Copy:
        """Start copying a place to `into` once `after` is done."""
        return self.workers.submit(functools.partial(_read, place, into), after)


def _write(place: HostPlace | DiskPlace, x: torch.Tensor) -> None:
    if isinstance(place, DiskPlace):
        place.file.write(place, chunks_of(x))
    else:
        ask_for_large_pages(place.tensor)
        with torch.no_grad():
            place.tensor.copy_(x)


def _read(place: HostPlace | DiskPlace, into: torch.Tensor) -> None:
    ask_for_large_pages(into)
    if isinstance(place, DiskPlace):
        place.file.read(place, chunks_of(into))
    else:
        with torch.no_grad():
            into.copy_(place.tensor)


def ask_for_large_pages(tensor: torch.Tensor) -> None:
    """Advise the system to back a large tensor, not written yet, by large pages.

    New memory costs a fault per page, and a page of 4 KiB on a virtual machine 1.4 us: filling a new tensor of 64 MiB was measured at
    2.5 GB/s, with pages of 2 MiB at 15. It is only advice: where the system does not take it nothing changes.
    """
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes < 4 * LARGE_PAGE_BYTES:
        return
    start = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    end = (tensor.data_ptr() + num_bytes) // PAGE_BYTES * PAGE_BYTES
    _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense CPU tensor, in the order of its memory. Keeps the tensor alive."""
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return memoryview(b"")
    array = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def chunks_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """`memory_of` in parts as the disk takes them."""
    memory = memory_of(tensor)
    for start in range(0, len(memory), CHUNK_BYTES):
        yield memory[start : start + CHUNK_BYTES]
