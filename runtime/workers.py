"""A few threads that carry out work in the order it was given: copies between tiers, and updates on the CPU.

Work may wait for other work that was given earlier. Every queue is first in, first out, so the oldest unfinished work never waits for
something that cannot run: there is no deadlock, however queues wait for each other.
"""

from __future__ import annotations

import copy
import queue
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence

from .parked import Copy


class Work:
    """Something a thread does. What it needs is let go before it counts as done."""

    __slots__ = ("_after", "_done", "_error", "_run")

    def __init__(self, run: Callable[[], None], after: Sequence[Copy] = ()) -> None:
        self._run: Callable[[], None] | None = run
        self._after: Sequence[Copy] = after
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether it ended, well or not."""
        return self._done.is_set()

    def wait(self) -> None:
        """Return when it is done. Raises what it raised."""
        self._done.wait()
        if self._error is not None:
            # Not itself: with the frames it is raised through it would keep alive whatever they hold, this work included.
            raise _copied(self._error) from self._error

    def finish(self) -> None:
        """Return when it is done, well or not."""
        self._done.wait()

    join = wait

    def abandon(self) -> None:
        """Nobody waits for it: it goes on, and keeps alive what it needs."""

    def carry_out(self) -> None:
        """Do it now, on this thread. Raises nothing: `wait` does."""
        assert self._run is not None, "work is done once"
        try:
            for other in self._after:
                other.finish()  # its error is its own waiter's
            self._run()
        except BaseException as error:
            self._error = _without_frames(error)
        self._run, self._after = None, ()
        self._done.set()


def _without_frames(error: BaseException) -> BaseException:
    """An error whose traceback is text: frames would keep tensors alive."""
    error.add_note("in a thread:\n" + "".join(traceback.format_tb(error.__traceback__)))
    part: BaseException | None = error
    while part is not None:
        part.__traceback__ = None
        part = part.__cause__ or part.__context__
    return error


def _copied(error: BaseException) -> BaseException:
    try:
        return copy.copy(error)
    except Exception:  # its constructor wants other arguments than it keeps
        return RuntimeError(f"{type(error).__name__}: {error}")


class Workers:
    """Threads behind one queue, started at the first work. num_threads = 0: work is done at once by who gives it."""

    def __init__(self, num_threads: int, name: str) -> None:
        self.num_threads = num_threads
        self.name = name
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stop = weakref.finalize(self, _stop, self._queue, self._threads)

    def submit(self, run: Callable[[], None], after: Sequence[Copy] = ()) -> Work:
        """Have `run()` called once all of `after` is done."""
        work = Work(run, [other for other in after if not other.is_done])
        if self.num_threads == 0:
            work.carry_out()
            return work
        if not self._threads:
            self._start()
        self._queue.put(work)
        return work

    def _start(self) -> None:
        assert self._stop.alive, f"{self.name} was closed"
        for i in range(self.num_threads):
            thread = threading.Thread(target=_serve, args=(self._queue,), name=f"opweave {self.name} {i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Finish what was given and end the threads."""
        self._stop()


def _serve(todo: queue.SimpleQueue[Work | None]) -> None:
    while (work := todo.get()) is not None:
        work.carry_out()
        del work


def _stop(todo: queue.SimpleQueue[Work | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        todo.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the last reference may die on one of them
            thread.join()
    threads.clear()
