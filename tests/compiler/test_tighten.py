"""Limits for the problem follow from what programs need and what the problem refuses."""

import pytest

from opweave.compiler.tighten import Tightening, excess
from opweave.runtime.memory import MemoryReport


def report(**pools):
    return MemoryReport(peak_bytes=pools["device"], stored_bytes=0, at="mm", owners=(), pools=pools, pool_at=dict.fromkeys(pools, "mm"))


def test_excess_is_of_the_pools_that_exceed():
    assert excess({"device": 12, "disk": 3, "host": 9}, {"device": 10.0, "disk": 3.0}) == {"device": 2}


def test_a_program_that_is_too_large_is_excluded():
    """Twice the answer was taken for 90 and needed more than 100: the next problem gets less than either took, by what was too much."""
    tight = Tightening({"device": 100.0, "disk": 50.0})
    assert tight.program_exceeds(report(device=130, disk=10), {"device": 90.0, "disk": 10.0})
    assert tight.current == {"device": 60.0, "disk": 50.0}
    assert tight.program_exceeds(report(device=101, disk=10), {"device": 55.0, "disk": 10.0})
    assert tight.current == {"device": 54.0, "disk": 50.0}
    assert tight.leanest.peak_bytes == 101
    assert tight.reason() == "the leanest program that was found needs 101 bytes of the device, 1 too many (at mm)"


def test_halfway_between_too_little_and_too_much():
    tight = Tightening({"device": 100.0})
    tight.program_exceeds(report(device=120), {"device": 100.0})
    assert tight.current == {"device": 80.0} and tight.problem_refuses() and tight.current == {"device": 90.0}
    assert tight.program_exceeds(report(device=115), {"device": 90.0}) and tight.current == {"device": 85.0}
    assert tight.problem_refuses() and tight.current == {"device": 87.5}
    tries = 0
    while tight.problem_refuses():
        tries += 1
    assert 0 < tries < 5, "it ends where the two are next to each other"


def test_a_refusal_of_the_limits_themselves_ends_it():
    assert not Tightening({"device": 100.0}).problem_refuses()


def test_nothing_left_to_give():
    tight = Tightening({"device": 100.0})
    assert tight.program_exceeds(report(device=190), {"device": 80.0}), "from a negative limit back to halfway between none and all"
    assert tight.current == {"device": pytest.approx(50.0)}
