"""The update equals torch.optim with fused kernels, bit for bit."""

import pytest
import torch

from opweave.runtime.update import Updater, fused_update, state_slots

CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.1}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"lr": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.1}),
    ("AdamW", {"lr": torch.tensor(0.1), "weight_decay": 0.1, "maximize": True, "amsgrad": True}),
]
SHAPES = [(5, 7), (33,), (), (3, 4, 5)]


def values(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


class Ours:
    """Parameters updated by `Updater`, as the executor does it."""

    def __init__(self, kind, optimizer, params):
        self.kind, self.optimizer = kind, optimizer
        self.params = [p.detach().clone() for p in params]
        slots = state_slots(kind, optimizer.param_groups[0])
        self.states = [[torch.zeros_like(p) for _ in slots] for p in self.params]
        self.steps: dict[str, torch.Tensor] = {}

    def step(self, grads):
        updater = Updater(self.steps, self.optimizer, self.kind)
        new = updater.fused_update(self.params, grads, self.states, self.kind, 0, [str(i) for i in range(len(grads))])
        count = len(self.params)
        self.params, rest = new[:count], iter(new[count:])
        self.states = [[next(rest) for _ in slots] for slots in self.states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_bit_equal_to_torch(kind, options, dtype):
    params = [torch.nn.Parameter(v) for v in values(dtype, 0)]
    wrong_in_torch = kind == "SGD" and dtype == torch.bfloat16  # pytorch issue 191763
    mode = {"foreach": False} if wrong_in_torch else {"fused": True}
    optimizer = getattr(torch.optim, kind)(params, **mode, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    ours = Ours(kind, optimizer, params)
    for i in range(4):
        grads = values(dtype, i + 1)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        ours.step(grads)  # reads the learning rate before the schedule moves it
        optimizer.step()
        schedule.step()
        for mine, theirs in zip(ours.params, params, strict=True):
            assert torch.equal(mine, theirs), f"step {i}: {(mine - theirs).abs().max()}"
    for i, p in enumerate(params):
        for slot, mine in zip(state_slots(kind, optimizer.param_groups[0]), ours.states[i], strict=True):
            assert torch.equal(mine, optimizer.state[p][slot]), slot
        assert int(ours.steps[str(i)]) == 4


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_memory_layouts_do_not_matter(kind):
    """Gradients arrive transposed, parameters as strided pieces: kernels must not read them in the wrong order."""
    options = {"lr": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {})
    full = torch.randn(6, 8)
    plain = torch.nn.Parameter(full[:, 2:5].contiguous())
    optimizer = getattr(torch.optim, kind)([plain], fused=True, **options)
    ours = Ours(kind, optimizer, [plain])
    ours.params = [full[:, 2:5]]
    for i in range(3):
        grad = torch.randn(3, 6, generator=torch.Generator().manual_seed(i)).t()
        plain.grad = grad.contiguous()
        ours.step([grad])
        optimizer.step()
        assert torch.equal(ours.params[0], plain)


def test_a_dense_parameter_is_updated_in_place():
    param = torch.randn(4, 4).t()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(param)], fused=True)
    ours = Ours("AdamW", optimizer, [param])
    before = ours.params[0] = param
    ours.step([torch.randn(4, 4)])
    assert ours.params[0] is before


def test_mixed_dtypes_in_one_group():
    params = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4, dtype=torch.float64))]
    optimizer = torch.optim.AdamW(params, fused=True)
    ours = Ours("AdamW", optimizer, params)
    grads = [torch.ones_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    ours.step(grads)
    optimizer.step()
    assert all(map(torch.equal, ours.params, params))


def test_mistakes():
    with pytest.raises(ValueError, match=r"no fused update for the optimizer 'Adagrad'; there are \['Adam', 'AdamW', 'SGD'\]"):
        state_slots("Adagrad", {})
    updater = Updater({}, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "SGD")
    with pytest.raises(ValueError, match="updates parameter group 1, the optimizer has 1"):
        updater.fused_update([], [], [], "SGD", 1, [])
    with pytest.raises(RuntimeError, match="called outside an executor"):
        fused_update([], [], [], "SGD", 0, [])
