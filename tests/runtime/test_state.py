"""Stored tensors to the outside: exposure as DTensors, checkpoints, safetensors, and everything that can be wrong with them."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import fx, nn

from opweave.runtime import checkpoint
from opweave.runtime import collectives as co
from opweave.runtime import lockstep as ls
from opweave.runtime.exposure import exposure_of
from opweave.runtime.groups import AxisGroups, group_ranks
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import ShardSpec, replicated, unravel
from opweave.runtime.state import CheckpointError, ProgramState

from .launch import launch
from .programs import Linear, batches, linear_program, optimizer_of, stored_on, trained


class Tied(nn.Module):
    """Tied weights, a buffer, a non-persistent buffer, and a parameter no program uses."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(4, width)
        self.head = nn.Linear(width, 4, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def tied_program(mesh=(1,), axes=(None,), dtype=torch.float32, width=6) -> LocalProgram:
    graph = fx.Graph()
    for name in ("coords", "w", "mean", "exp_avg"):
        graph.placeholder(name)
    graph.output(())
    spec = ShardSpec(shape=(4, width), factors=((4,), (3, width // 3)), axes=axes, mesh=mesh)
    ports = (
        Port(name="w", kind="param", fqn="embed.weight", group=0, dtype=dtype, spec=spec),
        Port(name="mean", kind="buffer", fqn="mean", dtype=dtype, spec=replicated((width,), mesh)),
        Port(name="exp_avg", kind="state", fqn="embed.weight", slot="exp_avg", group=0, dtype=dtype, spec=spec),
    )
    return LocalProgram(mesh=mesh, graph=graph, inputs=ports, outputs=(), optimizer="Adam")


def alone() -> AxisGroups:
    return AxisGroups((1,))


# ------------------------------------------------------------------------------------------------------------------ exposure


@st.composite
def layouts(draw):
    mesh = draw(st.sampled_from([(2,), (3,), (2, 2), (2, 3)]))
    unit = math.prod(mesh)
    factors = tuple(
        tuple(draw(st.sampled_from([1, 2, unit])) for _ in range(draw(st.integers(1, 3)))) for _ in range(draw(st.integers(1, 3)))
    )
    splits = [(dim, i) for dim, parts in enumerate(factors) for i, size in enumerate(parts) if size % unit == 0]
    axes = tuple(draw(st.sampled_from([None, *splits])) for _ in mesh)
    return ShardSpec(shape=tuple(map(math.prod, factors)), factors=factors, axes=axes, mesh=mesh)


def moved(spec, move, pieces, back=False):
    """One move of an exposure on all ranks' pieces, by the lockstep collectives."""
    if move.to_dim is None and back:
        n = spec.mesh[move.axis]
        return [co.take_shard(p, unravel(r, spec.mesh), (move.axis,), (n,), move.dim, move.outer) for r, p in enumerate(pieces)]
    out = [None] * len(pieces)
    inner, plain = (move.dim, move.outer), (move.to_dim, 1)
    for ranks in group_ranks(spec.mesh, (move.axis,)):
        values = [pieces[r] for r in ranks]
        split, gather = (inner, plain) if back else (plain, inner)
        done = ls.all_gather(values, *inner) if move.to_dim is None else ls.all_to_all(values, *split, *gather)
        for rank, value in zip(ranks, done, strict=True):
            out[rank] = value
    return out


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_exposed_pieces_are_the_slices_dtensor_expects(spec):
    full = torch.arange(math.prod(spec.shape), dtype=torch.float64).reshape(spec.shape)
    original = pieces = [spec.shard(full, unravel(rank, spec.mesh)) for rank in range(math.prod(spec.mesh))]
    exposure = exposure_of(spec)
    for move in exposure.moves:
        pieces = moved(spec, move, pieces)
    for rank, piece in enumerate(pieces):
        expected = full
        for axis, dim in enumerate(exposure.dims):  # DTensor nests placements in the order of the mesh axes
            if dim is not None:
                expected = expected.chunk(spec.mesh[axis], dim)[unravel(rank, spec.mesh)[axis]]
        assert torch.equal(piece, expected), f"rank {rank} of {spec}: {exposure}"
    for move in reversed(exposure.moves):
        pieces = moved(spec, move, pieces, back=True)
    assert all(map(torch.equal, pieces, original))


def test_heads_inside_a_fused_weight_move_to_the_other_dim():
    spec = ShardSpec(shape=(8, 24), factors=((8,), (3, 4, 2)), axes=((1, 1),), mesh=(2,))
    exposure = exposure_of(spec)
    assert exposure.dims == (0,) and exposure.moves[0].to_dim == 0
    bias = ShardSpec(shape=(24,), factors=((3, 4, 2),), axes=((0, 1),), mesh=(2,))
    assert exposure_of(bias).dims == (None,)


# ---------------------------------------------------------------------------------------------------------- one device: files


def test_checkpoint_continues_exactly(tmp_path):
    executor = trained(2)
    executor.state.save(tmp_path / "c", alone(), extra={"num_steps": 2})
    (expected,) = executor.run({"x": batches()[2]})
    again = trained(0)
    assert again.state.load(tmp_path / "c", alone()) == {"num_steps": 2}
    (loss,) = again.run({"x": batches()[2]})
    assert torch.equal(loss, expected)
    for key, value in executor.state.tensors.items():
        assert torch.equal(again.state.tensors[key], value), key
    assert float(again.state.steps["w"]) == 3


def test_a_checkpoint_from_before_the_first_step_resets_the_counts(tmp_path):
    trained(0).state.save(tmp_path / "c", alone())
    executor = trained(2)
    executor.state.load(tmp_path / "c", alone())
    assert float(executor.state.steps["w"]) == 0 and not executor.state.tensors["state", "w", "exp_avg"].any()


def test_state_without_momentum_buffers_keeps_its_counts(tmp_path):
    executor = trained(2, kind="SGD")
    executor.state.save(tmp_path / "c", alone())
    again = trained(0, kind="SGD")
    again.state.load(tmp_path / "c", alone())
    assert float(again.state.steps["w"]) == 2
    assert torch.equal(again.state.tensors["state", "w", "momentum_buffer"], executor.state.tensors["state", "w", "momentum_buffer"])


def test_tied_unused_and_buffers_are_in_the_checkpoint(tmp_path):
    model = Tied()
    state = ProgramState.from_model(tied_program(), model, (0,))
    state.save(tmp_path / "c", alone())
    other = Tied()
    with torch.no_grad():
        other.unused.zero_()
    loaded = ProgramState.from_model(tied_program(), other, (0,))
    loaded.load(tmp_path / "c", alone())
    loaded.to_model(other, alone())
    assert set(state.state_dict(alone())["model"]) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_model_only_takes_another_optimizers_checkpoint(tmp_path):
    trained(2, kind="SGD").state.save(tmp_path / "c", alone())
    executor = trained(1)
    text = r"does not fit this model: it lacks 2 \('optimizer/w/exp_avg'.*unexpected 1 \('optimizer/w/mom"
    with pytest.raises(CheckpointError, match=text):
        executor.state.load(tmp_path / "c", alone())
    executor.state.load(tmp_path / "c", alone(), model_only=True)
    assert float(executor.state.steps["w"]) == 1


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c"
    executor = trained(1)
    executor.state.save(path, alone(), extra={"num_steps": 1})
    before = executor.state.tensors["param", "w", ""].clone()
    executor.run({"x": batches()[1]})

    def power_cut(*args, **kwargs):
        raise KeyboardInterrupt

    for name in ("_checksums", "_commit", "_body_crc"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, power_cut)
            with pytest.raises(KeyboardInterrupt):
                executor.state.save(path, alone())
        assert len(list(path.glob("data-*"))) > 1
        again = trained(0)
        assert again.state.load(path, alone()) == {"num_steps": 1}
        assert torch.equal(again.state.tensors["param", "w", ""], before)
    executor.state.save(path, alone())
    assert len(list(path.glob("data-*"))) == 1


def test_a_first_save_that_was_interrupted_is_no_checkpoint(tmp_path, monkeypatch):
    def power_cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_commit", power_cut)
    with pytest.raises(KeyboardInterrupt):
        trained(0).state.save(tmp_path / "c", alone())
    with pytest.raises(CheckpointError, match="holds no complete checkpoint: its save was interrupted"):
        trained(0).state.load(tmp_path / "c", alone())
    with pytest.raises(CheckpointError, match="holds no complete checkpoint: there is no such folder"):
        trained(0).state.load(tmp_path / "d", alone())


def test_damage_is_found_and_changes_nothing(tmp_path):
    path = tmp_path / "c"
    trained(2).state.save(path, alone())
    data = next(path.glob("data-*/*.distcp"))
    manifest = path / "manifest.json"
    good_data, good_manifest = data.read_bytes(), manifest.read_text()

    def refused(text):
        executor = trained(0)
        before = {key: value.clone() for key, value in executor.state.tensors.items()}
        with pytest.raises(CheckpointError, match=text):
            executor.state.load(path, alone())
        assert all(torch.equal(executor.state.tensors[key], value) for key, value in before.items())

    flipped = bytearray(good_data)
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    refused(r"is damaged: the content of __0_0.distcp has changed")
    data.write_bytes(good_data[:-10])
    refused(r"is damaged: __0_0.distcp has \d+ bytes, \d+ were written")
    data.unlink()
    refused(r"is damaged: __0_0.distcp is missing")
    data.write_bytes(good_data)
    manifest.write_text(good_manifest[:-20])
    refused(r"manifest.json is damaged .*; use another checkpoint")
    manifest.write_text(good_manifest.replace('"num_steps"', '"x"').replace("float32", "float64", 1))
    refused(r"manifest.json is damaged \(its checksum is wrong\)")
    manifest.write_text(json.dumps(json.loads(good_manifest) | {"version": 7}))
    refused(r"checkpoint of version 7; this opweave reads version 1")
    manifest.write_text(good_manifest)
    trained(0).state.load(path, alone())


def test_checkpoints_of_other_models(tmp_path):
    trained(0).state.save(tmp_path / "c", alone())
    state = ProgramState.from_model(tied_program(), Tied(), (0,))
    with pytest.raises(CheckpointError, match=r"lacks 4 \('model/embed.weight', 'model/mean'.*unexpected 3 \('model/w'"):
        state.load(tmp_path / "c", alone())
    state.save(tmp_path / "d", alone())
    wide = ProgramState.from_model(tied_program(width=9), Tied(width=9), (0,))
    with pytest.raises(CheckpointError, match=r"'model/embed.weight' is torch.float32 of shape \(4, 6\) in .* of shape \(4, 9\) here"):
        wide.load(tmp_path / "d", alone())


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is no checkpoint folder, it holds 1 \('thesis.tex'\)"):
        trained(0).state.save(tmp_path, alone())
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        trained(0).state.save(tmp_path / "thesis.tex", alone())
    with pytest.raises(CheckpointError, match="extra values must be JSON"):
        trained(0).state.save(tmp_path / "c", alone(), extra={"x": torch.ones(1)})


def test_safetensors_equal_the_plain_state_dict(tmp_path):
    model = Tied()
    state = ProgramState.from_model(tied_program(), model, (0,))
    state.export_safetensors(tmp_path / "m.safetensors", alone())
    got = load_file(tmp_path / "m.safetensors")
    assert got.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype
    other = ProgramState.from_model(tied_program(), Tied(), (0,))
    other.load_model(tmp_path / "m.safetensors")
    assert torch.equal(other.tensors["param", "embed.weight", ""], model.embed.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_plain_state_dicts_that_do_not_fit(tmp_path):
    state = ProgramState.from_model(tied_program(), Tied(), (0,))
    plain = dict(Tied().state_dict())
    state.load_model({name: value for name, value in plain.items() if name != "head.weight"})  # its twin is there
    before = state.tensors["param", "embed.weight", ""].clone()
    with pytest.raises(CheckpointError, match=r"the state dict does not fit this model: it lacks 1 \('mean'\)"):
        state.load_model({name: value for name, value in plain.items() if name != "mean"})
    with pytest.raises(CheckpointError, match=r"it has unexpected 1 \('bias'\)"):
        state.load_model(plain | {"bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'mean' is torch.float64 of shape \(6,\) in the state dict, torch.float32 of shape \(6,\)"):
        state.load_model(plain | {"mean": torch.ones(6, dtype=torch.float64)})
    file = tmp_path / "m.safetensors"
    save_file({name: value.clone() for name, value in plain.items()}, file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        state.load_model(file)
    with pytest.raises(CheckpointError, match="there is no file"):
        state.load_model(tmp_path / "none")
    assert torch.equal(state.tensors["param", "embed.weight", ""], before)


# ----------------------------------------------------------------------------------------------------------- from and to models


def test_state_of_a_trained_torch_optimizer_is_taken_over():
    model = Linear()
    optimizer = optimizer_of("AdamW", model.parameters())
    for x in batches()[:2]:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    state = ProgramState.from_model(linear_program(mesh=(1,)), model, (0,), optimizer=optimizer)
    assert torch.equal(state.tensors["state", "w", "exp_avg"], optimizer.state[model.w]["exp_avg"])
    assert float(state.steps["w"]) == 2


def test_sharing_trains_the_model_itself():
    model = Linear()
    state = ProgramState.from_model(linear_program(mesh=(1,)), model, (0,), share=True)
    assert state.tensors["param", "w", ""].data_ptr() == model.w.data_ptr()
    copied = ProgramState.from_model(linear_program(mesh=(1,)), model, (0,))
    assert copied.tensors["param", "w", ""].data_ptr() != model.w.data_ptr()


def test_a_released_model_gets_its_values_back():
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = ProgramState.from_model(tied_program(), model, (0,))
    state.release_model(model)
    assert model.embed.weight.numel() == 0
    state.to_model(model, alone())
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"the model has no param 'w', which the program needs"):
        ProgramState.from_model(linear_program(mesh=(1,)), Tied(), (0,))
    with pytest.raises(ValueError, match=r"param 'w' is torch.float32 of shape \(5, 5\) in the model; .* torch.float32 of shape \(4, 4\)"):
        ProgramState.from_model(linear_program(mesh=(1,)), Linear(width=5), (0,))
    state = ProgramState.from_model(tied_program(), Tied(), (0,))
    with pytest.raises(ValueError, match=r"the state has no param 'w'"):
        state.check(linear_program(mesh=(1,)))


# ------------------------------------------------------------------------------------------------------------------- real ranks


def test_checkpoints_move_between_plans_and_world_sizes(tmp_path):
    """Saved by one rank, loaded and trained by two under two plans, saved there, loaded by one."""
    executor = trained(1)
    executor.state.save(tmp_path / "one", alone(), extra={"num_steps": 1})
    assert "state ok" in launch("state_worker.py", str(tmp_path), num_ranks=2)
    for _ in range(1):
        executor.run({"x": batches()[1]})
    again = trained(0)
    assert again.state.load(tmp_path / "two", alone()) == {"num_steps": 2}
    for key, value in executor.state.tensors.items():
        assert torch.allclose(again.state.tensors[key], value, rtol=1e-5, atol=1e-7), key
    assert torch.allclose(load_file(tmp_path / "two.safetensors")["w"], again.state.tensors["param", "w", ""])
    assert (tmp_path / "tiers.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    parked = ProgramState.from_model(stored_on(linear_program(mesh=(1,)), "disk"), Linear(), (0,))
    assert parked.load(tmp_path / "two", alone()) == {"num_steps": 2}  # each tensor comes in two pieces
    assert torch.equal(parked.value(("param", "w", "")), again.state.tensors["param", "w", ""])


@pytest.mark.slow
def test_layouts_inside_a_dim_on_a_two_by_two_mesh(tmp_path):
    state = ProgramState.from_model(tied_program(width=12), Tied(width=12), (0,))
    with torch.no_grad():
        state.tensors["param", "embed.weight", ""].copy_(torch.arange(48.0).reshape(4, 12))
    state.save(tmp_path / "one", alone())
    assert "layouts ok" in launch("state_worker.py", str(tmp_path), "layouts", num_ranks=4)
    state.tensors["param", "embed.weight", ""].zero_()
    state.load(tmp_path / "four", alone())
    assert torch.equal(state.tensors["param", "embed.weight", ""], torch.arange(48.0).reshape(4, 12))
