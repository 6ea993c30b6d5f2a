"""The command line: JSON on stdout, messages on stderr, exit status. The compiler itself is replaced by a stand-in here."""

import dataclasses
import json
import sys
import types

import pytest
from typer.testing import CliRunner

import opweave.compiler
from opweave import cli, zoo
from opweave.cli_tables import bytes_text, cell, plain, seconds_text
from opweave.compiler import timeline
from opweave.compiler.plan import Decision, Plan
from opweave.compiler.verify import VerificationError
from opweave.cost_model import journal


def _plan(mesh=(2, 4), layout="b on 0"):
    return Plan(
        model={"name": "Mlp", "fingerprint": "0" * 16},
        cluster={"name": "cpu:8", "fingerprint": "1" * 16},
        mesh=mesh,
        decisions=[Decision(kind="op", nodes=("mm",), codes=(0,) * len(mesh))],
        predicted={"step_time_s": 0.012, "streams": {"compute": 0.01, "collectives": 0.002}, "peak_bytes": {"device": 3 << 20}},
        solver={"objective_s": 0.012, "lower_bound_s": 0.0119, "gap": 0.008, "status": "optimal"},
        planning_time_s={"capture": 0.5, "strategies": 0.1, "pricing": 0.1, "solve": 0.2, "total": 0.9},
        patterns={"data parallel": 3, "tensor parallel": 2},
        replicated_ops=[{"op": "mylib::f", "reason": "no rule", "count": 1}],
        modules=[{"path": "layers.0", "ops": 4, "name": "data parallel", "layout": layout, "time_s": 0.006, "bytes": 1 << 20}],
    )


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for the compiler's api and for building models; `calls` records what they were asked."""
    import torch

    calls = []
    model = torch.nn.Linear(2, 2)

    def plan(*args, **kwargs):
        calls.append(("plan", args, kwargs))
        return _plan(kwargs.get("mesh") or (2, 4))

    def verify(*args, **kwargs):
        calls.append(("verify", args, kwargs))
        difference = {"loss": 1e-16, "parameters": 2e-15}
        return types.SimpleNamespace(max_relative_difference=difference, collectives={"all_reduce": 3}, replicated_ops=[])

    api = types.ModuleType("opweave.compiler.api")
    api.plan, api.verify = plan, verify
    monkeypatch.setitem(sys.modules, "opweave.compiler.api", api)
    monkeypatch.setattr(opweave.compiler, "api", api, raising=False)
    monkeypatch.setattr(timeline, "in_any_precision", lambda plan, *_: plan)
    monkeypatch.setattr(zoo, "load", lambda spec, batch=None: (calls.append(("load", spec, batch)), (model, {"x": 1}))[1])
    return calls


def run(*args):
    """(exit status, stdout, stderr) of `opweave ARGS`."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_help_is_quick_and_names_the_commands():
    code, out, _ = run("--help")
    assert code == 0
    for name in ("plan", "show", "explain", "diff", "verify", "models", "clusters", "solve"):
        assert name in out


def test_plan_prints_one_json_object(fake):
    code, out, _ = run("plan", "opt-tiny", "--cluster", "cpu:8", "--batch", "8x128", "--mesh", "4x2", "--force", "ddp", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["mesh"] == [4, 2] and report["model"] == "opt-tiny" and report["cluster"] == "cpu:8"
    assert set(report["planning_time_s"]) >= {"capture", "strategies", "pricing", "solve", "total"}
    assert set(report["predicted"]) >= {"step_time_s", "streams", "peak_bytes"}
    assert set(report["solver"]) >= {"objective_s", "lower_bound_s", "gap", "status"}
    assert report["patterns"] and report["replicated_ops"]
    assert ("load", "opt-tiny", (8, 128)) in fake
    kwargs = next(call for call in fake if call[0] == "plan")[2]
    assert kwargs["mesh"] == (4, 2) and kwargs["force"] == "ddp" and type(kwargs["optimizer"]).__name__ == "AdamW"


def test_plan_passes_on_what_memory_is_to_be(fake):
    limit = "device=4GiB, host=32GiB, disk=100GB"
    args = ("plan", "opt-tiny", "-c", "cpu:8", "--memory-limit", limit, "--places", "checkpoint", "--autocast", "bf16")
    assert run(*args, "--json")[0] == 0
    kwargs = next(call for call in fake if call[0] == "plan")[2]
    assert kwargs["memory_limit"] == {"device": 4 * 2**30, "host": 32 * 2**30, "disk": 100e9}
    assert kwargs["places"] == "checkpoint" and str(kwargs["autocast"]) == "torch.bfloat16"
    run("plan", "opt-tiny", "-c", "cpu:8", "--memory-limit", "40GiB")
    assert fake[-1][2]["memory_limit"] == {"device": 40 * 2**30} and fake[-1][2]["places"] == "auto" and fake[-1][2]["autocast"] is None
    run("plan", "opt-tiny", "-c", "cpu:8")
    assert fake[-1][2]["memory_limit"] is None


def test_where_things_live_is_said_in_words(tmp_path):
    plan = _plan()
    plan.limits = {"device": float(4 << 20), "disk": 1e9}
    plan.predicted["peak_bytes"] = {"device": 3 << 20, "host": 0, "disk": 5 << 20}
    plan.predicted |= {"peak_at": "mm_3", "peak_owner": [{"name": "wte", "bytes": 9}]}
    counts = {"keep": 2, "offload_disk": 1, "drop": 0}
    plan.residency = {name: {"count": count, "bytes": count << 10} for name, count in counts.items()}
    plan.state = {"param device, state disk, update host": {"count": 7, "bytes": 5 << 20}}
    plan.save(tmp_path / "plan.json")
    out = " ".join(run("show", tmp_path / "plan.json")[1].split())
    for text in ("kept on the device", "copied to disk and back", "updated by", "the CPU", "mm_3", "wte", "75.0%", "5 MiB"):
        assert text in out, text
    assert "dropped" not in out, "what there is none of is left out"
    report = json.loads(run("show", tmp_path / "plan.json", "--json")[1])
    assert report["residency"] == plan.residency and report["state"] == plan.state and report["limits"] == plan.limits


def test_what_a_plan_was_made_with_is_shown(tmp_path):
    plan = _plan()
    plan.force, plan.places, plan.autocast = "zero3", "checkpoint", "bfloat16"
    plan.save(tmp_path / "plan.json")
    report = json.loads(run("show", tmp_path / "plan.json", "--json")[1])
    assert [report[key] for key in ("force", "places", "autocast")] == ["zero3", "checkpoint", "bfloat16"]
    out = run("show", tmp_path / "plan.json")[1]
    assert "zero3, checkpoint" in out and "bfloat16" in out


def test_plan_show_explain_verify_share_a_file(fake, tmp_path):
    path = tmp_path / "plan.json"
    assert run("plan", "opt-tiny", "-c", "cpu:8", "--batch", "8x16", "-o", path)[0] == 0
    code, out, _ = run("show", path)
    assert code == 0 and "data parallel" in out and "12 ms" in out
    assert json.loads(run("show", path, "--json")[1])["model"] == "opt-tiny"
    report = json.loads(run("explain", path, "layers", "--json")[1])
    assert report["modules"][0]["path"] == "layers.0" and report["replicated_ops"][0]["reason"] == "no rule"
    assert "mylib::f" in run("explain", path)[1]
    assert json.loads(run("verify", path, "--json")[1])["ranks"] == [2, 4]
    assert ("load", "opt-tiny", (8, 16)) in fake
    kwargs = next(call for call in fake if call[0] == "verify")[2]
    assert kwargs["plan"].mesh == (2, 4) and str(kwargs["dtype"]) == "torch.float64"
    code, _, err = run("verify", path, "--ranks", "2")
    assert code == 2 and "the plan is for the mesh 2x4, --ranks is 2" in err


def test_diff_names_what_changed(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    _plan().save(a)
    _plan(layout="n on 1").save(b)
    report = json.loads(run("diff", a, b, "--json")[1])
    assert report["modules"] == [{"path": "layers.0", "first": "b on 0", "second": "n on 1"}]
    assert json.loads(run("diff", a, a, "--json")[1])["modules"] == []
    assert "all modules are split equally" in run("diff", a, a)[1]


def test_verify_reports_differences(fake):
    code, out, _ = run("verify", "opt-tiny", "--ranks", "2x4", "--steps", "2", "--json")
    report = json.loads(out)
    assert code == 0
    assert set(report["max_relative_difference"]) == {"loss", "parameters"}
    assert report["collectives"] == {"all_reduce": 3} and report["replicated_ops"] == []
    kwargs = next(call for call in fake if call[0] == "verify")[2]
    assert kwargs["ranks"] == (2, 4) and kwargs["steps"] == 2 and str(kwargs["dtype"]) == "torch.float64"


def test_verify_that_does_not_hold_is_status_1(fake, monkeypatch):
    def differs(*args, **kwargs):
        raise VerificationError("the losses differ by 0.5")

    monkeypatch.setattr(opweave.compiler.api, "verify", differs)
    code, out, err = run("verify", "opt-tiny", "--ranks", "2", "--json")
    assert code == 1 and json.loads(out)["error"] == "the losses differ by 0.5" and "differ by 0.5" in err


def test_models_and_clusters(fake):
    models = json.loads(run("models", "--json")[1])["models"]
    assert {"opt-tiny", "gpt2", "mixtral-8x7b"} <= {m["name"] for m in models}
    names = [c["name"] for c in json.loads(run("clusters", "--json")[1])["clusters"]]
    assert {"dgx-a100-640", "a100-40gb", "dgx-h100", "h200", "dgx-v100", "cpu"} <= set(names)
    assert json.loads(run("clusters", "h200x2", "--json")[1])["num_nodes"] == 2
    assert "datasheet" in run("clusters", "h200")[1]


def test_solve_prints_the_answer(monkeypatch, tmp_path):
    command = types.ModuleType("opweave.compiler.solver.command")
    seen = []

    def solve_file(path, time_limit_s, seed, output, progress):
        seen.append((path.name, time_limit_s, seed))
        assert progress is False, "a live line only where stderr is a terminal"
        status = "infeasible" if path.name == "bad.json" else "optimal"
        return {"solution": [0, 1], "cost": 5, "lower_bound": 5, "status": status, "seconds": 0.2, "reason": "limit 3 at time 7"}

    command.solve_file = solve_file
    monkeypatch.setitem(sys.modules, "opweave.compiler.solver.command", command)
    code, out, _ = run("solve", tmp_path / "a.json", "--time-limit", "5", "--seed", "3", "--json")
    assert code == 0 and json.loads(out)["cost"] == 5 and seen == [("a.json", 5.0, 3)]
    code, out, err = run("solve", tmp_path / "bad.json", "--json")
    assert code == 1 and json.loads(out)["status"] == "infeasible" and "limit 3 at time 7" in err


BAD = [
    (["plan", "opt-tiny", "--cluster", "dgx-x"], r"unknown cluster 'dgx-x'; shipped are"),
    (["plan", "opt-tiny", "--cluster", "none.json"], "no cluster file at none.json"),
    (["plan", "opt-tiny", "--batch", "8,128"], "--batch '8,128' is not a list of sizes"),
    (["plan", "opt-tiny", "--batch", "8"], "--batch '8' has 1 sizes; write BATCHxSEQUENCE"),
    (["plan", "opt-tiny", "--mesh", "0x4"], "--mesh '0x4' is not a list of sizes"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--optimizer", "lion"], "unknown optimizer 'lion'; known are adamw"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--memory-limit", "much"], "--memory-limit 'much' is not a size"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--memory-limit", "40 gallons"], "give bytes per device, a number above 0 (10e9) or a text"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--memory-limit", "gpu=4GiB"], "names the pool 'gpu'; the pools are device, host, disk"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--memory-limit", "device=-1"], "--memory-limit 'device=-1' is not a size"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--minimise", "time"], "--minimise 'time' is nothing that can be minimised"),
    (["plan", "opt-tiny", "--cluster", "cpu", "--autocast", "int8"], "--autocast 'int8' is no dtype to compute in; known are bf16"),
    (["frontier", "opt-tiny", "--cluster", "cpu", "--memory-limit", "much"], "--memory-limit 'much' is not a size"),
    (["run", "opt-tiny", "--cluster", "cpu", "--memory-limit", "much"], "--memory-limit 'much' is not a size"),
    (["plan", "nowhere.at.all:build", "--cluster", "cpu"], "cannot import 'nowhere.at.all'"),
    (["plan", "json:nothing", "--cluster", "cpu"], "json has no function 'nothing'"),
    (["plan", "os:getcwd", "--cluster", "cpu"], "it must return (model, batch)"),
    (["verify", "opt-tiny"], "--ranks is missing"),
    (["verify", "opt-tiny", "--ranks", "two"], "--ranks 'two' is not a list of sizes"),
    (["verify", "opt-tiny", "--ranks", "2", "--dtype", "int8"], "unknown dtype 'int8'; known are float64"),
    (["show", "none.json"], "none.json"),
    (["solve", "p.json", "--time-limit", "0"], "--time-limit is 0; it must be above 0"),
]


@pytest.mark.parametrize("args, message", BAD, ids=lambda v: " ".join(v[:4]) if isinstance(v, list) else "")
def test_bad_input_is_one_message_and_status_2(fake, args, message):
    code, out, err = run(*args)
    assert code == 2 and out == ""
    assert err.startswith("error:") and message in err
    code, out, _ = run(*args, "--json")
    assert code == 2 and message in json.loads(out)["error"]


def test_verify_of_a_plan_without_a_model_says_so(tmp_path):
    _plan().save(tmp_path / "plan.json")
    code, _, err = run("verify", tmp_path / "plan.json")
    assert code == 2 and "opweave verify MODEL --ranks 2x4" in err


def test_user_function_gives_the_model(fake, tmp_path, monkeypatch):
    (tmp_path / "mine_cli.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 2), {'x': torch.ones(1, 2)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("plan", "mine_cli:build", "-c", "cpu:8", "--json")[0] == 0


def test_formatting():
    assert seconds_text(0.00123) == "1.23 ms" and seconds_text(2.5) == "2.5 s" and seconds_text(0) == "0 us" and seconds_text(None) == "-"
    assert bytes_text(3 << 30) == "3 GiB" and bytes_text(12) == "12 B"
    assert cell("peak_bytes", {"device": 1 << 20}) == "device 1 MiB" and cell("x", None) == "-"
    assert plain({"a": (1, float("inf"))}) == {"a": [1, None]}


def test_calibrate_writes_checks_and_corrects(tmp_path, monkeypatch):
    from opweave import calibration
    from opweave.cost_model.cluster import Cluster

    path = tmp_path / "c.json"
    cpu = Cluster.preset("cpu")
    device = dataclasses.replace(cpu.device, tables={"norm/float32": {"points": [[1e-6, 1e-5], [1e-3, 1e-2]]}})
    made = dataclasses.replace(cpu, device=device, calibration={"residuals": {"norm/float32": {"median": 0.1, "p90": 0.2}}, "seconds": 3.0})

    def calibrate_here(output, options, progress):
        made.save(output)
        assert options.quick and options.folder == tmp_path
        return made

    monkeypatch.setattr(calibration, "calibrate_here", calibrate_here)
    monkeypatch.setattr(journal, "elsewhere", lambda cluster: "")
    code, out, _ = run("calibrate", "--quick", "-o", path, "--json")
    assert code == 0 and json.loads(out)["calibration"]["residuals"] and Cluster.load(path) == made
    (tmp_path / "p.json").write_text('{"factors": {"norm/float32": 2.0}}')
    assert run("calibrate", "--from-profile", tmp_path / "p.json", "-o", path)[0] == 0
    assert Cluster.load(path).device.tables["norm/float32"]["points"][0] == [1e-6, 2e-5]
    (tmp_path / "p.json").write_text("[]")
    code, _, err = run("calibrate", "--from-profile", tmp_path / "p.json", "-o", path)
    assert code == 2 and "has no corrections" in err
    report = {"holds": False, "median_error": 0.9, "tolerance": 0.35, "warning": "", "rows": [{"name": "x", "predicted_s": 1.0}]}
    monkeypatch.setattr(calibration, "check_here", lambda cluster: report)
    code, out, err = run("calibrate", "--check", path, "--json")
    assert code == 1 and json.loads(out)["median_error"] == 0.9 and "does not hold here any more" in err
