"""Predicted against measured on a real, tiny plan of one device; and the commands around it."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

import opweave as ow
from opweave import cli, comparison, zoo


def run(*args):
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert run("plan", "opt-tiny", "--cluster", "cpu", "--batch", "4x16", "-o", path, "--json")[0] == 0
    return path


def test_simulate_prints_times_peaks_and_writes_a_trace(plan_file, tmp_path):
    code, out, _ = run("simulate", plan_file, "--trace", tmp_path / "t.json", "--json")
    report = json.loads(out)
    assert code == 0 and report["step_time_s"] > 0 and report["peak_bytes"]["device"] > 0
    assert report["classes"]["matmul"] > 0 and report["owners"]["device"] and report["joules"] > 0
    spans = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == report["num_instructions"]
    assert list(report["stages_s"]) == ["model", "capture", "lowering", "prices", "simulation"]
    assert 0 < report["simulation_time_s"] == report["stages_s"]["simulation"] < report["stages_s"]["capture"]
    assert report["step_time_s"] == pytest.approx(report["planned_step_time_s"], rel=1e-9)
    code, _, err = run("simulate", plan_file, "--cluster", "cpu:4")
    assert code == 2 and "the plan is for 1 devices, cluster 'cpu:4' has 4" in err


def test_compare_runs_records_and_reads_back(plan_file, tmp_path):
    code, out, _ = run("compare", plan_file, "--steps", "2", "--record", tmp_path / "p.json", "--json")
    report = json.loads(out)
    assert code == 0 and report["measured"]["step_time_s"] > 0
    assert report["peak_error"] == 0, "the simulated peak is the executor's, byte for byte"
    classes = {row["class"]: row for row in report["rows"]}
    assert classes["matmul"]["measured_s"] > 0 and classes["update"]["predicted_s"] > 0
    again = json.loads(run("compare", plan_file, "--profile", tmp_path / "p.json", "--json")[1])
    assert again["measured"] == report["measured"]


def test_a_step_records_itself_and_compare_reads_the_recording(plan_file, tmp_path):
    path = tmp_path / "recorded.json"
    model, batch = zoo.load("opt-tiny", (4, 16))
    step = ow.compile(model, "cpu", optimizer=torch.optim.AdamW(model.parameters()), plan=plan_file)
    before = {name: p.clone() for name, p in step.prepare(batch).to_model().named_parameters()}
    profile = step.profile(batch, path, steps=2)
    assert step.num_steps == 2 + 2 + 3, "every recorded step is a step of training"
    assert any(not torch.equal(p, before[name]) for name, p in step.to_model().named_parameters())
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"compute"}
    assert {e["name"] for e in spans} == set(profile.seconds) and all(e["dur"] >= 0 for e in spans)
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in itertools.pairwise(spans)), "one instruction at a time, in order"
    report = json.loads(run("compare", plan_file, "--profile", path, "--json")[1])
    assert report["measured"]["step_time_s"] == profile.step_time_s and report["peak_error"] == 0
    with pytest.raises(ValueError, match="a profile of 0 steps has nothing in it"):
        step.profile(batch, steps=0)


def test_compare_refuses_what_is_no_profile(plan_file, tmp_path):
    (tmp_path / "p.json").write_text("{}")
    code, _, err = run("compare", plan_file, "--profile", tmp_path / "p.json")
    assert code == 2 and "record one with `opweave compare PLAN --record FILE`" in err


def test_profiles_survive_json():
    profile = comparison.Profile(step_time_s=0.1, peak_bytes=5, seconds={"mm": 0.01})
    assert comparison.Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_a_plan_file_is_verified_in_float64(tmp_path):
    path = tmp_path / "plan.json"
    assert run("plan", "opt-tiny", "--cluster", "cpu:2", "--batch", "4x16", "--force", "zero3", "-o", path, "--json")[0] == 0
    code, out, _ = run("verify", path, "--steps", "2", "--json")
    report = json.loads(out)
    assert code == 0 and max(report["max_relative_difference"].values()) < 1e-10 and report["collectives"]
