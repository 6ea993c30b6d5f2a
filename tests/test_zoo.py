"""The zoo: every model by name, tiny ones with weights, large ones as shapes, and models of the user's own."""

import math
import sys
import types

import pytest
import torch
from torch import nn

from opweave import zoo

TINY = [name for name in zoo.names() if name.endswith("-tiny")]


def test_names_cover_what_is_promised():
    promised = (
        "opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b opt-13b opt-30b opt-66b opt-175b gpt2 gpt2-medium gpt2-large gpt2-xl "
        "llama-7b llama-8b llama-70b bert-large t5-3b bart-large vit-h resnet-50 mobilenet-v2 mixtral-8x7b qwen3-30b-a3b mamba-1.4b "
        "unet3d mlp convnet gnn"
    )
    assert set(promised.split()) <= set(zoo.names())
    families = {row["family"] for row in zoo.describe()}
    assert {f"{family}-tiny" for family in families} == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_are_seeded_and_leave_the_random_state(name):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    model, batch = zoo.load(name)
    again, same = zoo.load(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(batch[k], same[k]) for k in batch)
    assert model.training and all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("row", zoo.ROWS, ids=lambda r: r.name)
def test_rows_are_complete_and_sourced(row):
    assert row.source and row.num_parameters > 0 and math.prod(row.batch) > 0


@pytest.mark.parametrize("name", [*TINY, "opt-125m", "gpt2", "bert-large", "resnet-50", "mobilenet-v2", "unet3d", "mlp", "convnet", "gnn"])
def test_parameter_counts_are_right(name):
    assert sum(p.numel() for p in zoo.build(name).parameters()) == zoo.row(name).num_parameters


def test_large_models_are_shapes_only():
    model, batch = zoo.load("gpt2", (4, 256))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert batch["input_ids"].shape == (4, 256) and batch["input_ids"].device.type == "meta"


def test_batch_size_of_images_and_graphs():
    assert zoo.load("resnet-tiny", (2, 64))[1]["pixel_values"].shape == (2, 3, 64, 64)
    assert zoo.load("gnn-tiny", (2, 10))[1]["nodes"].shape[0] == 20
    with pytest.raises(ValueError, match=r"batch \(0, 4\) is not \(batch size, sequence length or image side\)"):
        zoo.load("opt-tiny", (0, 4))


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(zoo.UnknownModelError, match=r"no model 'opt-99b' in the zoo; there are opt-125m, .*package.module:function"):
        zoo.load("opt-99b")


def test_missing_transformers_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert zoo.build("mlp-tiny") is not None
    with pytest.raises(ImportError, match=r"opt-tiny needs transformers; install it with `pip install 'opweave\[models\]'`"):
        zoo.build("opt-tiny")


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("users_models")
    monkeypatch.setitem(sys.modules, "users_models", module)
    return module


def test_models_of_the_user(user_module):
    user_module.plain = lambda: (nn.Linear(2, 2), torch.ones(3, 2))
    user_module.sized = lambda batch: (nn.Linear(2, 2), torch.ones(batch))
    user_module.wrong = lambda: nn.Linear(2, 2)
    assert zoo.resolve("users_models:plain")[1].shape == (3, 2)
    assert zoo.resolve("users_models:sized", (5, 2))[1].shape == (5, 2)
    assert zoo.resolve("mlp-tiny", (4, 64))[1]["x"].shape[0] == 4
    with pytest.raises(ValueError, match="'users_models:wrong' returned a Linear; it must return"):
        zoo.resolve("users_models:wrong")
    with pytest.raises(zoo.UnknownModelError, match="users_models has no function 'gone'"):
        zoo.resolve("users_models:gone")
    with pytest.raises(zoo.UnknownModelError, match="cannot import 'no_such_module'"):
        zoo.resolve("no_such_module:f")
