"""Collective prices: ring formulas, their linear form and measured tables."""

import dataclasses

import pytest

from opweave.cost_model.cluster import Link
from opweave.cost_model.collectives import (
    KINDS,
    SPACING,
    bucket_seconds,
    collective_coefficients,
    collective_seconds,
    is_measured,
    many,
    spaced_seconds,
)

LINK = Link(latency_s=1e-6, bandwidth_bytes_per_s=1e11, efficiency=0.5, start_s=1e-5)


@pytest.mark.parametrize(
    "kind, hops, share",
    [("all_reduce", 14, 14 / 8), ("all_gather", 7, 7 / 8), ("reduce_scatter", 7, 7 / 8),
     ("all_to_all", 7, 7 / 64), ("broadcast", 7, 1), ("permute", 1, 1 / 8)],
)  # fmt: skip
def test_ring_formulas(kind, hops, share):
    assert collective_seconds(kind, 1e9, 8, LINK) == pytest.approx(1e-5 + hops * 1e-6 + share * 1e9 / 5e10)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_agree_with_seconds(kind):
    fixed, per_byte = collective_coefficients(kind, 4, LINK)
    for size in (0, 1, 1e6, 1e9):
        assert collective_seconds(kind, size, 4, LINK) == pytest.approx(fixed + per_byte * size)


def test_all_reduce_is_reduce_scatter_and_all_gather():
    parts = collective_seconds("reduce_scatter", 1e8, 8, LINK) + collective_seconds("all_gather", 1e8, 8, LINK)
    assert collective_seconds("all_reduce", 1e8, 8, LINK) == pytest.approx(parts - LINK.start_s)


def test_one_device_is_free():
    assert collective_seconds("all_reduce", 1e9, 1, LINK) == 0
    assert collective_coefficients("all_gather", 1, LINK) == (0, 0)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"unknown collective 'gather_all'; known are all_reduce, all_gather"):
        collective_seconds("gather_all", 1, 2, LINK)


def test_measured_tables_take_precedence():
    table = {"all_reduce": {"2": [[1000, 1e-4], [1e6, 1e-3], [2e6, 3e-3]]}}
    link = dataclasses.replace(LINK, tables=table)
    assert is_measured("all_reduce", 2, link) and not is_measured("all_reduce", 4, link)
    assert collective_seconds("all_reduce", 1, 2, link) == 1e-4
    assert collective_seconds("all_reduce", 1.5e6, 2, link) == pytest.approx(2e-3)
    assert collective_seconds("all_reduce", 3e6, 2, link) == pytest.approx(5e-3)
    fixed, per_byte = collective_coefficients("all_reduce", 2, link)
    assert fixed + per_byte * 2e6 == pytest.approx(3e-3)
    assert collective_seconds("all_gather", 1e6, 2, link) == collective_seconds("all_gather", 1e6, 2, LINK)


def test_a_bucket_is_the_sum_of_its_messages_as_measured_side_by_side():
    one, four, sixteen = [[1000, 1e-4], [1e6, 1e-3]], [[1e5, 1e-4], [1e6, 2e-3]], [[1e6, 3e-3]]
    tables = {"all_reduce": {"2": one}, many("all_reduce", 4): {"2": four}, many("all_reduce", 16): {"2": sixteen}}
    link = dataclasses.replace(LINK, tables=tables)
    assert bucket_seconds("all_reduce", [1e6, 1e6, 1e6, 10], 2, link) == pytest.approx(3 * 2e-3 + 1e-4)
    assert bucket_seconds("all_reduce", [1e6], 2, link) == pytest.approx(1e-3), "one message is no bucket"
    assert bucket_seconds("all_reduce", [1e6] * 2, 2, link) == pytest.approx(2 * 1.5e-3), "half way from one to four"
    assert bucket_seconds("all_reduce", [1e6] * 8, 2, link) == pytest.approx(8 * 2.5e-3), "half way from four to sixteen"
    assert bucket_seconds("all_reduce", [1e6] * 99, 2, link) == pytest.approx(99 * 3e-3), "no further than was measured"
    assert bucket_seconds("all_gather", [1e6, 2e6], 2, link) == collective_seconds("all_gather", 3e6, 2, link), "one message, not measured"


def test_a_collective_costs_less_right_behind_another():
    link = dataclasses.replace(LINK, tables={SPACING: {"2": [[0, -2e-4], [1e-3, 0.0], [3e-3, 1e-4]]}})
    assert spaced_seconds(0.0, 2, link) == pytest.approx(-2e-4)
    assert spaced_seconds(0.5e-3, 2, link) == pytest.approx(-1e-4)
    assert spaced_seconds(2e-3, 2, link) == pytest.approx(5e-5)
    assert spaced_seconds(1.0, 2, link) == pytest.approx(1e-4), "no further than was measured"
    assert spaced_seconds(1.0, 4, link) == spaced_seconds(1.0, 2, LINK) == 0.0
