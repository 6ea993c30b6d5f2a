"""What cannot be captured is refused with its place and the way out."""

import pytest
import torch
import torch.nn.functional as F
from capturing import model_of, x_of
from torch import nn

from opweave.compiler.capture import capture
from opweave.compiler.capture_errors import CaptureError

HERE = r"test_capture_errors.py:\d+"


def _numpy(m, x):
    return torch.from_numpy(m.lin(x).detach().numpy()).sum()


def _changes_weights(m, x):
    m.lin.weight.data.mul_(2)
    return m.lin(x).sum()


def _writes_to_expanded(m, x):
    x[:1].expand(8, 16).add_(1)
    return m.lin(x).sum()


ERRORS = {
    "item": (lambda m, x: m.lin(x).sum() * x.sum().item(), rf"in the model at {HERE}: a Python value is taken from a tensor"),
    "branch": (lambda m, x: m.lin(x).sum() if (x > 0).all() else x.sum(), rf"{HERE}: a Python value .*torch.where"),
    "boolean index": (lambda m, x: m.lin(x)[x > 0].sum(), r"the result of index has a shape that depends on data .* masked_fill"),
    "nonzero": (lambda m, x: m.lin(x).sum() * x.nonzero().sum(), r"the result of nonzero has a shape that depends on data"),
    "numpy": (_numpy, rf"{HERE}: .*replace the numpy conversion by torch ops"),
    "shuffle": (lambda m, x: m.lin(x)[torch.randperm(8)].sum(), r"randperm draws random numbers .* pass them in the batch"),
    "resize": (lambda m, x: m.lin(x.clone().resize_(8, 16)).sum(), r"resize_ changes a tensor in place .* make a new tensor"),
    "expanded write": (_writes_to_expanded, r"an in-place write to a view made by expand cannot be captured; .*clone"),
    "reference": (lambda m, x: (m.lin(x) @ m.kept[0]).sum(), r"lin.weight is used through a reference that bypasses its module"),
    "weights": (_changes_weights, r"parameter lin.weight is changed in place during the forward pass"),
    "detached": (lambda m, x: m.lin(x).detach().sum(), r"the loss does not depend on any parameter that requires a gradient"),
    "shape": (lambda m, x: m.lin(x), r"the loss has the shape \(8, 16\); it must be a scalar"),
    "integer": (lambda m, x: m.lin(x).argmax(), r"the loss has the type torch.int64"),
    "nothing": (lambda m, x: None, r"no loss in what Model returned \(NoneType\); pass `loss_fn="),
    "bad shapes": (lambda m, x: (m.lin(x) @ torch.ones(3, 3)).sum(), rf"in the model at {HERE}: RuntimeError: .*reduction dim"),
    "sparse embedding": (
        lambda m, x: F.embedding(x.long(), m.lin.weight, sparse=True).sum(),
        r"an embedding with sparse=True cannot be captured; leave it at False",
    ),
    "submodule": (lambda m, x: m.sub(m.lin(x)), r"in sub at "),
    "big constant": (lambda m, x: (m.lin(x).sum() * m.table).sum(), r"of 70000 elements .* `register_buffer`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_captured(name):
    function, text = ERRORS[name]
    modules = {"sub": nn.BatchNorm1d(16, momentum=None), "table": torch.randn(70_000)}
    with pytest.raises(CaptureError, match=text):
        model = model_of(function, **modules)
        model.kept = [model.lin.weight]
        capture(model, x_of())


def test_autocast_of_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # as on a machine that has one
    with pytest.raises(CaptureError, match=r'Model is called under torch.autocast\("cuda"\), .*pass `autocast=`'):
        capture(model_of(lambda m, x: m.lin(x).sum()), x_of())


def test_bad_models_batches_and_optimizers():
    model, x = model_of(lambda m, x: m.lin(x).sum()), x_of()
    with pytest.raises(CaptureError, match="has no parameter that requires a gradient"):
        capture(nn.ReLU(), x)
    with pytest.raises(CaptureError, match="wrapped in DataParallel; give the plain module inside"):
        capture(nn.DataParallel(model), x)
    with pytest.raises(CaptureError, match="wrapped in OptimizedModule"):
        capture(torch.compile(model), x)
    with pytest.raises(CaptureError, match=r"give a torch.nn.Module"):
        capture(lambda x: x, x)
    with pytest.raises(CaptureError, match=r"no tensor in the batch \(a dict\)"):
        capture(model, {"a": 3})
    with pytest.raises(CaptureError, match=r"capture failed in lin at .*: addmm gets float32 and float64 tensors; cast the batch"):
        capture(model, x.double())
    with pytest.raises(CaptureError, match=r"batch 0 has the layout torch.sparse_coo"):
        capture(model, (x.to_sparse(),))
    with pytest.raises(ValueError, match=r"optimizer torch.optim.rmsprop.RMSprop is not supported; supported: SGD, Adam, AdamW"):
        capture(model, x, optimizer=torch.optim.RMSprop(model.parameters()))
    with pytest.raises(ValueError, match=r"parameter group 0 of SGD holds a tensor of shape \(3,\) that is no parameter of the model"):
        capture(model, x, optimizer=torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1))
    with pytest.raises(ValueError, match="differentiable=True"):
        capture(model, x, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))
