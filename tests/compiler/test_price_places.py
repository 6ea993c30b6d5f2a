"""Places are priced as their programs run: what is computed, and what the first reader of a deferred update waits for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.choices import build_choices
from opweave.compiler.limits import memory_limits
from opweave.compiler.lower import lower
from opweave.compiler.pricing import Pricer
from opweave.compiler.record import Candidate
from opweave.compiler.residency import DEVICE, HOST, RECOMPUTE, StatePlace
from opweave.compiler.solver import Solution
from opweave.compiler.timeline import timeline
from opweave.cost_model.cluster import Cluster, Link
from opweave.cost_model.simulate import COMPUTE

A100 = Cluster.preset("a100-40gb")
COPIES_AT_ONCE = replace(
    A100, device_to_host=Link(latency_s=0.0, bandwidth_bytes_per_s=1e18), host_to_device=Link(latency_s=0.0, bandwidth_bytes_per_s=1e18),
    host=replace(A100.host, update_elements_per_s=1e18),
)  # fmt: skip
ON_CPU = StatePlace(HOST, HOST, HOST, cast=True)
PLACES = [
    StatePlace(), StatePlace(DEVICE, HOST), StatePlace(HOST, HOST, cast=True), StatePlace(HOST, HOST, HOST), ON_CPU,
]  # fmt: skip


@pytest.fixture(scope="module")
def analysis():
    with torch.device("meta"):
        model, batch = zoo.load("opt-125m", (4, 512))
    return analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()), autocast=torch.bfloat16))


def priced(analysis, cluster):
    graph = build_choices(analysis.step, analysis.factors, (1,))
    return Pricer(graph, cluster, memory_limits(None, cluster), places=True).price()


def with_places(found, place, *, casts_again):
    """A selection that keeps everything, but for parameters, and perhaps their narrow forms."""
    casts = set(found.uses.casts.values())
    selection = np.zeros(found.problem.num_nodes, dtype=np.int64)
    for node in found.places:
        places = [p for _, p in node.options]
        wanted = place if isinstance(places[0], StatePlace) else RECOMPUTE if casts_again and node.member in casts else "keep"
        selection[node.index] = places.index(wanted) if wanted in places else 0
    return selection


@pytest.mark.parametrize("casts_again", [False, True])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.text)
def test_what_is_priced_as_computed_is_what_the_program_computes(analysis, place, casts_again):
    """Where copies take no time. Nothing is cast that is fetched in its narrow form, but new parameters that go back in it; nothing is
    updated that the CPU updates."""
    found = priced(analysis, COPIES_AT_ONCE)
    selection = with_places(found, place, casts_again=casts_again)
    score = found.problem.evaluate(selection)
    solution = Solution(
        selection=selection, objective=score.objective, lower_bound=0.0, gap=1.0, status="feasible", reason="", seconds=0.0
    )
    candidate = Candidate((1,), found, solution, with_places=True)
    program = lower(analysis.step, analysis.factors, candidate.assignment(), device="meta")
    computed = timeline(program, COPIES_AT_ONCE, device="meta").simulate().busy_s[COMPUTE]
    assert score.node_cost + score.edge_cost == pytest.approx(computed, rel=0.01)


def test_updates_that_the_next_step_waits_for_are_exposed(analysis):
    """The first layer's gradients come last and its parameters are read first; for the last layer's update there is a step's time."""
    found = priced(analysis, replace(A100, host=replace(A100.host, update_elements_per_s=1e8)))
    costs, offsets = found.problem.node_cost, found.problem.node_offsets()
    exposed = {}
    for node in found.places:
        places = [p for _, p in node.options]
        if ON_CPU in places:
            exposed[node.member.name] = costs[offsets[node.index] + places.index(ON_CPU)]
    (first,) = (s for name, s in exposed.items() if "layers_0_self_attn_q_proj_weight" in name)
    (last,) = (s for name, s in exposed.items() if "layers_11_self_attn_q_proj_weight" in name)
    update_s = 768 * 768 / 1e8
    assert first > 0.8 * update_s and last < 0.2 * update_s
