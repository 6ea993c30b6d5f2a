"""Gradient accumulation on one device: a step of several micro-batches has the bits of the usual loop, in the models' own dtype; and what
cannot be cut.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accumulating import ONE, STEPS, Deep, Dropped, adamw, eager_loop, load
from torch import nn

import opweave as ow
from opweave.compiler.capture import default_loss
from opweave.compiler.micro_batches import check_batch, micro_batch
from opweave.compiler.plan import Plan, PlanError
from opweave.compiler.training_step import NonFiniteLossError, step_inputs

# -- one device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("name", ["mlp-tiny", "tied", "resnet-tiny", "shifting"])
def test_one_device_is_the_loop_bit_for_bit(name, num):
    model, batch = load(name)
    if next(iter(batch.values())).shape[0] % num:
        pytest.skip(f"the batch of {name} is not divisible by {num}")
    losses, expected = eager_loop(copy.deepcopy(model), batch, num)
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=num)
    assert [float(step(batch)) for _ in range(STEPS)] == losses
    step.to_model()
    assert [n for n, value in model.state_dict().items() if not torch.equal(value, expected[n])] == []
    assert step.executor.memory.peak_bytes == step.plan.predicted["peak_bytes"]["device"]


def test_gradients_without_an_optimizer_are_means():
    model, batch = load("tied")
    step = ow.compile(copy.deepcopy(model), ONE, accumulate=2).prepare(batch)
    outputs = step.executor.run(step_inputs(step.analysis, batch, 0, 0))
    for i in range(2):
        (default_loss(model, micro_batch(batch, 2, i)) / 2).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    fqns = [o.fqn for o in step.analysis.step.outputs if o.kind == "grad"]
    values = [v for v, o in zip(outputs, (o for o in step.analysis.step.outputs if o.kind != "buffer"), strict=True) if o.kind == "grad"]
    assert fqns and all(torch.equal(grads[fqn], value) for fqn, value in zip(fqns, values, strict=True))


def test_a_batch_is_never_written():
    """The gradient of `scale` is the batch itself: its sum must not begin in the user's memory."""
    model, batch = load("tied")
    before = {name: t.clone() for name, t in batch.items()}
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=4)
    step(batch)
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_one_bad_micro_batch_changes_no_parameter():
    model, batch = load("tied")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch["weights"][5] = math.nan
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=4)
    with pytest.raises(NonFiniteLossError, match="the loss of step 1 is nan"):
        step(batch)
    step.to_model()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_autocast():
    torch.manual_seed(0)
    model, batch = Deep(), torch.randn(8, 16)
    reference = copy.deepcopy(model)
    losses = []
    for part in batch.split(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(reference(part) / 2)
        losses[-1].backward()
    step = ow.compile(model, ONE, loss_fn=lambda m, b: m(b), autocast=torch.bfloat16, accumulate=2).prepare(batch)
    loss, *grads = step.executor.run(step_inputs(step.analysis, batch, 0, 0))
    assert torch.equal(loss, losses[0] + losses[1])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(reference.parameters(), grads, strict=True))


def test_dropout_differs_between_micro_batches_and_steps():
    torch.manual_seed(0)
    model = Dropped()
    batch = torch.randn(4, 32).repeat(2, 1)  # both halves are alike
    step = ow.compile(model, ONE, loss_fn=lambda m, b: m(b), optimizer=torch.optim.SGD(model.parameters(), lr=0.0), accumulate=2)
    losses = [float(step(batch)) for _ in range(3)]
    half = ow.compile(model, ONE, loss_fn=lambda m, b: m(b), optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    parts = [float(half(batch[:4])) for _ in range(6)]  # the same random numbers, one by one
    assert len(set(losses)) == 3 and len(set(parts)) == 6
    assert losses == pytest.approx([(parts[i] + parts[i + 1]) / 2 for i in (0, 2, 4)], rel=1e-6)


def test_extras_are_those_of_the_last_micro_batch():
    model = nn.Linear(8, 4)
    batch = torch.randn(8, 8)
    step = ow.compile(model, ONE, loss_fn=lambda m, b: (m(b).square().mean(), {"first": b[0, 0]}), accumulate=4)
    step(batch)
    assert step.extras[0]["first"] == batch[6, 0]


def test_an_extra_is_a_buffer_as_the_last_micro_batch_found_it():
    model, batch = load("shifting")

    def loss_of(model, batch):
        found = model.last
        return model(batch["x"]), found

    step = ow.compile(model, ONE, loss_fn=loss_of, accumulate=4)
    step(batch)
    assert torch.equal(step.extras[0], batch["x"][4:6].mean(0))


def test_a_plan_knows_its_micro_batches(tmp_path):
    model, batch = load("mlp-tiny")
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=2).prepare(batch)
    step.plan.save(tmp_path / "plan.json")
    again = ow.compile(model, ONE, optimizer=adamw(model), plan=tmp_path / "plan.json").prepare(batch)
    assert again.program.num_micro_batches == 2 and Plan.load(tmp_path / "plan.json").accumulate == 2
    with pytest.raises(PlanError, match="the plan was made for accumulate=2, this step has accumulate=4"):
        ow.compile(model, ONE, optimizer=adamw(model), plan=tmp_path / "plan.json", accumulate=4).prepare(batch)


# -- what cannot be cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, -1, 2.0, "2", True])
def test_no_number_of_micro_batches(num):
    model, batch = load("mlp-tiny")
    with pytest.raises(ValueError, match=r"accumulate is .*; give the number of micro-batches of a step, a whole number from 1"):
        ow.plan(model, ONE, batch, accumulate=num)


def test_batches_that_cannot_be_cut():
    with pytest.raises(ValueError, match="accumulate=4 does not cut the batch of 6 samples into equal parts; 1, 2, 3, 6 would"):
        check_batch({"x": torch.ones(6, 2)}, 4)
    with pytest.raises(ValueError, match=r"'x' has 8 there and 'mask' has 3. Give what all samples share a first dim of 1"):
        check_batch({"x": torch.ones(8, 3), "mask": torch.ones(3, 3)}, 2)
    with pytest.raises(ValueError, match="no tensor of the batch has a first dim above 1"):
        check_batch({"x": torch.ones(1, 3), "scale": torch.tensor(2.0)}, 2)


def test_micro_batches_too_small_for_a_forced_plan():
    model, batch = load("mlp-tiny")
    with pytest.raises(ValueError, match=r"splits each of 8 micro-batches over 2 devices, but its size 1 .* give a batch of 16"):
        ow.plan(model, "cpu:2", batch, force="ddp", mesh=(2,), accumulate=8)


def test_what_all_samples_share_is_not_cut():
    batch = {"x": torch.ones(8, 3), "mask": torch.ones(1, 3, 3), "scale": torch.tensor(2.0), "name": "shared"}
    check_batch(batch, 4)
    part = micro_batch(batch, 4, 3)
    assert part["x"].shape == (2, 3) and part["mask"] is batch["mask"] and part["scale"] is batch["scale"] and part["name"] == "shared"
    assert part["x"].data_ptr() == batch["x"][6:].data_ptr()


def test_a_later_batch_of_another_size_is_refused():
    model, batch = load("mlp-tiny")
    step = ow.compile(model, ONE, optimizer=adamw(model), accumulate=2)
    step(batch)
    size = batch["x"].shape[0] if "x" in batch else next(iter(batch.values())).shape[0]
    with pytest.raises(ValueError, match="does not cut the batch"):
        step({name: t[: size - 1] for name, t in batch.items()})
