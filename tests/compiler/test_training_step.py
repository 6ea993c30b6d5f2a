"""The compiled step as users meet it, in one process: options, extras, state, checkpoints, and the way back to the plain model."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import opweave as ow
from opweave import zoo


class Tied(nn.Module):
    """Tied weights, a buffer that counts, a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, ids, labels):
        self.count += 1
        return F.cross_entropy(self.out(torch.tanh(self.embed(ids))).flatten(0, 1), labels.flatten())


def tokens():
    return {"ids": torch.randint(0, 16, (4, 6)), "labels": torch.randint(0, 16, (4, 6))}


def compiled(model, **options):
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return ow.compile(model, ow.Cluster.preset("cpu", devices=1), optimizer=optimizer, **options)


def test_the_loss_falls():
    model, batch = zoo.load("gpt2-tiny")
    step = compiled(model)
    losses = [float(step(batch)) for _ in range(8)]
    assert losses[-1] < losses[0] - 1 and step.num_steps == 8


def test_prepare_does_not_run():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    step = compiled(model).prepare(tokens())
    assert step.num_steps == 0 and step.plan.mesh == (1,)
    assert all(torch.equal(value, before[name]) for name, value in step.to_model().state_dict().items())


def test_extras_come_back_in_the_users_structure():
    def loss_fn(model, batch):
        loss = model(**batch)
        return loss, {"twice": loss * 2, "name": "tied"}, [batch["ids"].float().mean()]

    data = tokens()
    step = compiled(Tied(), loss_fn=loss_fn)
    loss = step(data)
    named, listed = step.extras
    assert named["name"] == "tied" and float(named["twice"]) == pytest.approx(2 * float(loss))
    assert float(listed[0]) == pytest.approx(float(data["ids"].float().mean()))


def test_the_plain_model_comes_back():
    """Tied weights stay tied, buffers move, what is not used stays; the exported file is the plain state dict."""
    model = Tied()
    start = copy.deepcopy(model.state_dict())
    step = compiled(model)
    for _ in range(3):
        step(tokens())
    back = step.to_model()
    assert back is model and back.out.weight is back.embed.weight
    assert float(back.count) == 3
    assert torch.equal(back.unused, start["unused"])
    assert not torch.equal(back.embed.weight, start["embed.weight"])


def test_export_is_the_plain_state_dict(tmp_path):
    model = Tied()
    step = compiled(model)
    step(tokens())
    step.export_safetensors(tmp_path / "model.safetensors")
    exported, plain = load_file(tmp_path / "model.safetensors"), step.to_model().state_dict()
    assert exported.keys() == plain.keys()
    assert all(torch.equal(exported[name], plain[name]) and exported[name].dtype == plain[name].dtype for name in plain)
    fresh = Tied()
    fresh.load_state_dict(exported)
    assert torch.equal(fresh.embed.weight, model.embed.weight)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    """Parameters, optimizer state, step counts, buffers: 2 + 2 steps are 4 steps. Loading works before the first batch and after."""
    torch.manual_seed(0)
    model, batches = Tied(), [tokens() for _ in range(4)]
    through, resumed, other = copy.deepcopy(model), copy.deepcopy(model), Tied()
    whole = compiled(through)
    expected = [float(whole(b)) for b in batches]
    first = compiled(resumed)
    for b in batches[:2]:
        first(b)
    first.save(tmp_path / "saved")
    for prepared in (False, True):
        step = compiled(other)
        if prepared:
            step.prepare(batches[0])
        step.load(tmp_path / "saved")
        assert [float(step(b)) for b in batches[2:]] == expected[2:]
        assert step.num_steps == 4
        assert all(torch.equal(t, whole.state.tensors[key]) for key, t in step.state.tensors.items())


def test_dropout_follows_seed_and_step():
    """The same seed gives the same masks, another seed or step others; the global random state has no part in it."""

    class Dropping(Tied):
        def forward(self, ids, labels):
            return F.cross_entropy(self.out(F.dropout(self.embed(ids), 0.5)).flatten(0, 1), labels.flatten())

    model, batch = Dropping(), tokens()

    def losses(seed):
        made = copy.deepcopy(model)
        step = compiled(made, optimizer=torch.optim.SGD(made.parameters(), lr=0.0), seed=seed)
        torch.manual_seed(seed + 17)
        return [float(step(batch)) for _ in range(3)]

    first = losses(0)
    assert losses(0) == first and losses(1) != first
    assert len(set(first)) == 3, "with a learning rate of zero only the masks differ from step to step"


def test_an_optimizer_that_has_trained_goes_on():
    """Momentum and step counts the user's optimizer already has are taken over."""
    torch.manual_seed(0)
    model, batch = Tied(), tokens()
    plain = copy.deepcopy(model)
    made = [torch.optim.AdamW([p for p in m.parameters() if p is not m.unused], lr=1e-2, fused=True) for m in (model, plain)]
    for m, optimizer in zip((model, plain), made, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            m(**batch).backward()
            optimizer.step()
    step = compiled(model, optimizer=made[0])
    step(batch)
    made[1].zero_grad()
    plain(**batch).backward()
    made[1].step()
    assert torch.equal(step.to_model().embed.weight, plain.embed.weight)


def test_clipping_and_autocast_are_options_of_compile():
    model, batch = zoo.load("mlp-tiny")
    plain, clipped, half = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)

    def second_loss(model, **options):
        step = compiled(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), **options)
        step(batch)
        return float(step(batch))

    base = second_loss(plain)
    assert second_loss(clipped, clip_grad_norm=1e-3) > base + 1e-3
    in_half = second_loss(half, autocast=torch.bfloat16)
    assert in_half != base and in_half == pytest.approx(base, rel=2**-7)


def test_a_plan_made_elsewhere_runs_without_a_solver(tmp_path):
    """On the machine that trains, neither ortools nor numba need be there."""
    script = """
import sys, torch
for name in ("ortools", "numba"):
    sys.modules[name] = None
import opweave as ow
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
step = ow.compile(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, x: m(x).square().mean(), plan=sys.argv[1])
print(float(step(torch.ones(4, 8))))
"""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    loss_fn = lambda m, x: m(x).square().mean()  # noqa: E731
    plan = ow.plan(model, "cpu:1", torch.ones(4, 8), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn)
    plan.save(tmp_path / "plan.json")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "plan.json")], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(loss_fn(model, torch.ones(4, 8))))
