"""One rank of test_torchrun: whole training steps through `ow.compile`, on as many ranks as the job has.

step_worker.py JOB FOLDER, where FOLDER is shared by all jobs of a test.
"""

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import opweave as ow
from opweave import zoo
from opweave.compiler.capture import default_loss
from opweave.runtime.groups import AgreementError, GroupError

TOLERANCE = 1e-5
# What a step adds to a weight depends on the sign of noise where a gradient is zero but for rounding; eps keeps that small.
EPS = 1e-3


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=EPS, fused=True)


def momentum(model):
    """For the ResNet: Adam divides by the gradient's size and so makes relative errors of the smallest gradients absolute ones."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)


def cluster(devices):
    return ow.Cluster.preset("cpu", devices=devices)


def plain(model, batch, steps, optimizer_of=adamw):
    """Losses of one process with eager PyTorch; the model is trained in place."""
    optimizer, losses = optimizer_of(model), []
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = default_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def values(model):
    return {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}


def worst(have, expected):
    """Largest difference over the largest magnitude, of all tensors."""
    assert have.keys() == expected.keys()
    return max(float((have[n] - expected[n]).abs().max()) / max(float(expected[n].abs().max()), 1e-3) for n in expected)


def check(what, losses, expected_losses, have, expected):
    of_losses = max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True))
    of_values = worst(have, expected)
    if dist.get_rank() == 0:
        print(f"{what}: losses {of_losses:.1e} parameters {of_values:.1e}", flush=True)
    assert of_losses <= TOLERANCE and of_values <= TOLERANCE, f"{what}: {of_losses} {of_values}"


def load(name):
    """A zoo model and a batch, another than the zoo's: with that one an input of a ReLU (in OPT and ResNet) lies within rounding of zero,
    and on which side decides up to 2 % of a bias. Eager PyTorch in float32 is that far from itself in float64, and 4e-6 with this one.
    """
    model, _ = zoo.load(name)
    torch.manual_seed(4)
    row = zoo.row(name)
    return model, row.make_batch(row, model, row.batch)


def parity(folder, name, steps, load_from=None, save=None, **options):
    """Train beside the plain model; optionally from a checkpoint of another job, and for one."""
    model, batch = load(name)
    reference = copy.deepcopy(model)
    optimizer_of = momentum if name == "resnet-tiny" else adamw
    step = ow.compile(model, optimizer=optimizer_of(model), **options)
    first = 0
    if load_from is not None:
        step.load(folder / load_from)
        step.prepare(batch)
        first = step.num_steps
    losses = [float(step(batch)) for _ in range(steps)]
    expected_losses = plain(reference, batch, first + steps, optimizer_of)[first:]
    check(f"{name} {options.get('force')}", losses, expected_losses, values(step.to_model()), values(reference))
    if save is not None:
        step.save(folder / save)
        step.export_safetensors(folder / f"{save}.safetensors")
        exported = load_file(folder / f"{save}.safetensors")
        plain_state = model.state_dict()
        assert exported.keys() == plain_state.keys()
        assert all(torch.equal(exported[n], plain_state[n]) and exported[n].dtype == plain_state[n].dtype for n in plain_state)
    return step


def refused(kind, text, run):
    """All ranks get the error; none is left waiting."""
    try:
        run()
    except kind as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")
    print(f"refused: {text}", flush=True)
    dist.barrier()


def train_on(model, batch, devices, **options):
    ow.compile(model, cluster(devices), optimizer=adamw(model), **options)(batch)


def two(folder):
    """Two ranks: parity, errors, and a checkpoint for four."""
    step = parity(folder, "opt-tiny", 2, save="two", cluster=cluster(2), force="zero3")
    assert any(not torch.equal(t, step.state.full(k, step.executor.groups)) for k, t in step.state.tensors.items() if t.dim()), "not split"
    parity(folder, "opt-tiny", 3)  # this job as its own cluster, the solver's plan
    parity(folder, "resnet-tiny", 3, cluster=cluster(2), force="ddp")
    parity(folder, "mixtral-tiny", 3, cluster=cluster(2), force="megatron")

    mlp, batch = load("mlp-tiny")
    refused(GroupError, "the mesh 4 needs 4 ranks, but this job has 2", lambda: train_on(mlp, batch, 4, mesh=(4,)))
    other = torch.nn.Sequential(torch.nn.Linear(64, 64 if dist.get_rank() else 32))

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    refused(AgreementError, "the ranks of this job do not run the same program", lambda: train_on(other, batch, 2, loss_fn=loss_fn))
    plan = ow.plan(mlp, cluster(2), batch, optimizer=adamw(mlp), force="ddp" if dist.get_rank() else "zero3")
    refused(AgreementError, "plan differs (rank 0:", lambda: train_on(mlp, batch, 2, plan=plan))
    # Another seed would be another dropout mask on every rank.
    refused(AgreementError, "options differs (rank 0:", lambda: train_on(mlp, batch, 2, seed=dist.get_rank()))
    not_finite(mlp, batch)


def not_finite(model, batch):
    """A NaN in the rows of one rank only: all ranks refuse, and all go on as before."""
    step = ow.compile(model, cluster(2), optimizer=adamw(model), force="ddp")
    step(batch)
    bad = batch | {"x": batch["x"].clone()}
    bad["x"][-1] = float("nan")
    before = {key: t.clone() for key, t in step.state.tensors.items()}
    refused(ArithmeticError, "parameters and optimizer state are as before this step", lambda: step(bad))
    assert all(torch.equal(t, before[key]) for key, t in step.state.tensors.items())
    assert float(step(batch)) > 0


def four(folder):
    """Four ranks: parity on other meshes, and what two ranks saved goes on under another plan."""
    parity(folder, "opt-tiny", 2, load_from="two", save="four", cluster=cluster(4), mesh=(2, 2), force="zero3+megatron")
    parity(folder, "resnet-tiny", 3, cluster=cluster(4), force="zero3")
    parity(folder, "mixtral-tiny", 3, cluster=cluster(4), mesh=(2, 2), force="megatron_sp")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    {"two": two, "four": four}[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()
    print(f"{sys.argv[1]} ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
