"""Each phase hides its own copies, all of the step the CPU's updates that can wait."""

import numpy as np
import pytest
from torch import fx

from opweave.compiler.defer import _left, _Update, waited_for
from opweave.compiler.overlap import BWD, CPU, FWD, Overlap
from opweave.compiler.problem import ProblemBuilder
from opweave.compiler.residency import DISK, HOST, StatePlace
from opweave.compiler.timeline import Timeline
from opweave.compiler.timeline_tiers import WAIT
from opweave.cost_model.simulate import COMPUTE, Instruction
from opweave.runtime import tiers
from opweave.runtime.program import LocalProgram


@pytest.mark.parametrize("tiers", [(HOST,), (DISK,), (HOST, DISK)])
def test_a_phase_takes_as_long_as_the_busiest_of_its_streams(tiers):
    rng = np.random.default_rng(0)
    for _ in range(20):
        overlap = Overlap(tiers, 1.0)
        builder = ProblemBuilder(streams=overlap.streams)
        compute = {FWD: rng.uniform(0, 2), BWD: rng.uniform(0, 2)}
        busy = {key: rng.uniform(0, 3) for key in overlap.keys}
        for phase, seconds in compute.items():
            builder.add_node([seconds], overlap.hidden_behind(np.array([seconds]), phase))
        builder.add_node([0.0], overlap.of({key: np.array([seconds]) for key, seconds in busy.items()}))
        phases = sum(max(compute[phase], *(s for (_, at), s in busy.items() if at == phase)) for phase in (FWD, BWD))
        step_s = max(phases, busy.get((CPU, ""), 0.0))
        assert builder.build().evaluate([0, 0, 0]).objective == pytest.approx(step_s)


def test_what_can_be_hidden_leaves_nothing():
    overlap = Overlap((HOST,), 0.5)
    assert overlap.of({}) == {} and overlap.of({("host_to_device", FWD): np.zeros(2)}) == {}
    assert all((value == -0.5).all() for name, value in overlap.hidden_behind(np.ones(1), BWD).items() if BWD in name or name == CPU)


def test_the_cpu_takes_the_newest_gradient_and_leaves_the_oldest():
    """Four updates of 2 s whose gradients come in the last 4 of 10 s: there is time for two, the last that came and one before."""
    updates = [_Update(f"w{i}", 6.0 + i, 2.0) for i in range(4)]
    assert _left(updates, 0.0, 10.0) == {"w1", "w3"}  # at 6 s w0 is all there is, at 8 s w2 is the newest; w3 would end behind the step
    assert _left(updates, 0.0, 20.0) == frozenset()
    assert _left(updates, 9.0, 10.0) == {"w0", "w1", "w2", "w3"}


def test_updates_that_cannot_wait_come_first():
    updates = [_Update("a", 0.0, 4.0), _Update("", 1.0, 4.0), _Update("b", 1.0, 4.0)]
    assert _left(updates, 0.0, 8.0) == {"b"}


def test_updates_that_the_step_waits_for_at_its_end():
    """The CPU has three updates and one that cannot wait; two end behind the computation, which waits for nothing else then."""
    graph = fx.Graph()
    params = [graph.placeholder(name) for name in "abcd"]
    sent = [graph.call_function(tiers.send_gradient, (p, p)) for p in params[:3]] + [graph.call_function(tiers.offload, (params[3], HOST))]
    calls = [graph.call_function(tiers.host_update, ([p], [grad], [[]], "AdamW", 0, [""])) for p, grad in zip(params, sent, strict=True)]
    program = LocalProgram(mesh=(1,), graph=graph, inputs=(), outputs=())

    def late(*seconds, least_s=0.0):
        cpu = [Instruction(call.name, CPU, s, (0,)) for call, s in zip(calls, seconds, strict=True)]
        waits = [Instruction("updated", COMPUTE, 0.0, (4,), op_class=WAIT)]
        line = Timeline([Instruction("mm", COMPUTE, 1.0), *cpu, Instruction("mm_1", COMPUTE, 5.0), *waits], [])
        return waited_for(program, line, line.simulate(), least_s)

    assert late(1.0, 1.0, 1.0, 1.0) == []
    assert late(4.0, 2.0, 3.0, 9.0) == [{"c"}, {"b"}], "the longest first; what cannot wait is not named"
    assert late(4.0, 2.0, 3.0, 9.0, least_s=13.0) == [], "not worth another schedule"
    assert late(9.0, 2.0, 3.0, 1.0) == [{"a"}, {"c"}, {"b"}]


@pytest.mark.parametrize("place", [
    StatePlace(), *(StatePlace(HOST, HOST, HOST, cast=True, deferred=late) for late in (False, True)), StatePlace(HOST, HOST, cast=True),
])  # fmt: skip
def test_places_are_read_as_they_are_written(place):
    assert StatePlace.parse(place.text) == place


@pytest.mark.parametrize(("text", "why"), [
    ("param device (cast), state host, update host", "is stored on the host"),
    ("param disk (cast), state disk, update device", "is stored on the host"),
    ("param host, state host, update host (deferred)", "beside the next step"),
    ("param host (cast), state host, update device (deferred)", "beside the next step"),
    ("param host (cast), state host", "is no place of a parameter"),
])  # fmt: skip
def test_places_that_are_none_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        StatePlace.parse(text)
