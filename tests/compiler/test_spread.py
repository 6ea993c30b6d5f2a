"""Of parameters that cost alike, those that copy much stand apart."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import fx

from opweave.compiler.place_nodes import Copies, PlaceNode
from opweave.compiler.pricing import PricedProblem
from opweave.compiler.problem import ProblemBuilder
from opweave.compiler.residency import DEVICE, HOST, StatePlace
from opweave.compiler.spread import spread

NUM_LAYERS = 12
OPTIONS = [(1, StatePlace()), (1, StatePlace(HOST, HOST))]


def layers(seconds=2.0, *, limit=100.0, needs=lambda layer: 1.0, costs=lambda layer: 0.0, shape=lambda layer: (8, 8)):
    """A parameter per layer, one second of computation apart, that stays or is copied in so many seconds; it takes 1 on the device while
    it stays, and what it needs at its own time else."""
    graph = fx.Graph()
    builder = ProblemBuilder(pools={DEVICE: limit}, streams=("host_to_device",))
    places, copies = [], []
    for layer in range(NUM_LAYERS):
        member = graph.placeholder(f"p{layer}")
        member.meta["val"] = torch.empty(shape(layer), device="meta")
        index = builder.add_node([0.0, costs(layer)], {"host_to_device": np.array([0.0, seconds])})
        builder.add_usage(index, DEVICE, layer, layer + 1, [0.0, needs(layer)])
        places.append(PlaceNode(index, member, OPTIONS))
        copies.append(Copies(index, "host_to_device", float(layer), np.array([0.0, seconds])))
    return PricedProblem(builder.build(), None, places=places, uses=SimpleNamespace(casts={}), copies=copies)


def copied(selection):
    return np.flatnonzero(selection).tolist()


def first(count):
    return np.array([1] * count + [0] * (NUM_LAYERS - count))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_copies_stand_apart(count):
    found = copied(spread(layers(), first(count)))
    assert len(found) == count
    assert min(np.diff(found)) >= 2, "each takes the stream for two seconds"


def test_no_part_of_the_step_has_much_more_to_copy_than_others():
    found = copied(spread(layers(), first(6)))
    assert len(found) == 6
    assert all(sum(start <= layer < start + 4 for layer in found) <= 3 for start in range(NUM_LAYERS - 3)), found


def test_what_memory_at_a_time_does_not_allow_stays():
    """Only the first five layers have room for what comes."""
    found = copied(spread(layers(limit=1.0, needs=lambda layer: 1.0 if layer < 5 else 2.0), first(2)))
    assert len(found) == 2 and max(found) < 5 and found[1] - found[0] >= 2


@pytest.mark.parametrize("unlike", [{"costs": lambda layer: 0.01 * layer}, {"shape": lambda layer: (8, 8 + layer)}])
def test_unlike_parameters_exchange_nothing(unlike):
    assert copied(spread(layers(**unlike), first(4))) == [0, 1, 2, 3]


def test_an_even_selection_is_left_as_it_is():
    selection = np.arange(NUM_LAYERS) % 2
    assert spread(layers(seconds=1.0), selection) is selection


def test_a_narrow_form_goes_with_its_parameter():
    """Fetched twice where its narrow form is not kept: the parameter and the form exchange what becomes of them together."""
    priced = layers(seconds=0.0)
    graph = fx.Graph()
    builder = ProblemBuilder(pools={DEVICE: 100.0}, streams=("host_to_device",))
    for _ in range(2 * NUM_LAYERS):
        builder.add_node([0.0, 0.0])
    casts, copies, forms = {}, [], []
    for node in priced.places:
        cast = graph.placeholder(f"cast{node.index}")
        casts[node.member] = cast
        forms.append(PlaceNode(NUM_LAYERS + node.index, cast, [(1, "keep"), (1, "recompute")]))
        again = np.array([[0.0, 0.0], [0.0, 2.0]])  # made again, of what is on the host
        copies.append(Copies(node.index, "host_to_device", float(node.index), again, NUM_LAYERS + node.index))
    both = PricedProblem(builder.build(), None, places=priced.places + forms, uses=SimpleNamespace(casts=casts), copies=copies)
    chosen = np.concatenate([first(4), first(4)])
    found = spread(both, chosen)
    assert found[:NUM_LAYERS].tolist() == found[NUM_LAYERS:].tolist()
    assert min(np.diff(copied(found[:NUM_LAYERS]))) >= 2
