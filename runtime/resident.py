"""The memory of the process as the system sees it (Linux): to compare with the bytes that are accounted, and to keep near them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..host_memory import keep_freed_memory

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_RETURNED_BYTES = 64 << 10  # blocks from this size on go back to the system when they are freed
_STATUS = Path("/proc/self/status")
_is_returned = False  # somebody has asked for it


@dataclass(slots=True)
class ResidentPeak:
    """before_bytes: resident when the measurement began. peak_bytes: most since then; 0 until it ends."""

    before_bytes: int
    peak_bytes: int = 0

    @property
    def grown_bytes(self) -> int:
        """By how much the process was larger at its peak."""
        return self.peak_bytes - self.before_bytes


def keep_unless_returned() -> None:
    """Keep freed memory, which makes steps faster (see `host_memory`), unless `return_freed_memory` was called before."""
    if not _is_returned:
        keep_freed_memory()


def return_freed_memory() -> bool:
    """Let this process give freed memory back at once, from now on, so that what is resident follows what is allocated.

    It costs time: memory that is used again has to be asked for, and is zeroed by the system, page by page. Returns whether the C library
    can (glibc); elsewhere nothing changes.
    """
    global _is_returned
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None:
        return False
    options = (
        (_M_MMAP_MAX, 1 << 20),
        (_M_MMAP_THRESHOLD, _RETURNED_BYTES),  # a value that was set does not grow by itself any more
        (_M_TRIM_THRESHOLD, _RETURNED_BYTES),
        (_M_TOP_PAD, 0),
    )
    done = [mallopt(option, value) for option, value in options]
    library.malloc_trim(0)
    _is_returned = all(done)
    return _is_returned


def resident_bytes() -> int:
    """Memory of this process in RAM. Raises OSError where the system does not tell."""
    return _status("VmRSS")


@contextmanager
def measure_resident_peak() -> Iterator[ResidentPeak]:
    """Measures the most memory this process has in RAM inside. Raises OSError where the system does not tell."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident (Linux, proc(5))
    peak = ResidentPeak(resident_bytes())
    yield peak
    peak.peak_bytes = _status("VmHWM")


def _status(name: str) -> int:
    """A row of the process's status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {name}: the memory of this process cannot be measured on this system")
