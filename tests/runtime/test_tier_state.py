"""State that is stored in other tiers of memory: made, shown, saved and loaded tensor by tensor."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from opweave.runtime.state import CheckpointError, ProgramState
from opweave.runtime.tiers import Parked, TierStore

from .programs import Linear, batches, linear_program, optimizer_of, stored_on, trained
from .test_state import Tied, alone, tied_program

TIERS = ["host", "disk"]


def parked_state(tier, model=None, optimizer=None) -> ProgramState:
    return ProgramState.from_model(stored_on(linear_program(mesh=(1,)), tier), model or Linear(), (0,), optimizer=optimizer)


def assert_same(state, expected):
    """Equal values, wherever they are."""
    assert state.tensors.keys() == expected.tensors.keys()
    for key in expected.tensors:
        assert torch.equal(state.value(key), expected.value(key)), key


@pytest.mark.parametrize("tier", TIERS)
def test_a_state_holds_parked_tensors_of_its_own(tier):
    model = Linear()
    state = parked_state(tier, model)
    assert all(isinstance(held, Parked) and held.tier == tier for held in state.tensors.values())
    before = model.w.detach().clone()
    with torch.no_grad():
        model.w.zero_()
    assert torch.equal(state.value(("param", "w", "")), before) and not state.value(("state", "w", "exp_avg")).any()
    state.check(state.program)


def test_a_state_of_other_tiers_is_refused():
    program = linear_program(mesh=(1,))
    state = parked_state("disk")
    with pytest.raises(ValueError, match=r"param 'w' is on the tier 'disk' in the state; the program keeps it on 'device'"):
        state.check(program)
    with pytest.raises(ValueError, match=r"param 'w' is on the tier 'device' in the state; the program keeps it on 'host'"):
        ProgramState.from_model(program, Linear(), (0,)).check(stored_on(program, "host"))


@pytest.mark.parametrize("tier", TIERS)
def test_the_state_of_a_trained_torch_optimizer_is_parked(tier):
    model = Linear()
    optimizer = optimizer_of("AdamW", model.parameters())
    for x in batches()[:2]:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    state = parked_state(tier, model, optimizer)
    assert torch.equal(state.value(("state", "w", "exp_avg")), optimizer.state[model.w]["exp_avg"])
    assert float(state.steps["w"]) == 2


@pytest.mark.parametrize("tier", TIERS)
def test_checkpoints_move_between_plans_with_and_without_tiers(tier, tmp_path):
    plain = trained(2).state
    plain.save(tmp_path / "plain", alone(), extra={"num_steps": 2})
    state = parked_state(tier)
    assert state.load(tmp_path / "plain", alone()) == {"num_steps": 2}
    assert_same(state, plain)
    state.save(tmp_path / "parked", alone(), extra={"num_steps": 7})
    other = trained(0).state
    assert other.load(tmp_path / "parked", alone()) == {"num_steps": 7}
    assert_same(other, plain)
    assert float(other.steps["w"]) == 2
    only = parked_state(tier)
    only.load(tmp_path / "plain", alone(), model_only=True)
    assert torch.equal(only.value(("param", "w", "")), plain.value(("param", "w", "")))
    assert not only.value(("state", "w", "exp_avg")).any()


@pytest.mark.parametrize("tier", TIERS)
def test_models_and_files(tier, tmp_path):
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = ProgramState.from_model(stored_on(tied_program(), tier), model, (0,))
    state.export_safetensors(tmp_path / "m.safetensors", alone())
    assert all(torch.equal(load_file(tmp_path / "m.safetensors")[name], value) for name, value in before.items())
    shown = state.state_dict(alone())
    assert all(torch.equal(shown["model"][name], value) for name, value in before.items())
    state.release_model(model)
    assert model.embed.weight.numel() == 0
    state.to_model(model, alone())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    doubled = {name: value * 2 for name, value in before.items()}
    state.load_model(doubled)
    assert torch.equal(state.full(("param", "embed.weight", ""), alone()), doubled["embed.weight"])
    save_file({name: value.clone() for name, value in before.items()}, tmp_path / "n.safetensors")
    state.load_model(tmp_path / "n.safetensors")
    assert torch.equal(state.value(("param", "embed.weight", "")), before["embed.weight"])


@contextmanager
def most_alive_at_once(monkeypatch, *methods):
    """Counts the tensors that methods of the store have returned or taken, and that still live."""
    made: list[weakref.ref] = []
    counts = [0]

    def note(tensor):
        if not any(ref() is tensor.untyped_storage() for ref in made):
            made.append(weakref.ref(tensor.untyped_storage()))
        counts.append(sum(ref() is not None for ref in made))

    def watch(name):
        original = getattr(TierStore, name)

        def watched(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            for value in (result, *args):
                if isinstance(value, torch.Tensor):
                    note(value)
            return result

        monkeypatch.setattr(TierStore, name, watched)

    for name in methods:
        watch(name)
    yield lambda: max(counts)


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """How many parked tensors are in memory; in a checkpoint torch's loop still holds the last one when it asks for the next."""
    state = parked_state("disk")

    def most(action, *args):
        with monkeypatch.context() as patch, most_alive_at_once(patch, "load", "overwrite") as count:
            action(*args)
            return count()

    assert most(state.save, tmp_path / "c", alone()) == 2
    assert most(state.load, tmp_path / "c", alone()) <= 2
    assert most(state.export_safetensors, tmp_path / "m.safetensors", alone()) == 1
    assert most(state.load_model, tmp_path / "m.safetensors") == 1
    assert most(parked_state, "disk") == 0
    assert most(state.state_dict, alone()) == 3, "all of it: the count sees what it should"


def test_a_state_is_made_without_a_second_copy_in_memory(monkeypatch):
    parked = []
    original = TierStore.park
    monkeypatch.setattr(TierStore, "park", lambda self, x, *args: parked.append(x.data_ptr()) or original(self, x, *args))
    model = Linear()
    parked_state("disk", model)
    assert parked[0] == model.w.data_ptr(), "the parameter is parked from where it is"


def test_an_export_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    state = parked_state("disk")
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device; what was there before is unchanged"):
        state.export_safetensors(path, alone())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_exports_of_other_types(dtype, tmp_path):
    model = Tied().to(dtype)
    state = ProgramState.from_model(stored_on(tied_program(dtype=dtype), "disk"), model, (0,))
    state.export_safetensors(tmp_path / "m.safetensors", alone())
    found = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in model.state_dict().items())
