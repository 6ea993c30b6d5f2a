"""The cycle collector is back when a pass ends, however it ends."""

import gc

import pytest

from opweave.compiler.collector import collector_paused


def test_it_is_off_inside_and_back_behind():
    assert gc.isenabled()
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner one has switched it on"
    assert gc.isenabled()


def test_it_is_back_after_an_error():
    @collector_paused()
    def fails():
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
