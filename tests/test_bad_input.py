"""Bad input: each kind is a clear error that says what, the values, what is valid and the way out; nothing hangs and nothing is lost.

The kinds, by where they come from:

 batch        1 size not divisible by the devices of a forced plan  2 other dtype than the model  3 other dtype than compiled
              4 other shape than compiled  5 other structure  6 missing tensor  7 a list in place of a tensor  8 no labels
              9 no tensor at all  10 on the meta device  77 without rows
 values      11 NaN in the batch (parameters, optimizer state and step counts stay)  12 infinite loss  13 label out of range
 model       14 on the meta device  15 frozen  16 no module  17 branches on data  18 parameter changed in place  19 sparse buffer
             20 forward pass raises  21 unknown zoo name  22 module path that cannot be imported
 loss        23 not a scalar  24 nothing  25 a Python number  26 detached
 optimizer   27 of another model  28 not supported  29 no optimizer at all but a string  30 momentum switched on after compiling
             31 parameter groups removed after compiling
 options     32 unknown forced plan  33 forced plan with more parts than axes  34 mesh of another size  35 mesh that is none
             36 memory limit absurd  37 clip_grad_norm absurd  38 autocast to a type that is none  39 steps=0
 cluster     40 unknown name  41 missing file  42 no JSON  43 missing value  44 unknown value  45 value in another unit  46 negative value
             47 no cluster  48 CUDA devices this machine lacks  49 more devices than processes  50 model too big for it
 plan        51 cut off  52 no plan  53 other version  54 damaged entry  55 unknown entry  56 decision missing  57 impossible decision
             58 of another model  59 of another cluster  60 for another mesh
 pattern     61 bad grammar  62 bad op name  63 unknown reduction  64 operand that does not exist  65 flag without local form
             66 does not fit its op
 checkpoint  67 missing  68 corrupted  69 of another model  70 folder of something else  71 a file  72 save interrupted by an error
             73 save killed  74 safetensors of another model  75 safetensors cut off  76 used before there is a state

Ranks that differ, and a job of another size than the plan, need several processes: `test_torchrun.py`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opweave as ow
from opweave import zoo
from opweave.runtime import checkpoint

MESH_TEXT = "give devices per axis as a tuple of positive whole numbers, e.g. (2,) or (2, 4)"
LOSS_TEXT = "pass `loss_fn=lambda model, batch: ...` that returns a scalar loss"
VALUE_TEXT = "a captured step runs the same ops for every batch. Compute with tensors instead (torch.where)"


class Classifier(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x, y):
        return F.cross_entropy(self.b(torch.relu(self.a(x))), y)


class Branching(Classifier):
    def forward(self, x, y):
        return super().forward(x * 2 if x.sum() > 0 else x, y)


class ChangesItself(Classifier):
    def forward(self, x, y):
        with torch.no_grad():
            self.a.weight.mul_(0.9)
        return super().forward(x, y)


class WithSparse(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.eye(3).to_sparse())


def batch(size=8):
    return {"x": torch.randn(size, 8), "y": torch.randint(0, 4, (size,))}


def changed(**values):
    return batch() | values


def cpus(devices=1):
    return ow.Cluster.preset("cpu", devices=devices)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def compiled(model=None, cluster=None, *, optimizer=sgd, **options):
    model = model or Classifier()
    return ow.compile(model, cluster or cpus(), optimizer=optimizer(model), **options)


def started(**options):
    """A step that has run once."""
    step = compiled(**options)
    step(batch())
    return step


def planned(model=None, cluster=None, data=None, **options):
    model = model or Classifier()
    return ow.plan(model, cluster or cpus(2), data or batch(), optimizer=sgd(model), **options)


def edited(tmp_path, change, cluster=None):
    """A plan file after `change` has had its way with the JSON; loaded."""
    data = planned(cluster=cluster or cpus()).to_dict()
    change(data)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    return ow.Plan.load(file)


def cluster_file(tmp_path, change):
    data = cpus(2).to_dict()
    change(data)
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps(data))
    return str(file)


def on_meta():
    with torch.device("meta"):
        return Classifier()


def momentum_later():
    step = started()
    step.options.optimizer.param_groups[0]["momentum"] = 0.9
    step(batch())


def groups_removed():
    step = started()
    step.options.optimizer.param_groups.clear()
    step(batch())


def misfit():
    ow.pattern("aten::relu", "m -> m")
    planned()


# name: (what goes wrong, the error, every piece of text that must be in it)
CASES = {
    # batch
    "not divisible": (lambda t: planned(data=batch(7), force="ddp"), ValueError,
        ["'ddp' splits the batch over 2 devices", "its size 7 is not divisible by 2", "give a batch of 8", "let the solver choose"]),
    "wrong dtype": (lambda t: compiled()(changed(x=torch.randn(8, 8).double())), ValueError,
        ["capture failed in a at test_bad_input.py:", "float32 and float64", "cast the batch"]),
    "other dtype": (lambda t: started()(changed(x=torch.randn(8, 8).double())), ValueError,
        ["'x' is torch.float64", "made for torch.float32", "compile it again"]),
    "other shape": (lambda t: started()(batch(4)), ValueError,
        ["'x'", "shape (4, 8)", "where (8, 8) is expected", "drop_last=True", "compile another step"]),
    "other structure": (lambda t: started()((batch()["x"], batch()["y"])), ValueError,
        ["tensors ['0', '1']", "had ['x', 'y']", "one structure"]),
    "missing tensor": (lambda t: started()({"x": batch()["x"]}), ValueError, ["tensors ['x']", "had ['x', 'y']"]),
    "list for a tensor": (lambda t: started()(changed(x=batch()["x"].tolist())), ValueError, ["tensors ['y']", "had ['x', 'y']"]),
    "no labels": (lambda t: no_labels(), ValueError, ["no loss in what OPTForCausalLM returned", LOSS_TEXT, "put `labels` into the batch"]),
    "no tensor": (lambda t: compiled()({}), ValueError,
        ["there is no tensor in the batch (a dict)", "a dict, tuple, list or dataclass of tensors"]),
    "meta batch": (lambda t: compiled()({k: v.to("meta") for k, v in batch().items()}), ValueError,
        ["'x' is on the meta device", "no data"]),
    "label out of range": (lambda t: compiled()(changed(y=torch.full((8,), 99))), IndexError, ["Target 99 is out of bounds"]),
    # model
    "meta model": (lambda t: compiled(on_meta())(batch()), ValueError,
        ["4 parameters are on the meta device ('a.weight', ...)", "planned for but not trained", "to_empty(device='cpu')"]),
    "frozen": (lambda t: compiled(Classifier().requires_grad_(False))(batch()), ValueError,
        ["Classifier has no parameter that requires a gradient", "nothing to train", "requires_grad_(True)"]),
    "no module": (lambda t: ow.compile(len, cpus())(batch()), ValueError, ["the model is a builtin_function_or_method", "torch.nn.Module"]),
    "branches on data": (lambda t: compiled(Branching())(batch()), ValueError,
        ["at test_bad_input.py:", "a Python value is taken", VALUE_TEXT]),
    "changes itself": (lambda t: compiled(ChangesItself())(batch()), ValueError,
        ["parameter a.weight is changed in place", "only the optimizer", "make it a buffer"]),
    "sparse": (lambda t: compiled(WithSparse())(batch()), ValueError, ["buffer adjacency has the layout torch.sparse_coo", "to_dense()"]),
    "forward raises": (lambda t: compiled()(changed(x=torch.randn(8, 9))), ValueError,
        ["capture failed in a at test_bad_input.py:", "[8, 9] X [8, 8]"]),
    "unknown zoo name": (lambda t: zoo.load("opt-9b"), ValueError, ["no model 'opt-9b'", "opt-6.7b", "package.module:function"]),
    "no such module": (lambda t: zoo.resolve("nowhere.models:make"), ValueError,
        ["cannot import 'nowhere.models'", "importable from here"]),
    # loss
    "no scalar": (lambda t: compiled(loss_fn=lambda m, b: m.a(b["x"]))(batch()), ValueError,
        ["shape (8, 8)", "must be a scalar", "`loss.mean()`"]),
    "no loss": (lambda t: compiled(loss_fn=lambda m, b: None)(batch()), ValueError, ["NoneType", LOSS_TEXT]),
    "loss is a number": (lambda t: compiled(loss_fn=lambda m, b: float(m(**b)))(batch()), ValueError,
        ["at test_bad_input.py:", VALUE_TEXT]),
    "detached": (lambda t: compiled(loss_fn=lambda m, b: m(**b).detach())(batch()), ValueError,
        ["the loss does not depend on any parameter", "look for `detach`"]),
    # optimizer
    "another model's": (lambda t: compiled(optimizer=lambda m: sgd(Classifier()))(batch()), ValueError,
        ["group 0 of SGD holds a tensor of shape (8, 8) that is no parameter of the model", "from `model.parameters()`"]),
    "not supported": (lambda t: compiled(optimizer=lambda m: torch.optim.RMSprop(m.parameters()))(batch()), ValueError,
        ["RMSprop is not supported", "SGD, Adam, AdamW", "the update is yours"]),
    "no optimizer": (lambda t: compiled(optimizer=lambda m: "adam")(batch()), ValueError,
        ["builtins.str is not supported", "SGD, Adam, AdamW"]),
    "momentum later": (lambda t: momentum_later(), ValueError,
        ["group 0 of SGD had 0 state tensors", "options now ask for 1", "must stay as they were; compile again"]),
    "groups removed": (lambda t: groups_removed(), ValueError,
        ["updates parameter group 0, the optimizer has 0", "must stay as they were"]),
    # options
    "unknown force": (lambda t: planned(force="fsdp"), ValueError,
        ["unknown forced plan 'fsdp'", "ddp, zero1, zero2, zero3, megatron", "'a+b'"]),
    "force parts": (lambda t: planned(force="ddp+megatron", mesh=(2,)), ValueError,
        ["has 2 parts, the mesh has 1 axes", "one part per axis"]),
    "mesh size": (lambda t: planned(mesh=(4,)), ValueError, ["mesh 4 has 4 devices", "'cpu:2' has 2", "candidates are 2"]),
    "mesh zero": (lambda t: planned(mesh=(0, 2)), ValueError, ["mesh is (0, 2)", MESH_TEXT]),
    "mesh empty": (lambda t: planned(mesh=()), ValueError, ["mesh is ()", MESH_TEXT]),
    "mesh text": (lambda t: planned(mesh="2x1"), ValueError, ["mesh is '2x1'", MESH_TEXT]),
    "limit negative": (lambda t: planned(memory_limit=-5), ValueError, ["memory_limit is -5", "bytes per device, a number above 0"]),
    "limit NaN": (lambda t: planned(memory_limit=float("nan")), ValueError, ["memory_limit is nan", "bytes per device"]),
    "limit text": (lambda t: planned(memory_limit="lots"), ValueError, ["memory_limit is 'lots'", "10e9"]),
    "clip": (lambda t: compiled(clip_grad_norm=-1.0)(batch()), ValueError, ["clip_grad_norm is -1.0", "a number above 0"]),
    "autocast text": (lambda t: compiled(autocast="bf16")(batch()), ValueError, ["autocast is 'bf16'", "torch.bfloat16 or torch.float16"]),
    "autocast int8": (lambda t: compiled(autocast=torch.int8)(batch()), ValueError, ["autocast is torch.int8", "None for no autocast"]),
    "no steps": (lambda t: ow.verify(Classifier(), batch(), (2,), steps=0), ValueError, ["steps is 0", "at least one"]),
    # cluster
    "unknown cluster": (lambda t: planned(cluster="dgx-b300"), ValueError,
        ["unknown cluster 'dgx-b300'", "dgx-a100-640", "NAMExNODES", "path of a cluster file"]),
    "no cluster file": (lambda t: planned(cluster=str(t / "none.json")), ValueError,
        ["no cluster file at", "none.json", "shipped clusters are"]),
    "cluster no JSON": (lambda t: planned(cluster=text_file(t, "{")), ValueError, ["is not JSON", "bad.json"]),
    "cluster lacks": (lambda t: planned(cluster=cluster_file(t, lambda d: d["device"].pop("memory_bytes"))), ValueError,
        ["device lacks memory_bytes", "needed there:"]),
    "cluster unknown": (lambda t: planned(cluster=cluster_file(t, lambda d: d["device"].update(speed=1))), ValueError,
        ["device has unknown speed", "known there:"]),
    "cluster unit": (lambda t: planned(cluster=cluster_file(t, lambda d: d["intra_node"].update(bandwidth_bytes_per_s=600))), ValueError,
        ["intra_node.bandwidth_bytes_per_s is 600 bytes/s", "if 600 GB/s was meant, write 6e+11"]),
    "cluster negative": (lambda t: planned(cluster=cluster_file(t, lambda d: d["device"].update(memory_bytes=-1))), ValueError,
        ["device.memory_bytes is -1", "above 0 bytes"]),
    "no cluster": (lambda t: planned(cluster=4), ValueError, ["cluster is 4", "a Cluster, the name of a preset, or the path"]),
    "no CUDA": (lambda t: compiled(cluster="a100-40gb")(batch()), ValueError,
        ["'a100-40gb' has CUDA devices, this machine has none", "opweave.plan", "Cluster.detect()"]),
    "no processes": (lambda t: compiled(cluster=cpus(2))(batch()), ValueError,
        ["the mesh 2 needs 2 ranks", "torchrun --nproc-per-node 2", "init_process_group()"]),
    # plan
    "plan cut off": (lambda t: cut_off_plan(t), ValueError, ["is not valid JSON (line", "damaged or cut off"]),
    "no plan": (lambda t: ow.Plan.load(text_file(t, "[1]")), ValueError, ["this is no plan: expected a JSON object"]),
    "another format": (lambda t: ow.Plan.load(text_file(t, "{}")), ValueError, ["its format is None, expected 'opweave.plan'"]),
    "plan version": (lambda t: edited(t, lambda d: d.update(version=99)), ValueError,
        ["has version 99, this opweave reads version 1", "make the plan again"]),
    "plan damaged": (lambda t: edited(t, lambda d: d["decisions"][0].update(codes="x")), ValueError,
        ["damaged at decisions/0/codes", "'x' is not of type 'array'", "make the plan again"]),
    "plan extra": (lambda t: edited(t, lambda d: d["decisions"][0].update(bogus=1)), ValueError,
        ["damaged at decisions/0", "'bogus' was unexpected"]),
    "plan unknown": (lambda t: edited(t, lambda d: d.update(bogus=1)), ValueError, ["unknown entries ['bogus']", "another version"]),
    "plan lacks": (lambda t: compiled(plan=edited(t, lambda d: d["decisions"].pop(3)))(batch()), ValueError,
        ["the plan has no decision for 1 ops and inputs (", "make it again"]),
    "plan impossible": (lambda t: compiled(plan=edited(t, lambda d: d["decisions"][0].update(codes=[77])))(batch()), ValueError,
        ["decision [77] for", "does not fit its dimensions on mesh [1]", "the plan is damaged"]),
    "plan's model": (lambda t: compiled(Classifier(16), plan=planned(cluster=cpus()))(batch()), ValueError,
        ["the plan was made for 'Classifier' (fingerprint", "model, batch shapes, optimizer and dtypes must be the same"]),
    "plan's cluster": (lambda t: compiled(cluster=cpus(1), plan=planned(cluster=cpus(2)))(batch()), ValueError,
        ["the plan was made for cluster 'cpu:2'", "this is 'cpu:1'", "make a plan for this cluster"]),
    "plan's mesh": (lambda t: other_mesh(), ValueError, ["the plan is for mesh 2, ranks is 4", "give ranks=(2,)"]),
    # pattern
    "no arrow": (lambda t: ow.pattern("mylib::op", "m n m"), ValueError, ["rule 'm n m' has no '->'", "e.g. 'm k, k n -> m n'"]),
    "not closed": (lambda t: ow.pattern("mylib::op", "m (n -> m"), ValueError, ["'(' is not closed in rule 'm (n -> m'"]),
    "no letter": (lambda t: ow.pattern("mylib::op", "m$ -> m"), ValueError, ["cannot read '$ '", "expected a letter"]),
    "two flags": (lambda t: ow.pattern("mylib::op", "m! n, m* -> m"), ValueError, ["letter 'm' has two flags"]),
    "no namespace": (lambda t: ow.pattern("op", "m -> m"), ValueError, ["op 'op' has no namespace", "'mylib::op'"]),
    "reduction": (lambda t: ow.pattern("mylib::op", "m n -> m", reduce="mean"), ValueError,
        ["reduce='mean' is not one of 'sum', 'max', 'min'"]),
    "operand": (lambda t: ow.pattern("mylib::op", "m -> m", linear=((3,),)), ValueError,
        ["linear group (3,) names an operand that rule 'm -> m' does not"]),
    "no local form": (lambda t: ow.pattern("mylib::op", "m* -> m"), ValueError, ["a letter with '*' or '#'", "needs local="]),
    "misfit": (lambda t: misfit(), ValueError, ["rule 'm -> m' of aten.relu.default gives 1 dims to a tensor of shape (8, 8)"]),
    # checkpoint
    "no checkpoint": (lambda t: started().load(t / "none"), ValueError, ["none holds no complete checkpoint: there is no such folder"]),
    "no checkpoint yet": (lambda t: first_load(t), ValueError, ["none holds no complete checkpoint"]),
    "strangers": (lambda t: started().save(folder_with(t, "thesis.tex")), ValueError,
        ["holds 1 ('thesis.tex')", "give an empty or new folder"]),
    "a file": (lambda t: started().save(text_file(t, "x")), ValueError,
        ["cannot write the checkpoint", "File exists", "There was none before."]),
    "no state": (lambda t: compiled().save(t / "new"), ValueError, ["there is no state yet", "step.prepare(batch)"]),
    "no plan yet": (lambda t: compiled().plan, ValueError, ["there is no plan yet", "the shapes of the first batch"]),
}  # fmt: skip


def no_labels():
    model, data = zoo.load("opt-tiny")
    compiled(model)({"input_ids": data["input_ids"]})


def text_file(tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    return str(file)


def folder_with(tmp_path, name):
    (tmp_path / name).write_text("years of work")
    return tmp_path


def cut_off_plan(tmp_path):
    file = tmp_path / "plan.json"
    planned().save(file)
    file.write_text(file.read_text()[:-100])
    ow.Plan.load(file)


def other_mesh():
    model, data = Classifier(), batch()
    ow.verify(model, data, (4,), plan=ow.verify(model, data, (2,)).plan)


def first_load(tmp_path):
    step = compiled()
    step.load(tmp_path / "none")
    step(batch())


@pytest.mark.parametrize("name", CASES)
def test_error_text(name, tmp_path):
    run, kind, pieces = CASES[name]
    with pytest.raises(kind) as caught:
        run(tmp_path)
    text = str(caught.value)
    assert [piece for piece in pieces if piece not in text] == [], text


def test_numbers_for_meshes_and_ranks_are_fine():
    assert planned(mesh=2).mesh == planned(mesh=[2]).mesh == (2,)
    assert ow.verify(Classifier(), batch(), 2).plan.mesh == (2,)


# -- nothing is lost --------------------------------------------------------------------------------------------------------


def snapshot(step):
    tensors = {key: value.clone() for key, value in step.state.tensors.items()}
    return tensors, {fqn: float(count) for fqn, count in step.state.steps.items() if float(count)}


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", [
    lambda m: torch.optim.AdamW(m.parameters()), lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), sgd,
], ids=["adamw", "momentum", "sgd"])  # fmt: skip
def test_a_bad_batch_changes_nothing(optimizer, value):
    """Not in the first step, where momentum starts, and not later; training goes on as if the batch had not been there."""
    torch.manual_seed(0)
    good, model = batch(), Classifier()
    bad = good | {"x": good["x"] * value}
    clean = Classifier()
    clean.load_state_dict(model.state_dict())
    disturbed, undisturbed = compiled(model, optimizer=optimizer), compiled(clean, optimizer=optimizer)
    disturbed.prepare(good)
    for _ in range(2):
        before = snapshot(disturbed)
        with pytest.raises(ArithmeticError, match=r"the loss of step \d is (nan|inf); parameters and optimizer state are as before"):
            disturbed(bad)
        assert same(before, snapshot(disturbed))
        assert float(disturbed(good)) == float(undisturbed(good))
        assert same(snapshot(disturbed), snapshot(undisturbed))


def test_too_big_for_the_cluster():
    """How many bytes too many, on which device, and what to change."""
    model, data = zoo.load("opt-30b")
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(ow.compiler.planner.DoesNotFitError) as caught:
        ow.plan(model, "a100-40gb", data, optimizer=adam)
    text = str(caught.value)
    for piece in ("OPTForCausalLM does not fit on 'a100-40gb'", "A100-PCIE-40GB", "usable bytes", "too many", "Ways out: a smaller batch"):
        assert piece in text, text


def test_an_empty_batch():
    with pytest.raises(ValueError, match=r"the batch tensor 'x' has the shape \(0, 8\)"):
        compiled()(batch(0))


# -- checkpoints ------------------------------------------------------------------------------------------------------------


def test_corrupted_checkpoint_changes_nothing(tmp_path):
    step = started()
    step.save(tmp_path / "saved")
    step(batch())
    before = snapshot(step)
    file = next((tmp_path / "saved").glob("data-*/*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: the content of __0_0.distcp has changed since it was written"):
        step.load(tmp_path / "saved")
    assert same(before, snapshot(step)) and step.num_steps == 2


def test_another_models_checkpoint_changes_nothing(tmp_path):
    started().save(tmp_path / "saved")
    step = started(model=Classifier(16))
    before = snapshot(step)
    with pytest.raises(ValueError, match=r"'model/a.bias' is torch.float32 of shape \(8,\) in the checkpoint .* of shape \(16,\) here"):
        step.load(tmp_path / "saved")
    assert same(before, snapshot(step))


@pytest.mark.parametrize("content", ["other model", "cut off"])
def test_bad_safetensors_change_nothing(tmp_path, content):
    file = tmp_path / "model.safetensors"
    started(model=Classifier(16)).export_safetensors(file)
    if content == "cut off":
        file.write_bytes(file.read_bytes()[:-10])
    step = started()
    before = snapshot(step)
    text = r"'a.bias' is torch.float32 of shape \(16,\) in" if content == "other model" else "is no readable safetensors file"
    with pytest.raises(ValueError, match=text):
        step.state.load_model(file)
    assert same(before, snapshot(step))


@pytest.mark.parametrize("where", ["data", "checksums", "manifest"])
def test_interrupted_save_leaves_the_old_checkpoint(tmp_path, where, monkeypatch):
    """Ctrl-C while the data, its checksums or the manifest is written."""
    step = started()
    step.save(tmp_path / "saved")
    saved = snapshot(step)
    step(batch())

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    target = {"data": (checkpoint.dcp, "save"), "checksums": (checkpoint, "_checksums"), "manifest": (Path, "replace")}[where]
    with monkeypatch.context() as patched:
        patched.setattr(*target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            step.save(tmp_path / "saved")
    step.load(tmp_path / "saved")
    assert same(saved, snapshot(step)) and step.num_steps == 1
    step.save(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("data-*"))) == 1, "the next save cleans up"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import opweave as ow
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
step = ow.compile(model, ow.Cluster.preset("cpu", devices=1), optimizer=torch.optim.AdamW(model.parameters()),
                  loss_fn=lambda model, batch: model(batch["x"]).square().mean())
batch = {"x": torch.ones(2, 4)}
if sys.argv[2] == "load":
    step.prepare(batch)
    step.load(sys.argv[1])
    print("steps", step.num_steps)
else:
    step(batch)
    step.save(sys.argv[1])
    step(batch)
    Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
    step.save(sys.argv[1])
"""


def test_killed_save_leaves_the_old_checkpoint(tmp_path):
    """A power cut, as far as a process can have one: killed in the middle, then loaded by another process."""

    def run(what):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "saved"), what]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert run("save").returncode == -signal.SIGKILL
    done = run("load")
    assert done.returncode == 0 and "steps 1" in done.stdout, done.stderr
