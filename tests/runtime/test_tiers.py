"""Values and state in other tiers of memory: the same numbers, less memory, every copy counted, every failure told."""

import gc
import os
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from opweave.runtime import copies, tiers, update
from opweave.runtime.copies import memory_of
from opweave.runtime.dry_run import dry_run
from opweave.runtime.execute import Executor, MemoryLimitError, check_updates_last
from opweave.runtime.groups import AxisGroups
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import replicated
from opweave.runtime.state import ProgramState
from opweave.runtime.tiers import TierError, TierOptions, TierStore, arrive, settle

from .programs import aten, batches, optimizer_of
from .tier_programs import Chain, chain_program

WIDTH = 16


def executor_of(program, store=None, **options) -> Executor:
    model, store = Chain(WIDTH), store or TierStore()
    optimizer = optimizer_of(program.optimizer, model.parameters())
    state = ProgramState.from_model(program, model, (0,), store=store)
    return Executor(program, AxisGroups((1,)), optimizer=optimizer, state=state, tiers=store, **options)


def losses_and_weight(executor, num=3):
    losses = [executor.run({"x": x})[0] for x in batches(num, width=WIDTH)]
    return torch.stack(losses), executor.state.value(("param", "w", ""))


CHOICES = [(tier, state_tier, "device") for tier in ("host", "disk") for state_tier in ("device", "host", "disk")]
CHOICES += [("device", "disk", "device"), ("device", "host", "host"), ("disk", "host", "host")]


@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_the_same_numbers_as_on_the_device(tier, state_tier, update_on):
    expected = losses_and_weight(executor_of(chain_program("device")))
    executor = executor_of(chain_program(tier, state_tier=state_tier, update_on=update_on))
    found = losses_and_weight(executor)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    executor.close()


@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_peaks_per_pool_are_those_of_the_dry_run(tier, state_tier, update_on):
    program = chain_program(tier, state_tier=state_tier, update_on=update_on)
    executor = executor_of(program)
    losses_and_weight(executor, 1)
    predicted = dry_run(program)
    assert predicted.pools == executor.memory.pools
    assert predicted.pool_owners == executor.memory.pool_owners


@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_ranks_in_lockstep_have_tiers_of_their_own(tier, state_tier, update_on):
    expected = losses_and_weight(executor_of(chain_program("device")))
    program = chain_program(tier, mesh=(2,), state_tier=state_tier, update_on=update_on)
    model = Chain(WIDTH)
    lockstep = LockstepExecutor(program, optimizer_of(program.optimizer, model.parameters()), account=True)
    lockstep.states = [ProgramState.from_model(program, model, (rank,), store=store) for rank, store in enumerate(lockstep.stores)]
    losses = torch.stack([lockstep.run({"x": x})[0] for x in batches(width=WIDTH)])
    assert torch.allclose(losses, expected[0], rtol=1e-6)
    for state in lockstep.states:
        assert torch.allclose(state.value(("param", "w", "")), expected[1], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_activations_that_wait_elsewhere_leave_the_device(tier):
    """The inputs of 4 layers wait for the backward: all at once on the device, or only the one that is needed next."""
    options = {"depth": 4, "batch": 64}
    kept, moved = executor_of(chain_program("device", **options)), executor_of(chain_program(tier, **options))
    for executor in (kept, moved):
        executor.run({"x": batches(1, 64, WIDTH)[0]})
    h, w, loss = 64 * WIDTH * 4, WIDTH * WIDTH * 4, 4
    # At the first tanh_backward: 5 activations, its operand and result.
    assert kept.memory.peak_bytes == 7 * h + 3 * w + loss
    # At the second: both activations around it, its operand and result; and a part of the gradient.
    assert moved.memory.peak_bytes == 4 * h + 4 * w + loss and moved.memory.pools[tier] == 4 * h
    assert kept.memory.pools == {"device": kept.memory.peak_bytes, "host": 0, "disk": 0}


def test_stored_tensors_are_counted_in_their_pool():
    executor = executor_of(chain_program("device", state_tier="disk"))
    executor.run({"x": batches(1, width=WIDTH)[0]})
    weight = WIDTH * WIDTH * 4
    assert executor.memory.pools["disk"] == 3 * weight and executor.memory.stored_bytes == 0
    assert executor.memory.pool_owners["disk"] == (("exp_avg", weight), ("exp_avg_sq", weight), ("w", weight))


def test_traffic_is_what_was_copied():
    executor = executor_of(chain_program("disk", state_tier="host"))
    state, h = 3 * WIDTH * WIDTH * 4, 8 * WIDTH * 4
    for step in (1, 2):
        executor.run({"x": batches(1, width=WIDTH)[0]})
        traffic = executor.traffic
        assert (traffic.offloaded_bytes, traffic.fetched_bytes) == (4 * h + state, 4 * h + state)
        assert (traffic.total_offloaded_bytes, traffic.total_fetched_bytes) == (step * (4 * h + state), step * (4 * h + state))


def test_limits_of_each_pool():
    program = chain_program("disk", state_tier="host")
    text = r"needs at least 2048 bytes on the host at exp_avg, 2000 are allowed; parameters, .* are 2048 of them. Largest: exp_avg 1024"
    with pytest.raises(MemoryLimitError, match=text):
        executor_of(program, limit_bytes={"host": 2000}).run({"x": batches(1, width=WIDTH)[0]})
    with pytest.raises(MemoryLimitError, match=r"bytes on the disk at offload"):
        executor_of(program, limit_bytes={"disk": 1}).run({"x": batches(1, width=WIDTH)[0]})
    with pytest.raises(ValueError, match=r"no memory pool 'hots'; limits can be given for \('device', 'host', 'disk'\)"):
        executor_of(program, limit_bytes={"hots": 1})


def test_a_settled_value_is_free():
    for tier in ("host", "disk"):
        store = TierStore()
        x = torch.ones(1000)
        gone = weakref.ref(x.untyped_storage())
        parking = store.offload(x, tier)
        del x
        parked = settle(parking)
        assert gone() is None, "the Parking is alive, what it copied is not"
        assert torch.equal(store.load(parked), torch.ones(1000))
        store.close()


def test_the_account_knows_what_a_parking_lets_go():
    """A Parking that lives on after it was settled; and a value whose copy is not awaited is still there."""
    graph = fx.Graph()
    graph.placeholder("coords")
    x = graph.placeholder("x0")
    call = graph.call_function
    value = call(aten.mul.Tensor, (x, 2))
    parking = call(tiers.offload, (value, "disk"))
    parked = call(tiers.settle, (parking,))
    other = call(aten.mul.Tensor, (x, 3))
    back = call(tiers.arrive, (call(tiers.fetch, (call(tiers.settle, (parking,)),)),))
    graph.output((call(aten.add.Tensor, (other, back)), call(tiers.arrive, (call(tiers.fetch, (parked,)),))))
    ports = (Port(name="x0", kind="batch", fqn="x0", spec=replicated((64,), (1,))),)
    outputs = tuple(Port(name=f"o{i}", kind="extra", fqn="") for i in range(2))
    program = LocalProgram(mesh=(1,), graph=graph, inputs=ports, outputs=outputs)
    executor = Executor(program, AxisGroups((1,)), state=ProgramState(program, (0,)))
    total, again = executor.run({"x0": torch.ones(64)})
    assert torch.equal(total, torch.full((64,), 5.0)) and torch.equal(again, torch.full((64,), 2.0))
    assert executor.memory.pools == {"device": 3 * 256, "host": 0, "disk": 256}  # x, 3x, and 2x that has come back


# ----------------------------------------------------------------------------------------------------------------------- copies


LAYOUTS = {
    "plain": lambda: torch.randn(6, 5),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "bfloat16": lambda: torch.randn(33).bfloat16(),
    "bool": lambda: torch.randn(7, 3) > 0,
    "int64": lambda: torch.arange(12).reshape(3, 4),
    "transposed": lambda: torch.randn(6, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "part of a storage": lambda: torch.randn(10, 5)[3:7],
    "with gaps": lambda: torch.randn(6, 10)[:, 2:7],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
    "nan": lambda: torch.tensor([float("nan"), -0.0, float("inf")]),
}


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_bit_comes_back_in_its_layout(kind, tier):
    store, x = TierStore(), LAYOUTS[kind]()
    parked = store.park(x, tier)
    for _ in range(2):
        y = store.load(parked)
        dense = x.contiguous() if kind in ("with gaps", "expanded") else x
        assert y.dtype == x.dtype and y.shape == x.shape and y.stride() == dense.stride()
        assert bytes(memory_of(y)) == bytes(memory_of(dense))
        assert y.data_ptr() != x.data_ptr() or not x.numel()
    other = torch.zeros_like(x).contiguous()
    store.overwrite(parked, other)
    assert torch.equal(store.load(parked), other) and store.load(parked).stride() == y.stride()
    store.close()


def test_wrong_tiers_and_shapes():
    store = TierStore()
    with pytest.raises(ValueError, match=r"no tier 'moon' beside the device; there are \('host', 'disk'\)"):
        store.offload(torch.ones(2), "moon")
    parked = store.park(torch.ones(2), "host")
    with pytest.raises(ValueError, match=r"Parked\(torch.float32, \(2,\), host\) is overwritten with torch.float32 of shape \(3,\)"):
        store.write_back(parked, torch.ones(3))
    on_disk = store.park(torch.ones(2), "disk")
    with pytest.raises(ValueError, match=r"cannot be updated on the CPU where it is; .* must be on the host"):
        store.host_update(None, [on_disk], [parked], [[]], "SGD", 0, ["w"])
    with pytest.raises(ValueError, match="num_io_threads is -1; it must be 0"):
        TierOptions(num_io_threads=-1)
    with pytest.raises(RuntimeError, match="outside an executor"):
        tiers.offload(torch.ones(2), "host")


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_an_overwrite_waits_for_the_copies_before_it(tier, monkeypatch):
    store = TierStore()
    parked = store.park(torch.zeros(1000), tier)
    read = copies._read

    def slow(*args):
        time.sleep(0.05)
        read(*args)

    monkeypatch.setattr(copies, "_read", slow)
    fetching = store.fetch(parked)
    parking = store.write_back(parked, torch.ones(1000))
    after = store.fetch(settle(parking))
    assert not arrive(fetching).any() and arrive(after).all()
    store.close()


def test_many_copies_at_once_do_not_mix():
    store = TierStore(TierOptions(num_io_threads=4))
    values = [torch.full((1000 + i,), float(i)) for i in range(100)]
    parkings = [store.offload(x, ("host", "disk")[i % 2]) for i, x in enumerate(values)]
    fetchings = [store.fetch(settle(parking)) for parking in parkings]
    assert all(torch.equal(arrive(fetching), x) for fetching, x in zip(fetchings, values, strict=True))
    store.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["offload", "fetch", "write_back", "drop"]), st.integers(0, 99)), max_size=40))
def test_any_order_of_copies_gives_what_was_stored_last(actions):
    """Nothing is waited for before the end, except that a parking is settled before it is fetched."""
    store = TierStore()
    parked, content, arriving = {}, {}, []
    for number, (action, pick) in enumerate(actions):
        name = list(parked)[pick % len(parked)] if parked else None
        if action == "offload":
            parked[number] = store.offload(torch.full((3000 + pick,), float(number)), ("host", "disk")[pick % 2])
            content[number] = number
        elif name is None:
            continue
        elif action == "fetch":
            arriving.append((store.fetch(settle(parked[name])), content[name]))
        elif action == "write_back":
            parked[name] = store.write_back(parked[name].parked, torch.full(parked[name].parked.shape, float(number)))
            content[name] = number
        else:
            del parked[name], content[name]
    arriving += [(store.fetch(settle(parking)), content[name]) for name, parking in parked.items()]
    assert all(bool((arrive(fetching) == expected).all()) for fetching, expected in arriving)
    store.close()


# --------------------------------------------------------------------------------------------------------------------- failures


def checkpointed(tmp_path, **options):
    """An executor after one step, with a checkpoint of that; the loss and weight that the next step gives."""
    executor = executor_of(chain_program("disk", state_tier="disk", **options))
    executor.run({"x": batches(width=WIDTH)[0]})
    executor.state.save(tmp_path / "c", executor.groups)
    reference = executor_of(chain_program("device"))
    reference.state.load(tmp_path / "c", reference.groups)
    loss, weight = losses_and_weight(reference, 1)
    return executor, loss, weight


def damage_content(store, monkeypatch):
    os.pwrite(store.disk.fd, b"damage", 0)  # of the first tensor that was stored


def damage_file(store, monkeypatch):
    os.ftruncate(store.disk.fd, 0)


def fill_disk(store, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))


FAILURES = {
    "changed content": (damage_content, "returned other bytes than were written"),
    "cut off file": (damage_file, "the file ends after 0 of them"),
    "full disk": (fill_disk, "No space left on device"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_failure_the_last_checkpoint_continues(failure, tmp_path, monkeypatch):
    executor, loss, weight = checkpointed(tmp_path)
    damage, text = FAILURES[failure]
    with monkeypatch.context() as patch:
        damage(executor.store, patch)
        with pytest.raises(TierError, match=text) as caught:
            executor.run({"x": batches(width=WIDTH)[0]})
    assert any("while running instruction" in note for note in caught.value.__notes__)
    executor.state.load(tmp_path / "c", executor.groups)
    found = losses_and_weight(executor, 1)
    assert torch.equal(found[0], loss) and torch.equal(found[1], weight)


def test_a_failed_step_keeps_nothing_alive(tmp_path, monkeypatch):
    executor, _, _ = checkpointed(tmp_path)
    used = executor.store.disk.extents.size_bytes
    with monkeypatch.context() as patch:
        fill_disk(executor.store, patch)
        with pytest.raises(TierError):
            executor.run({"x": batches(width=WIDTH)[0]})
    executor.state.load(tmp_path / "c", executor.groups)
    for x in batches(width=WIDTH):
        executor.run({"x": x})
    assert executor.store.disk.extents.size_bytes == used


def test_a_bad_folder_is_told_at_the_first_use(tmp_path):
    (tmp_path / "file").write_text("")
    store = TierStore(TierOptions(disk_path=tmp_path / "file"))
    with pytest.raises(TierError, match=r"cannot use the folder .*TierOptions\(disk_path=...\)"):
        executor_of(chain_program("disk"), store).run({"x": batches(1, width=WIDTH)[0]})


def test_a_nan_loss_changes_nothing_on_the_host():
    executor = executor_of(chain_program("device", state_tier="host", update_on="host"))
    executor.run({"x": batches(1, width=WIDTH)[0]})
    before = {key: executor.state.value(key) for key in executor.state.tensors}
    (loss,) = executor.run({"x": torch.full((8, WIDTH), float("nan"))})
    assert torch.isnan(loss) and all(torch.equal(executor.state.value(key), value) for key, value in before.items())
    assert float(executor.state.steps["w"]) == 1


def test_an_update_that_fails_is_told():
    executor = executor_of(chain_program("device", state_tier="host", update_on="host"))
    executor.optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="momentum and amsgrad must stay as they were"):
        executor.run({"x": batches(1, width=WIDTH)[0]})


def test_threads_and_files_end_with_the_executor():
    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("opweave")}

    gc.collect()
    before, open_files = threads(), len(os.listdir("/proc/self/fd"))
    for close in (True, False):
        executor = executor_of(chain_program("disk", state_tier="host", update_on="host"))
        executor.run({"x": batches(1, width=WIDTH)[0]})
        assert len(threads() - before) == 3
        if close:
            executor.close()
        del executor
        gc.collect()
        assert threads() == before and len(os.listdir("/proc/self/fd")) == open_files


def test_using_what_is_overwritten_is_our_mistake():
    def program(tail):
        graph = fx.Graph()
        graph.placeholder("coords")
        old, x = graph.placeholder("old"), graph.placeholder("x")
        graph.output(tuple(tail(graph.call_function, old, x)))
        return graph

    def read_after(call, old, x):
        call(tiers.write_back, (old, x))
        return [call(tiers.fetch, (old,))]

    def update_under_copy(call, old, x):
        parking = call(tiers.offload, (x, "disk"))
        call(update.fused_update, ([x], [x], [[]], "SGD", 0, ["x"]))
        return [call(tiers.settle, (parking,))]

    with pytest.raises(AssertionError, match="fetch reads old after write_back has updated it in place"):
        check_updates_last(program(read_after))
    with pytest.raises(AssertionError, match="fused_update updates x in place while offload still copies it"):
        check_updates_last(program(update_under_copy))
