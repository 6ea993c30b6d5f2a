"""The disk tier's file: places for the bytes of tensors, and copies to and from them that check what they read.

The file has no name (it is unlinked from the start), so nothing stays behind however the process ends. Space is reserved before it is
written: a full disk is found when a place is asked for. Bytes go straight between a tensor's memory and the file.
"""

from __future__ import annotations

import bisect
import os
import tempfile
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .parked import Place

ALIGN_BYTES = 4096
CHUNK_BYTES = 1 << 20  # per system call: what is summed is still in the core's cache when it is written


class TierError(RuntimeError):
    """A tier could not take or give back a tensor: the disk is full, or does not return what was written."""


class Extents:
    """Free and used ranges of a file: best fit, neighbours joined."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes), by offset

    def take(self, num_bytes: int) -> int | None:
        """Offset of a free range, None where the file has to grow."""
        fitting = [(size, i) for i, (_, size) in enumerate(self._free) if size >= num_bytes]
        if not fitting:
            return None
        size, i = min(fitting)
        offset, _ = self._free.pop(i)
        if size > num_bytes:
            self._free.insert(i, (offset + num_bytes, size - num_bytes))
        return offset

    def tail(self) -> tuple[int, int]:
        """(offset, bytes) of the free range at the end of the file; growth starts there."""
        if self._free and sum(self._free[-1]) == self.size_bytes:
            return self._free[-1]
        return self.size_bytes, 0

    def grown(self, size_bytes: int) -> None:
        """The file now has this size."""
        offset, free = self.tail()
        if free:
            self._free.pop()
        self._free.append((offset, size_bytes - offset))
        self.size_bytes = size_bytes

    def give(self, offset: int, num_bytes: int) -> None:
        """A range is free again."""
        i = bisect.bisect(self._free, (offset, 0))
        if i < len(self._free) and self._free[i][0] == offset + num_bytes:
            num_bytes += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == offset:
            i -= 1
            before, size = self._free.pop(i)
            offset, num_bytes = before, num_bytes + size
        self._free.insert(i, (offset, num_bytes))

    @property
    def free_bytes(self) -> int:
        """Bytes of the file nobody uses."""
        return sum(size for _, size in self._free)


class DiskPlace(Place):
    """A range of the file. It is given back when the last reference dies."""

    __slots__ = ("checksum", "file", "offset")

    def __init__(self, file: DiskFile, offset: int, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.file = file
        self.offset = offset
        self.checksum: int | None = None  # of the content; None while there is none or only a part

    def __del__(self) -> None:
        # On whatever thread, perhaps inside the allocator: only noted here.
        self.file.given_back.append((self.offset, self.num_bytes))


class DiskFile:
    """A nameless file in `folder`. Raises TierError where it cannot be made."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - lives as long as this object
        except OSError as error:
            raise TierError(f"the disk tier cannot use the folder {self.folder}: {error}. {_OTHER_FOLDER}") from error
        if _is_in_memory(self.folder):
            warnings.warn(
                f"the disk tier is in {self.folder}, a file system in memory: what is moved there takes host memory. {_OTHER_FOLDER}",
                stacklevel=2,
            )
        self.fd = self._file.fileno()
        self.extents = Extents()
        self.given_back: deque[tuple[int, int]] = deque()
        self._close = weakref.finalize(self, self._file.close)

    def place(self, num_bytes: int) -> DiskPlace:
        """Reserve room for a tensor. Raises TierError where the disk is full. One thread calls this."""
        while self.given_back:
            offset, size = self.given_back.popleft()
            self.extents.give(offset, _aligned(size))
        wanted = _aligned(num_bytes)
        start = self.extents.take(wanted)
        if start is None:
            self._grow(wanted)
            start = self.extents.take(wanted)
        assert start is not None, "the file has just grown by this much"
        return DiskPlace(self, start, num_bytes)

    def _grow(self, wanted: int) -> None:
        start, free = self.extents.tail()
        try:
            os.posix_fallocate(self.fd, start + free, wanted - free)
        except OSError as error:
            raise TierError(
                f"the disk tier in {self.folder} cannot grow from {self.extents.size_bytes} to {start + wanted} bytes: {error}. "
                f"Free some space there, plan with a smaller limit for the pool 'disk', or: {_OTHER_FOLDER}"
            ) from error
        self.extents.grown(start + wanted)

    def write(self, place: DiskPlace, chunks: Iterable[memoryview]) -> None:
        """Copy bytes, given in order, to a place. Raises TierError."""
        place.checksum = None
        summed = start = 0
        for chunk in chunks:
            summed = checksum(chunk, summed)
            self._all(os.pwrite, chunk, place, start, "write")
            start += len(chunk)
        assert start == place.num_bytes, f"{start} bytes were written to a place of {place.num_bytes}"
        place.checksum = summed

    def read(self, place: DiskPlace, chunks: Iterable[memoryview]) -> None:
        """Copy a place's bytes back to memory, given in order. Raises TierError where they are not what was written."""
        if place.checksum is None:
            raise TierError(
                f"a tensor of {place.num_bytes} bytes in the disk tier in {self.folder} was never completely written; {_CHECKPOINT}"
            )
        summed = start = 0
        for chunk in chunks:
            self._all(_pread_into, chunk, place, start, "read")
            summed = checksum(chunk, summed)
            start += len(chunk)
        assert start == place.num_bytes, f"{start} bytes were read from a place of {place.num_bytes}"
        if summed != place.checksum:
            raise TierError(
                f"the disk tier in {self.folder} returned other bytes than were written: {place.num_bytes} bytes at {place.offset} have "
                f"checksum {summed:#010x}, written was {place.checksum:#010x}. The disk fails, or others write to it; {_CHECKPOINT}"
            )

    def _all(self, call: object, chunk: memoryview, place: DiskPlace, start: int, what: str) -> None:
        """One chunk, in as many system calls as it takes."""
        done = 0
        while done < len(chunk):
            try:
                count = call(self.fd, chunk[done:], place.offset + start + done)  # type: ignore[operator]
            except OSError as error:
                raise TierError(self._cannot(what, place, error)) from error
            if count == 0:
                raise TierError(self._cannot(what, place, f"the file ends after {start + done} of them"))
            done += count

    def _cannot(self, what: str, place: DiskPlace, why: object) -> str:
        return (
            f"cannot {what} {place.num_bytes} bytes at {place.offset} of the disk tier in {self.folder}: {why}. {_CHECKPOINT} "
            f"after making room or choosing another disk. {_OTHER_FOLDER}"
        )

    def close(self) -> None:
        """Free the space on the disk. Later copies raise TierError."""
        self._close()
        self.fd = -1  # the number may be another file's soon


_OTHER_FOLDER = "Another folder is chosen with disk_path= of opweave.compile, --disk-path of opweave run, or TierOptions(disk_path=...)."
_CHECKPOINT = "load the last checkpoint: the step that failed may have updated some parameters already"


def checksum(chunk: memoryview, before: int) -> int:
    """Checksum of bytes that follow others, whose checksum is `before`. All chunks but the last are whole pages of 4 KiB.

    The CRC-32 of the pages' sums as 64-bit words: as fast as memory (measured with both in cache: 25 GB/s, CRC-32 of the bytes 2 to 6). It
    finds every change inside one word, and pages that are lost, stale or out of place.
    """
    whole = len(chunk) // ALIGN_BYTES * ALIGN_BYTES
    pages = np.frombuffer(chunk[:whole], dtype=np.uint64).reshape(-1, ALIGN_BYTES // 8)
    return zlib.crc32(chunk[whole:], zlib.crc32(np.add.reduce(pages, axis=1), before))


def _is_in_memory(folder: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether a folder is on a tmpfs. False where the system does not tell."""
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return False
    kinds = {Path(row[1]): row[2] for row in rows}
    where = folder.resolve()
    return next((kinds[parent] for parent in (where, *where.parents) if parent in kinds), "") in ("tmpfs", "ramfs")


def _aligned(num_bytes: int) -> int:
    return max(-(-num_bytes // ALIGN_BYTES), 1) * ALIGN_BYTES


def _pread_into(fd: int, chunk: memoryview, offset: int) -> int:
    return os.preadv(fd, [chunk], offset)
