"""Messages, and the copies around them."""

import numpy as np
import pytest

from opweave.compiler.layout import PARTIAL, REPLICATED
from opweave.compiler.price_collectives import FORBIDDEN, CollectivePrices, Moved
from opweave.cost_model.cluster import Cluster

WHOLE, FIRST, SECOND, SUM = (REPLICATED,), (0,), (1,), (PARTIAL["sum"],)
NUM_BYTES = 1 << 26


@pytest.fixture(scope="module")
def prices():
    return CollectivePrices(Cluster.preset("dgx-a100-640"), (8,))


def seconds(prices, source, target, moved):
    messages, copies = prices.matrices([source], [target], NUM_BYTES, moved)
    return messages.item(), copies.item()


def one_copy(prices):
    """Of a whole tensor."""
    return seconds(prices, SUM, SECOND, Moved(0))[1]


@pytest.mark.parametrize(("source", "target"), [(FIRST, WHOLE), (SUM, FIRST), (SUM, WHOLE)])
def test_what_lies_together_is_sent_from_where_it_is(prices, source, target):
    messages, copies = seconds(prices, source, target, Moved(0))
    assert messages > 0 and copies == 0


@pytest.mark.parametrize(
    ("source", "target", "share"),
    # of an inner dim: brought together before it is sent, or apart behind it; between two dims a piece of each, one of them the outermost
    [(SECOND, WHOLE, 1), (SUM, SECOND, 1), (FIRST, SECOND, 1 / 8), (SECOND, FIRST, 1 / 8)],
)
def test_pieces_of_an_inner_dim_are_copied(prices, source, target, share):
    assert seconds(prices, source, target, Moved(0))[1] == pytest.approx(share * one_copy(prices))


def test_a_slice_is_free_where_its_reader_takes_a_view(prices):
    assert seconds(prices, WHOLE, FIRST, Moved(0)) == (0, 0)
    assert seconds(prices, WHOLE, SECOND, Moved(0, frozenset({1}))) == (0, 0)
    messages, copies = seconds(prices, WHOLE, SECOND, Moved(0))
    assert messages == 0 and copies > one_copy(prices) / 8  # a kernel has to be launched for it


def test_what_is_packed_is_copied(prices):
    assert seconds(prices, SUM, FIRST, Moved(0, packed=True))[1] == pytest.approx(one_copy(prices))
    assert seconds(prices, FIRST, WHOLE, Moved(0, packed=True))[1] == pytest.approx(9 / 8 * one_copy(prices))


def test_no_way_is_forbidden(prices):
    messages, _ = prices.matrices([WHOLE, FIRST], [(PARTIAL["max"],)], NUM_BYTES, Moved(0))
    assert np.all(messages == FORBIDDEN)
