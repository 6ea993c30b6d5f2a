"""The bookkeeping of the prediction benchmarks, and small runs of their scripts."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from opweave.bench import gpu_calibration, prediction, prediction_models, prediction_summary, two_hosts
from opweave.bench.prediction_summary import Row
from opweave.cost_model.cluster import Cluster

ROOT = Path(__file__).parents[1]


def row(plan, predicted, measured, *, model="m", ranks=2, rounds=(), same_as=None):
    return Row(
        model=model, plan=plan, ranks=ranks, predicted_s=predicted, measured_s=measured, planned_s=predicted, mesh="2",
        same_as=same_as, rounds_s=rounds,
    )  # fmt: skip


def test_the_order_of_plans():
    assert prediction_summary.kendall_tau([row("a", 1, 10), row("b", 2, 20), row("c", 3, 30)]) == 1
    assert prediction_summary.kendall_tau([row("a", 3, 10), row("b", 2, 20), row("c", 1, 30)]) == -1
    assert prediction_summary.kendall_tau([row("a", 2, 10), row("b", 1, 20), row("c", 3, 30)]) == pytest.approx(1 / 3)


def test_plans_that_noise_cannot_tell_apart_are_ties():
    assert prediction_summary.kendall_tau([row("a", 2, 1.0), row("b", 1, 1.01)]) is None
    turns = (0.9, 1.0, 1.2), (1.0, 1.1, 1.1)
    assert prediction_summary.kendall_tau([row("a", 2, 1.0, rounds=turns[0]), row("b", 1, 1.1, rounds=turns[1])]) is None
    assert prediction_summary.kendall_tau([row("a", 2, 1.0, rounds=turns[0]), row("b", 1, 1.1, rounds=(1.0, 1.1, 1.3))]) == -1
    assert prediction_summary.kendall_tau([row("a", 2, 1.0), row("b", 1, 1.1)]) == -1
    assert prediction_summary.kendall_tau([row("a", 2, 1.0), row("b", 1, 1.1, same_as="a")]) is None


def test_summary():
    rows = [row("ddp", 1.1, 1.0), row("auto", 0.9, 0.8), row("datasheet", 1.5, 1.2), row("batch 8", 2.0, 1.0, ranks=1)]
    found = prediction_summary.summary(rows)
    assert found["num_rows"] == 4 and found["median_error"] == pytest.approx(0.1875) and found["p90_error"] == 1.0
    assert found["kendall_tau"] == 1 and found["picked_vs_best"] == 1
    assert found["calibration_gain"] == {"num_plans": 1, "median": pytest.approx(1.5), "all": [pytest.approx(1.5)]}
    assert not prediction_summary.holds(found) and prediction_summary.holds({**found, "median_error": 0.05, "p90_error": 0.2})


def test_the_summary_as_a_table():
    rows = [row("ddp", 1.1, 1.0), row("auto", 0.9, 0.8), row("datasheet", 1.5, 1.2), row("batch 8", 2.0, 1.0, ranks=1)]
    lines = prediction_summary.markdown(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 2", "| all"]
    assert lines[2] == "| 1 | 1 | 100.0% | 100.0% | - | - |" and lines[3].endswith("| 1.00 | 1.000 |")


def test_equal_plans_are_runs_of_one():
    rows = [row("ddp", 1.0, 1.0), row("auto", 1.0, 1.2, same_as="ddp"), row("datasheet", 1.5, 1.3)]
    found = prediction_summary.summary(rows)["models"][0]
    assert found["picked_vs_best"] == 1 and found["calibration_gain"] == pytest.approx(1.3 / 1.1)


def test_a_result_file_keeps_what_was_not_measured_again(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"rows": [dataclasses.asdict(row("ddp", 1, 1)), dataclasses.asdict(row("ddp", 2, 2, model="other"))]}))
    kept = prediction.merged([row("ddp", 3, 3)], path)
    assert [(r.model, r.measured_s) for r in kept] == [("other", 2), ("m", 3)]
    assert prediction.merged([row("ddp", 3, 3)], None) == [row("ddp", 3, 3)]


def test_an_interrupted_run_goes_on_with_the_models_that_are_left(tmp_path, monkeypatch):
    asked = []

    def torchrun(ranks, *command):
        asked.append((ranks, command[-1]))
        file = tmp_path / f"rows-{ranks}.json"
        rows = [*prediction.finished_rows(file), row("ddp", 3, 3, model="gnn")]
        file.write_text(json.dumps({"commit": prediction.environment()["commit"], "rows": [dataclasses.asdict(r) for r in rows]}))

    monkeypatch.setattr(prediction, "torchrun", torchrun)
    left = {"commit": prediction.environment()["commit"], "rows": [dataclasses.asdict(row("ddp", 1, 1, model="mlp"))]}
    (tmp_path / "rows-2.json").write_text(json.dumps(left))
    assert [r.model for r in prediction.run(2, ["mlp", "gnn"], tmp_path)] == ["mlp", "gnn"]
    assert [r.model for r in prediction.run(2, ["mlp", "gnn"], tmp_path)] == ["mlp", "gnn"]
    assert asked == [(2, "gnn")], "what is done is not measured again"
    (tmp_path / "rows-2.json").write_text(json.dumps({**left, "commit": "another"}))
    assert prediction.finished_rows(tmp_path / "rows-2.json") == []
    prediction.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_models_can_be_made_and_are_many():
    assert len(prediction_models.NAMES) >= 10 and len(gpu_calibration.GPU_NAMES) >= 5
    model, batch = prediction_models.load("vit", 4)
    assert batch["pixel_values"].shape[0] == 4 and sum(p.numel() for p in model.parameters()) > 10**6
    with pytest.raises(ValueError, match="no model 'gpt5' in this benchmark; there are mlp,"):
        prediction_models.load("gpt5")


@pytest.mark.parametrize("rate, expected", [("200mbit", 25e6), ("1.5gbit", 187.5e6), ("64kbit", 8e3)])
def test_rates(rate, expected):
    assert two_hosts.bytes_per_s(rate) == expected


def test_a_rate_that_is_none():
    with pytest.raises(ValueError, match="the rate 'fast' is none; write for example 200mbit"):
        two_hosts.bytes_per_s("fast")


def run(*arguments, timeout=600):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_prediction_runs_models_on_two_ranks(tmp_path):
    Cluster.preset("cpu", devices=2).save(tmp_path / "cluster-2.json")
    files = ("--clusters", str(tmp_path), "-o", str(tmp_path / "r.json"))
    result = run("bench.prediction", "--ranks", "2", "--models", "gnn", *files, "--json")
    assert result.returncode in (0, 1), result.stderr
    found = json.loads(result.stdout)
    assert {r["plan"] for r in found["rows"]} == {"ddp", "zero3", "megatron", "auto", "datasheet"}
    assert all(r["measured_s"] > 0 and r["predicted_s"] > 0 for r in found["rows"])
    assert next(r for r in found["rows"] if r["plan"] == "datasheet")["same_as"] is not None, "here both plan with the same constants"
    assert {"median_error", "p90_error", "kendall_tau", "picked_vs_best"} <= set(found["summary"])
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == found["rows"]


@pytest.mark.slow
def test_the_gpu_script_does_its_work_on_the_cpu(tmp_path):
    Cluster.preset("cpu").save(tmp_path / "cluster-1.json")
    result = run("bench.gpu_calibration", "--cpu", "--models", "gnn", "--clusters", str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [r["plan"] for r in found["rows"]] == ["batch 4", "batch 8", "batch 16"]
    assert found["rows"][0]["measured_s"] < found["rows"][2]["measured_s"]


@pytest.mark.slow
def test_two_hosts(tmp_path):
    result = run("bench.two_hosts", "--small", "--rate", "200mbit", "--json", timeout=900)
    if result.returncode == two_hosts.SKIPPED:
        pytest.skip(result.stderr.strip())
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    facts = {key: found[key] for key in ("intra_node_bytes_per_s", "inter_node_bytes_per_s", "plans", "gain")}
    assert found["link_found"] and found["plans_differ"] and found["gain"] > 1, json.dumps(facts)
