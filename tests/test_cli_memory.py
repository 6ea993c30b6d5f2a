"""The commands about memory, with the real planner and runtime on tiny models."""

import json
import sys

import pytest
from typer.testing import CliRunner

from opweave import cli
from opweave.cli_memory import materialised
from opweave.measured_run import exceeded

TIGHT = "device=110000,disk=1GB"


def run(*args):
    """(exit status, stdout, stderr) of `opweave ARGS`."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_plan_within_limits_says_where_things_live(tmp_path):
    code, out, _ = run("plan", "mlp-tiny", "-c", "cpu:1", "--memory-limit", TIGHT, "-o", tmp_path / "plan.json", "--json")
    report = json.loads(out)
    assert code == 0 and report["limits"] == {"device": 110000.0, "disk": 1e9}
    assert report["predicted"]["peak_bytes"]["device"] <= 110000 and report["predicted"]["peak_bytes"]["disk"] > 0
    assert report["predicted"]["peak_owner"][0].keys() == report["predicted"]["pool_owner"]["disk"][0].keys() == {"name", "bytes"}
    assert set(report["residency"]) == {"keep", "offload_host", "offload_disk", "recompute", "drop"}
    assert any("disk" in place and row["bytes"] > 0 for place, row in report["state"].items())
    assert json.loads(run("show", tmp_path / "plan.json", "--json")[1])["state"] == report["state"]
    shown = " ".join(run("show", tmp_path / "plan.json")[1].split())
    assert "on disk" in shown and f"largest at the disk's peak ({report['predicted']['pool_at']['disk']})" in shown


def test_plan_uses_the_host_of_a_gpu():
    code, out, _ = run("plan", "mlp-tiny", "-c", "dgx-a100-640:1", "--memory-limit", "device=110000,host=1GiB", "--json")
    report = json.loads(out)
    assert code == 0 and 0 < report["predicted"]["peak_bytes"]["host"] <= 2**30 and report["predicted"]["peak_bytes"]["device"] <= 110000


def test_places_are_forced():
    args = ("plan", "mlp-tiny", "-c", "cpu:1", "--memory-limit", "disk=1GB", "--json")
    free, forced = (json.loads(run(*args, *more)[1]) for more in ((), ("--places", "offload-optimizer")))
    assert free["predicted"]["peak_bytes"]["disk"] == 0 < forced["predicted"]["peak_bytes"]["disk"]
    code, _, err = run(*args[:-1], "--places", "somewhere")
    assert code == 2 and "somewhere" in err


def test_smallest_memory():
    args = ("plan", "mlp-tiny", "-c", "cpu:1", "--json")
    code, out, _ = run(*args, "--minimise", "memory", "--memory-limit", "disk=1GB")
    limit = json.loads(out)["limits"]["device"]
    assert code == 0 and json.loads(out)["predicted"]["peak_bytes"]["device"] <= limit
    assert run(*args, "--memory-limit", f"device={limit},disk=1GB")[0] == 0
    assert run(*args, "--no-suggestions", "--memory-limit", f"device={limit / 1.02},disk=1GB")[0] == 2
    code, _, err = run("plan", "mlp-tiny", "-c", "cpu:1", "--minimise", "memory", "--memory-limit", "1KiB")
    assert code == 0 and "is more than the 1 KiB there are" in err


def test_what_does_not_fit_is_told_what_would():
    args = ("plan", "mlp-tiny", "-c", "cpu:1", "--memory-limit", "60000")
    code, out, err = run(*args)
    assert code == 2 and out == "" and err.startswith("error: Mlp does not fit on 'cpu:1'")
    for text in ("the leanest plan that was found takes", "what was tried", "a larger device", "--autocast bf16"):
        # Word by word: a narrow console breaks the cells of the table into lines.
        assert set(text.split()) <= set(err.split()), text
    report = json.loads(run(*args, "--json")[1])
    found = report["does_not_fit"]
    assert report["error"].startswith("Mlp does not fit") and found["limits"] == {"device": 60000.0}
    assert found["peak_owner"] and found["peak_at"] and any(s["fits"] and s["step_time_s"] > 0 for s in found["suggestions"])
    code, out, err = run(*args, "--no-suggestions", "--json")
    assert code == 2 and set(json.loads(out)) == {"error"} and "what was tried" not in err


def test_frontier_falls_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "frontier.png"
    args = ("frontier", "mlp-tiny", "-c", "cpu:1", "--memory-limit", "disk=1GB", "--points", "3")
    code, out, _ = run(*args, "-o", picture, "--json")
    rows = json.loads(out)["points"]
    times = [row["step_time_s"] for row in rows]
    assert code == 0 and len(rows) == 3 and times == sorted(times, reverse=True)
    assert all(row["peak_bytes"]["device"] <= row["limit_bytes"] and row["state"] and row["residency"] for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(*args)
    assert code == 0 and "mlp-tiny on cpu:1" in out and "param" in out


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("frontier", "mlp-tiny", "-c", "cpu:1", "-o", tmp_path / "f.png")
    assert code == 2 and "pip install 'opweave[pictures]'" in err


def test_run_measures_what_was_predicted(tmp_path):
    args = ("run", "mlp-tiny", "-c", "cpu:1", "--steps", "4")
    code, out, _ = run(*args, "--memory-limit", TIGHT, "--disk-path", tmp_path, "--json")
    report = json.loads(out)
    measured = report["measured"]
    assert code == 0 and len(report["losses"]) == 4 and report["losses"][-1] < report["losses"][0]
    assert measured["peak_bytes"]["device"] <= 110000 and measured["peak_bytes"] == report["predicted"]["peak_bytes"]
    assert measured["step_time_s"] > 0 and measured["offloaded_bytes"] > 0 and measured["fetched_bytes"] > 0
    free = json.loads(run(*args, "--json")[1])
    assert free["losses"] == report["losses"], "limits do not change results"
    assert free["measured"]["offloaded_bytes"] == 0 and free["measured"]["peak_bytes"]["device"] > 110000
    assert "offloaded a step" in run(*args)[1]


def test_a_lean_run_gives_memory_back_before_the_step_is_set_up(monkeypatch):
    from opweave.compiler import api
    from opweave.runtime import resident

    order = []
    compile_step = api.compile
    monkeypatch.setattr(resident, "return_freed_memory", lambda: order.append("return"))
    monkeypatch.setattr(api, "compile", lambda *args, **kwargs: (order.append("compile"), compile_step(*args, **kwargs))[1])
    code, out, _ = run("run", "mlp-tiny", "-c", "cpu:1", "--steps", "2", "--lean", "--json")
    assert code == 0 and order == ["return", "compile"]
    assert json.loads(out)["measured"]["rss_peak_bytes"] >= 0, "what grew cannot be less than nothing"
    run("run", "mlp-tiny", "-c", "cpu:1", "--steps", "2", "--json")
    assert order == ["return", "compile", "compile"], "only where it was asked for"


def test_run_says_what_does_not_hold(monkeypatch):
    from opweave import measured_run

    code, _, err = run("run", "mlp-tiny", "-c", "cpu:1", "--memory-limit", "60000", "--steps", "1")
    assert code == 2 and "does not fit" in err
    monkeypatch.setattr(measured_run, "exceeded", lambda *_: ["the device held 2 bytes at once, its limit is 1"])
    code, out, err = run("run", "mlp-tiny", "-c", "cpu:1", "--steps", "1", "--json")
    assert code == 1 and "the device held 2 bytes" in err and json.loads(out)["measured"]["step_time_s"] is None
    assert exceeded({"device": 5, "disk": 1}, {"device": 4.0}) == [
        "the device held 5 bytes at once, its limit is 4", "the disk held 1 bytes at once, its limit is 0",
    ]  # fmt: skip
    assert exceeded({"device": 4, "host": 0}, {"device": 4.0}) == []


def test_one_rank_prints_the_error(monkeypatch):
    args = ("run", "mlp-tiny", "-c", "cpu:1", "--memory-limit", "60000", "--steps", "1", "--json")
    assert "does not fit" in json.loads(run(*args)[1])["error"]
    monkeypatch.setenv("RANK", "1")
    code, out, err = run(*args)
    assert code == 2 and out == "" and "does not fit" in err


def test_models_of_the_zoo_get_weights():
    model, batch = materialised("mobilenet-tiny", None)
    assert next(model.parameters()).device.type == "cpu"
    model, batch = materialised("convnet", (2, 16))
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(t.device.type == "cpu" and t.shape[0] == 2 for t in batch.values())


def test_micro_batches(tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = run("plan", "mlp-tiny", "-c", "cpu:2", "--accumulate", 4, "-o", file, "--json")
    assert code == 0 and json.loads(out)["accumulate"] == 4
    assert json.loads(run("show", file, "--json")[1])["accumulate"] == 4 and "micro-batches" in run("show", file)[1]
    code, out, _ = run("simulate", file, "--json")
    assert code == 0 and json.loads(out)["step_time_s"] == pytest.approx(json.loads(out)["planned_step_time_s"])
    assert run("verify", file, "--steps", 1, "--json")[0] == 0
    code, _, err = run("verify", file, "--accumulate", 2)
    assert code == 2 and "the plan is for 4 micro-batches, --accumulate is 2" in err
    code, out, _ = run("run", "mlp-tiny", "-c", "cpu:1", "--accumulate", 2, "--steps", 2, "--json")
    report = json.loads(out)
    assert code == 0 and report["accumulate"] == 2 and report["measured"]["peak_bytes"] == report["predicted"]["peak_bytes"]
    code, _, err = run("plan", "mlp-tiny", "-c", "cpu:1", "--accumulate", 3)
    assert code == 2 and "accumulate=3 does not cut the batch of 8 samples into equal parts" in err


def test_a_plan_with_autocast_is_verified_simulated_compared_and_run(tmp_path):
    path = tmp_path / "plan.json"
    assert run("plan", "mlp-tiny", "-c", "cpu:1", "--autocast", "bf16", "--places", "checkpoint", "-o", path)[0] == 0
    shown = json.loads(run("show", path, "--json")[1])
    assert shown["autocast"] == "bfloat16" and shown["places"] == "checkpoint"
    verified = json.loads(run("verify", path, "--json")[1])
    assert verified["max_relative_difference"]["loss"] <= 2**-8
    code, _, err = run("verify", path, "--dtype", "float64")
    assert code == 2 and "a step is compared in float32" in err
    predicted = shown["predicted"]
    assert json.loads(run("simulate", path, "--json")[1])["step_time_s"] == pytest.approx(predicted["step_time_s"])
    assert json.loads(run("compare", path, "--steps", "1", "--json")[1])["peak_error"] == 0
    ran = json.loads(run("run", path, "--steps", "2", "--json")[1])
    assert ran["measured"]["peak_bytes"] == predicted["peak_bytes"] and len(ran["losses"]) == 2
    code, _, err = run("run", path, "--force", "ddp", "--accumulate", "2")
    assert code == 2 and "--force, --accumulate cannot be given beside a plan file" in err


def test_a_folder_that_cannot_be_used_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("run", "mlp-tiny", "-c", "cpu:1", "--steps", "1", "--memory-limit", TIGHT, "--disk-path", tmp_path / "file")
    assert code == 2 and "the disk tier cannot use the folder" in err and "--disk-path" in err


def test_more_than_there_is_is_said():
    code, _, err = run("plan", "mlp-tiny", "-c", "cpu:1", "--memory-limit", "device=9000TiB", "--json")
    assert code == 0 and "warning: the limit of the device, 9e+03 TiB, is more than the" in err
