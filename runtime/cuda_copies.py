"""Copies between a CUDA device and the tiers: by one stream in each direction, through page-locked host memory.

Order on the device. A copy waits for what the program had been given to do when it was started; `join` makes the program's stream wait for
the copy, without stopping the host. So memory that is freed behind a `join` can be used again at once: its next use is behind the copy too.
"""

from __future__ import annotations

import functools
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .copies import memory_of
from .disk import DiskPlace, TierError
from .parked import Copy, HostPlace

if TYPE_CHECKING:
    from .workers import Workers

PAGE_BYTES = 4096
BOUNCE_BYTES = 8 << 20  # per thread that reads or writes the disk


class StreamCopy:
    """A copy by a stream, up to an event. program: the stream that `join` makes wait for it."""

    __slots__ = ("_event", "_is_joined", "_program")

    def __init__(self, event: torch.cuda.Event, program: torch.cuda.Stream) -> None:
        self._event = event
        self._program = program
        self._is_joined = False

    @property
    def is_done(self) -> bool:
        """Whether the device has done it."""
        return self._event.query()

    def wait(self) -> None:
        """Stop the host until the device has done it."""
        self._event.synchronize()

    finish = wait

    def join(self) -> None:
        """Let the program go on behind it."""
        if not self._is_joined:
            self._program.wait_event(self._event)
            self._is_joined = True

    def order(self, stream: torch.cuda.Stream) -> None:
        """Let another stream go on behind it."""
        stream.wait_event(self._event)

    abandon = join  # a step that failed: the memory it copies from or to is used again behind it


class StreamCopies:
    """The copies of tensors on one CUDA device. workers: threads for the disk."""

    def __init__(self, device: torch.device, workers: Workers) -> None:
        self.device = device
        self.workers = workers
        self.pinned = PinnedPool()
        self._out = torch.cuda.Stream(device)
        self._back = torch.cuda.Stream(device)
        self._bounces = threading.local()

    def host_place(self, like: torch.Tensor, num_bytes: int) -> HostPlace:
        """Page-locked host memory with the layout of a tensor."""
        buffer, copies = self.pinned.take(num_bytes)
        tensor = torch.empty(0, dtype=like.dtype).set_(buffer.untyped_storage(), 0, like.shape, like.stride())
        place = HostPlace(tensor, num_bytes, self.pinned.give)
        place.reading = copies  # of who had the memory before
        return place

    def write(self, place: HostPlace | DiskPlace, x: torch.Tensor, after: Sequence[Copy]) -> Copy:
        """Start copying `x` to a place behind `after`."""
        program = torch.cuda.current_stream(self.device)
        if isinstance(place, DiskPlace):
            return self.workers.submit(functools.partial(self._to_disk, place, x, program.record_event()), after)
        self._order(self._out, program, after)
        with torch.cuda.stream(self._out), torch.no_grad():
            place.tensor.copy_(x, non_blocking=True)
        return StreamCopy(self._out.record_event(), program)

    def read(self, place: HostPlace | DiskPlace, into: torch.Tensor, after: Sequence[Copy]) -> Copy:
        """Start copying a place to `into` behind `after`."""
        program = torch.cuda.current_stream(self.device)
        if isinstance(place, DiskPlace):
            return self.workers.submit(functools.partial(self._from_disk, place, into, program.record_event()), after)
        self._order(self._back, program, after)
        with torch.cuda.stream(self._back), torch.no_grad():
            into.copy_(place.tensor, non_blocking=True)
        return StreamCopy(self._back.record_event(), program)

    @staticmethod
    def _order(stream: torch.cuda.Stream, program: torch.cuda.Stream, after: Sequence[Copy]) -> None:
        stream.wait_stream(program)
        for copy in after:
            if isinstance(copy, StreamCopy):
                copy.order(stream)
            else:
                copy.finish()

    # -- the disk, on its threads ---------------------------------------------------------------------------------------

    def _to_disk(self, place: DiskPlace, x: torch.Tensor, ready: torch.cuda.Event) -> None:
        self._out.wait_event(ready)
        place.file.write(place, self._down(x))

    def _from_disk(self, place: DiskPlace, into: torch.Tensor, ready: torch.cuda.Event) -> None:
        self._back.wait_event(ready)
        place.file.read(place, self._up(into))

    def _down(self, x: torch.Tensor) -> Iterator[memoryview]:
        """Parts of a device tensor, one after the other in this thread's bounce buffer."""
        for part in _bytes_of(x).split(BOUNCE_BYTES):
            bounce = self._bounce()[: part.numel()]
            self._copy(bounce, part, self._out)
            yield memory_of(bounce)

    def _up(self, into: torch.Tensor) -> Iterator[memoryview]:
        """Memory for parts of a device tensor; each is copied there when the next one is asked for."""
        for part in _bytes_of(into).split(BOUNCE_BYTES):
            bounce = self._bounce()[: part.numel()]
            yield memory_of(bounce)
            self._copy(part, bounce, self._back)

    @staticmethod
    def _copy(into: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
            event = stream.record_event()
        event.synchronize()

    def _bounce(self) -> torch.Tensor:
        if not hasattr(self._bounces, "buffer"):
            self._bounces.buffer, _ = self.pinned.take(BOUNCE_BYTES)
        return self._bounces.buffer


class PinnedPool:
    """Page-locked host memory, used again for tensors of the same size in pages. Torch's own pool rounds sizes up to powers of two."""

    def __init__(self) -> None:
        self._free: dict[int, list[tuple[torch.Tensor, list[Copy]]]] = {}
        self._given: deque[tuple[torch.Tensor, list[Copy]]] = deque()
        self._lock = threading.Lock()
        self._all: list[torch.Tensor] = []
        weakref.finalize(self, _unlock_all, self._all).atexit = False

    def take(self, num_bytes: int) -> tuple[torch.Tensor, list[Copy]]:
        """A buffer of at least this many bytes, and the copies that may still be at work on it. Raises TierError."""
        size = max(-(-num_bytes // PAGE_BYTES), 1) * PAGE_BYTES
        with self._lock:
            while self._given:
                buffer, copies = self._given.popleft()
                self._free.setdefault(buffer.numel(), []).append((buffer, copies))
            free = self._free.get(size)
            return free.pop() if free else (self._locked(size), [])

    def give(self, place: HostPlace) -> None:
        """A place has died, on whatever thread: its memory is free behind its copies."""
        storage = place.tensor.untyped_storage()
        self._given.append((torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)), place.copies))

    def _locked(self, size: int) -> torch.Tensor:
        try:
            memory = mmap.mmap(-1, size)
        except OSError as error:
            raise TierError(f"cannot allocate {size} bytes of host memory: {error}. {_LESS_HOST}") from error
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
        if code != 0:
            raise TierError(f"cannot page-lock {size} bytes of host memory (CUDA error {code}). {_LESS_HOST}")
        self._all.append(buffer)
        return buffer


_LESS_HOST = "Plan with a smaller limit for the pool 'host', or raise the system's limit on locked memory (ulimit -l)."


def _unlock_all(buffers: list[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as a flat uint8 tensor."""
    num_bytes, start = x.numel() * x.element_size(), x.storage_offset() * x.element_size()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage(), start, (num_bytes,), (1,))
