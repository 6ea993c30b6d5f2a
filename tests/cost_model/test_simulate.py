"""The simulation against schedules worked out by hand, a brute-force stepper and its own speed limit."""

import json
import random
import time

import pytest

from opweave.cost_model.simulate import Buffer, Instruction, chrome_trace, seconds_per_class, simulate


def op(name, seconds, stream="compute", waits=(), **kwargs):
    return Instruction(name, stream, seconds, tuple(waits), **kwargs)


def test_one_stream_adds_up():
    result = simulate([op("a", 1), op("b", 2), op("c", 3)])
    assert result.step_time_s == 6 and result.busy_s == {"compute": 6} and result.exposed_s == {}
    assert result.start_s.tolist() == [0, 1, 3]


def test_streams_overlap_and_waits_hold():
    program = [op("f", 2), op("reduce", 3, "comm", [0]), op("g", 2), op("update", 1, waits=[1])]
    result = simulate(program)
    assert result.start_s.tolist() == [0, 2, 2, 5] and result.step_time_s == 6
    assert result.busy_s == {"compute": 5, "comm": 3}
    assert result.exposed_s == {"comm": 1}, "compute idles from 4 to 5"


def test_prefetch_is_hidden_until_the_link_is_the_bottleneck():
    def step(copy_s):
        program = []
        for layer in range(4):
            program.append(op(f"fetch{layer}", copy_s, "h2d"))
            program.append(op(f"layer{layer}", 1.0, waits=[len(program) - 1]))
        return simulate(program)

    assert step(0.5).step_time_s == pytest.approx(4.5)
    assert step(0.5).exposed_s["h2d"] == pytest.approx(0.5)
    assert step(2.0).step_time_s == pytest.approx(9.0)


def test_launches_bound_small_kernels():
    assert simulate([op(str(i), 1e-6) for i in range(100)], launch_s=1e-5).step_time_s == pytest.approx(100e-5 + 1e-6)
    assert simulate([op(str(i), 1e-3) for i in range(100)], launch_s=1e-5).step_time_s == pytest.approx(0.1 + 1e-5)


def test_shared_links_slow_transfers_down():
    up = op("up", 1.0, "h2d", uses=(("pcie", 1.0),))
    down = op("down", 2.0, "d2h", uses=(("pcie", 1.0),))
    result = simulate([up, down])
    assert result.end_s.tolist() == pytest.approx([2.0, 3.0]), "both at half speed, then the longer one alone"
    half = [item._replace(uses=(("pcie", 0.5),)) for item in (up, down)]
    assert simulate(half).end_s.tolist() == [1.0, 2.0]


def test_contention_follows_waits_and_launches():
    program = [
        op("a", 1.0, uses=(("bus", 0.8),)),
        op("copy", 1.0, "h2d", uses=(("bus", 0.8),)),
        op("b", 1.0, waits=[1]),
    ]
    result = simulate(program)
    assert result.end_s.tolist() == pytest.approx([1.6, 1.6, 2.6])
    assert simulate(program, launch_s=0.1).step_time_s == pytest.approx(2.74)


def test_event_loop_and_one_pass_agree_without_contention():
    rng = random.Random(0)
    for _ in range(50):
        program = []
        for i in range(30):
            waits = tuple({rng.randrange(i) for _ in range(rng.randrange(3))}) if i else ()
            program.append(op(str(i), rng.randrange(4), rng.choice("abc"), waits, uses=((rng.choice("xy"), 0.01),)))
        plain = simulate(program, launch_s=0.25)
        # A resource that could be contended, but never is: the last two instructions wait for each other.
        forced = [*program, op("p", 1, "a", range(30), uses=(("z", 1.0),)), op("q", 1, "b", [30], uses=(("z", 1.0),))]
        looped = simulate(forced, launch_s=0.25)
        assert looped.end_s[:30].tolist() == pytest.approx(plain.end_s.tolist())


def test_memory_peak_and_owners():
    weights = Buffer("w", "device", 100, "parameters")
    program = [
        op("f1", 1, allocs=(Buffer("a1", "device", 10, "layer1"),)),
        op("f2", 1, allocs=(Buffer("a2", "device", 20, "layer2"), Buffer("t", "device", 5, "scratch")), frees=("t",)),
        op("b2", 1, allocs=(Buffer("g2", "device", 20, "layer2"),), frees=("a2",)),
        op("save", 1, "d2h", [0], allocs=(Buffer("a1h", "host", 10, "layer1"),)),
        op("b1", 1, frees=("a1", "g2")),
    ]
    result = simulate(program, resident=[weights])
    peak = result.peaks["device"]
    assert peak.num_bytes == 150 and peak.time_s == 2
    assert peak.owners == (("parameters", 100), ("layer2", 40), ("layer1", 10))
    assert result.peaks["host"].num_bytes == 10
    assert result.memory["device"][1][-1] == 100


def test_reuse_at_the_same_moment_is_no_peak():
    program = [op("a", 1, allocs=(Buffer("x", "device", 10),), frees=("x",)), op("b", 1, allocs=(Buffer("y", "device", 10),))]
    assert simulate(program).peaks["device"].num_bytes == 10


@pytest.mark.parametrize(
    "program, message",
    [
        ([op("a", 1, waits=[0])], r"instruction 0 \(a\) waits for 0"),
        ([op("a", 1), op("b", 1, waits=[5])], r"waits for 5; only earlier ones, 0 to 0"),
        ([op("a", -1)], r"takes -1 s"),
        ([op("a", float("nan"))], r"takes nan s"),
        ([op("a", 1, frees=("x",))], r"frees 'x', which is not live"),
        ([op("a", 1, allocs=(Buffer("x", "device", 1),) * 2)], r"allocates 'x', which is live already"),
    ],
)
def test_bad_programs_are_refused(program, message):
    with pytest.raises(ValueError, match=message):
        simulate(program)


def test_empty_program():
    assert simulate([]).step_time_s == 0


def test_trace_opens_as_json():
    program = [op("f", 2, op_class="matmul", allocs=(Buffer("x", "device", 7),)), op("r", 1, "comm", [0])]
    trace = json.loads(json.dumps(chrome_trace(program, simulate(program))))
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in spans] == [("f", 0, 2e6), ("r", 2e6, 1e6)]
    assert {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"} == {"compute", "comm"}
    assert [e["args"]["bytes"] for e in trace["traceEvents"] if e["ph"] == "C"] == [7]
    assert seconds_per_class(program, simulate(program)) == {"matmul": 2, "comm": 1}


@pytest.mark.parametrize("demand", [0.0, 0.7])
def test_time_grows_with_the_number_of_instructions(demand):
    """Eight times as many take far less than 64 times as long; seconds would depend on what else the machine does."""
    streams = ("compute", "comm", "h2d", "d2h")

    def seconds(num: int) -> float:
        program = []
        for i in range(num):
            waits = (i - 1, i - 7) if i > 7 and i % 3 == 0 else ()
            buffers = (Buffer(f"b{i}", "device", 8, f"layer{i % 50}"),)
            program.append(Instruction(str(i), streams[i % 4], 1e-5, waits, buffers, (f"b{i - 9}",) if i > 9 else (), (("bus", demand),)))
        begin = time.process_time()
        assert simulate(program, launch_s=1e-6).step_time_s > 1e-6 * num
        return time.process_time() - begin

    assert min(seconds(40_000) for _ in range(2)) < 24 * min(seconds(5_000) for _ in range(2))


def test_micro_batches_are_simulated_once():
    each = [op("f", 2, num_runs=4), op("reduce", 3, "comm", [0], num_runs=4), op("g", 1, num_runs=4)]
    once = [op("update", 5, waits=[1])]
    result = simulate(each + once)
    assert result.step_time_s == 4 * 5 + 5, "every micro-batch begins when the last one has ended on all streams"
    assert result.busy_s == {"compute": 4 * 3 + 5, "comm": 12} and result.exposed_s == {"comm": 4 * 2}
    assert seconds_per_class(each + once, result) == {"compute": 4 * 3 + 5, "comm": 12}
    unrolled = simulate([item._replace(num_runs=1, waits=()) for item in each[:1] * 4] + [op("update", 5)])
    assert simulate([each[0], op("update", 5)]).step_time_s == unrolled.step_time_s
    with pytest.raises(ValueError, match=r"instruction 1 \(late\) runs 3 times"):
        simulate([op("a", 1), op("late", 1, num_runs=3)])


def test_lanes_of_a_stream_run_beside_each_other():
    """A long message of one process group does not keep one of another waiting; what they share, they share. Reported as one stream."""
    program = [
        op("long", 4.0, "net", lane="a", uses=(("wire", 1.0),)),
        op("short", 1.0, "net", lane="b", uses=(("wire", 1.0),)),
        op("work", 3.0, waits=[1]),
    ]
    result = simulate(program)
    assert result.end_s.tolist() == pytest.approx([5.0, 2.0, 5.0])
    assert result.busy_s["net"] == pytest.approx(5.0) and result.exposed_s["net"] == pytest.approx(2.0)
    apart = simulate([item._replace(uses=()) for item in program])
    assert apart.end_s.tolist() == pytest.approx([4.0, 1.0, 4.0])
    tracks = [e["args"]["name"] for e in chrome_trace(program, result)["traceEvents"] if e["name"] == "thread_name"]
    assert tracks == ["net a", "net b", "compute"]
