"""Work is done in order, waits for what it depends on, and its errors come out where it is waited for."""

import gc
import threading
import time
import weakref

import pytest
import torch

from opweave.runtime.workers import Workers


def running():
    return [thread for thread in threading.enumerate() if thread.name.startswith("opweave")]


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_work_waits_for_work_given_before(num_threads):
    workers, order = Workers(num_threads, "test"), []

    def slow():
        time.sleep(0.05)
        order.append("first")

    first = workers.submit(slow)
    second = workers.submit(lambda: order.append("second"), [first])
    second.wait()
    assert order == ["first", "second"] and first.is_done
    workers.close()


def test_queues_that_wait_for_each_other_end():
    one, other, order = Workers(1, "one"), Workers(1, "other"), []
    work = None
    for i in range(50):
        work = (one, other)[i % 2].submit(lambda i=i: order.append(i), [work] if work else [])
    work.wait()
    assert order == list(range(50))
    one.close()
    other.close()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_is_raised_at_every_wait_and_stops_nothing(num_threads):
    workers = Workers(num_threads, "test")
    bad = workers.submit(lambda: 1 / 0)
    good = workers.submit(lambda: None, [bad])
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            bad.wait()
    good.wait()
    workers.close()


def test_an_error_that_cannot_be_copied_is_told_too():
    class PickyError(Exception):
        def __init__(self, *, why):
            super().__init__(why)

    def fail():
        raise PickyError(why="no reason")

    workers = Workers(1, "test")
    with pytest.raises(RuntimeError, match="PickyError: no reason"):
        workers.submit(fail).wait()
    workers.close()


@pytest.mark.parametrize("fails", [False, True])
def test_what_work_needs_is_let_go_before_it_counts_as_done(fails):
    workers = Workers(2, "test")
    for _ in range(50):
        value = torch.ones(4)
        gone = weakref.ref(value.untyped_storage())

        def use(value=value):
            inside = value + 1
            if fails:
                raise ValueError(inside.sum())

        work = workers.submit(use)
        del value, use
        try:
            work.wait()
        except ValueError as error:
            assert error.__traceback__ is None or fails
        assert gone() is None
    workers.close()


def test_threads_end_with_close_and_with_the_last_reference():
    before = running()
    closed, dropped = Workers(2, "closed"), Workers(2, "dropped")
    for workers in (closed, dropped):
        workers.submit(lambda: None).wait()
    assert len(running()) == len(before) + 4
    closed.close()
    del dropped, workers
    gc.collect()
    assert running() == before
    with pytest.raises(AssertionError, match="closed was closed"):
        closed.submit(lambda: None)


def test_no_thread_before_there_is_work():
    before = running()
    workers = Workers(2, "idle")
    assert running() == before
    workers.close()
