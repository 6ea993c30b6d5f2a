"""The examples run as a user would run them, and the arithmetic of bench/peers and bench/experts."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import opweave as ow
from opweave.bench import experts, peers

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--steps", "4", "--batch", "4", "--block", "16", "--width", "32", "--layers", "1", "--heads", "2"]


def load(path: str):
    """A file of the checkout as a module of its own name; the checkout's root need not be importable."""
    name = "checked_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def test_train_text_on_two_ranks(tmp_path):
    output = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/train_text.py", *SMALL, "--output", str(tmp_path)
    )
    assert "largest difference of the losses" in output and "within the tolerance" in output
    assert "in usual names" in output and "tokens/s" in output
    assert ow.Plan.load(tmp_path / "plan.json").mesh == (2,)
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8").startswith("The ")
    assert any((tmp_path / "checkpoint").iterdir())


def test_train_text_in_one_process_with_dropout(tmp_path):
    output = run("examples/train_text.py", *SMALL, "--dropout", "0.1", "--output", str(tmp_path))
    assert "largest difference of the losses: 0 " in output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--width", "30", "--heads", "4"], "--width 30 does not divide into --heads 4; give a multiple of it"),
        (["--dropout", "1.5"], "--dropout 1.5 is no probability below 1"),
        (["--steps", "0"], "0 is not positive; give at least 1"),
    ],
)
def test_train_text_refuses(options, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("examples/train_text.py").parse_args(options)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_custom_op(capsys):
    load("examples/custom_op.py").main()
    output = capsys.readouterr().out
    assert "without a rule: {'op': 'mylib::scaled_norm.default'" in output
    assert "mesh 2x2" in output and "scaled_norm is split by: " in output


# -- bench/peers --------------------------------------------------------------------------------------------------------------


def peer(seconds, peak_bytes=100, losses=(2.0, 1.0), reason=""):
    return {"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": peak_bytes, "losses": list(losses), "reason": reason}


def result(**found):
    return {"model": "opt", "ranks": 2, "reference": [2.0, 1.0], "peers": found}


def test_ratio_is_the_median_of_the_rounds():
    # A round in which the machine was busy slows both alike, one in which only a peer was hit does not count.
    assert peers.median_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 0.1]) == 0.5


def test_rows_compare_with_every_peer_and_name_failures():
    other = peer([0.5, 0.5], 50, losses=(2.1, 1.0))
    found = result(opweave=peer([1.0, 1.0]), ddp=peer([2.0, 2.0], 80), other=other, tp=peer([], None, (), "no style"))
    rows = {row["peer"]: row for row in peers.rows_of(found)}
    assert rows["ddp"]["step_time_ratio"] == 0.5 and rows["ddp"]["peak_memory_ratio"] == 1.25 and rows["ddp"]["same_result"]
    assert not rows["other"]["same_result"]
    assert rows["tp"]["step_time_ratio"] is None and rows["tp"]["reason"] == "no style" and not rows["tp"]["same_result"]
    # The peer with another result is faster and leaner, and counts for nothing.
    assert peers.verdict(list(rows.values()))["opt"] == {
        "step_time_ratio": 0.5, "fastest": "ddp", "peak_memory_ratio": 1.25, "leanest": "ddp", "holds": False,
    }  # fmt: skip


def test_rows_say_that_opweave_failed():
    with pytest.raises(ValueError, match="opweave did not run opt on 2 ranks: DoesNotFitError"):
        peers.rows_of(result(opweave=peer([], reason="DoesNotFitError: too large"), ddp=peer([1.0])))


def test_peak_counts_what_was_there_before_the_steps():
    def memory(ts, num_bytes):
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": num_bytes}}

    events = [memory(5, 30), memory(1, 100), memory(2, 50), memory(3, -50), {"name": "step 1", "ph": "X", "ts": 4}, memory(6, -30)]
    assert peers.peak_of_events(events) == 130


def test_peers_refuses_unknown_models(capsys):
    with pytest.raises(SystemExit):
        peers.parse_args(["--models", "opt,vgg"])
    assert "unknown model 'vgg'; there are opt, resnet, mlp" in capsys.readouterr().err


# -- bench/experts ------------------------------------------------------------------------------------------------------------


def expert_row(model="gpt2-xl", cluster="dgx-h100", ours=0.09, **recipes):
    best = min(recipes, key=recipes.get, default=None)
    ratio = ours / recipes[best] if best else None
    return {
        "model": model, "batch": list(experts.MODELS[model]), "cluster": cluster, "dtype": "bfloat16", "mesh": "8", "solver_s": ours,
        "recipes_s": {"ddp": None, **recipes}, "best_recipe": best, "ratio": ratio, "holds": experts.holds(ratio, best),
    }  # fmt: skip


def test_experts_names_the_best_recipe_and_counts_rows():
    rows = [expert_row(zero2=0.1, zero3=0.12), expert_row(ours=0.2, zero2=0.1), expert_row()]
    assert [row["holds"] for row in rows] == [True, False, True]
    assert "| 90 | zero2 | 100 | 0.9000 | zero3 0.750 |" in experts.markdown(rows)
    assert "none fits" in experts.markdown(rows[2:])
    assert "Of 3 rows, 2 have a recipe that fits" in experts.summary(rows) and "costs more in 1" in experts.summary(rows)


def test_experts_goes_on_where_it_stopped(tmp_path, monkeypatch):
    priced = []

    def compare(analysis, model, cluster):
        priced.append((model, cluster.name))
        return expert_row(model, cluster.name, zero2=0.1)

    monkeypatch.setattr(experts, "RESULTS", tmp_path / "experts.json")
    monkeypatch.setattr(experts, "compare", compare)
    monkeypatch.setattr(experts, "_analysed", lambda model, dtype: None)
    kept = [expert_row("opt-125m", "dgx-v100", zero2=0.1)]
    rows = experts.price(["gpt2-xl", "opt-125m"], ["dgx-v100"], kept, again=False)
    assert priced == [("gpt2-xl", "dgx-v100")]
    assert [row["model"] for row in rows] == ["opt-125m", "gpt2-xl"]  # the table's order
    assert len(experts.json.loads((tmp_path / "experts.json").read_text())) == 2
    experts.price(["opt-125m"], ["dgx-v100"], rows, again=True)
    assert priced[1:] == [("opt-125m", "dgx-v100")]
