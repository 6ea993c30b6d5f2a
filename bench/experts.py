"""The solver against the experts' recipes, priced by one cost model.

    python -m bench.experts [--models gpt2-xl,bert-large] [--clusters dgx-a100-640] [--again] [--json] [-o docs/experts.md]

For every model and cluster: the predicted step time of the solver's plan, of every recipe (`compiler.force`) that fits the memory on
any mesh, the best of them, and by how much less the solver's plan costs. Both sides keep everything on the devices and compute nothing
twice, so this is about sharding alone; `bench.memory` compares the rest.

A recipe is a set of plans, of which the solver takes the cheapest. Those of zero1 are among those of zero2, those of megatron among
those of megatron_sp (which may split the sequence, but need not), so the wider ones stand for both here.

Rows are kept in bench/results/experts.json as they are found: a run that was stopped goes on where it was, `--again` prices anew what it
is asked for. Exit status 1 where a recipe is cheaper than the solver's plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from opweave import zoo
from opweave.compiler.analyse import Analysis, analyse
from opweave.compiler.capture import capture
from opweave.compiler.place_recipes import NO_PLACES
from opweave.compiler.plan import Plan
from opweave.compiler.planner import GAP, DoesNotFitError, plan_step
from opweave.cost_model.cluster import Cluster

# model → global batch (samples, and length or image size): what a user fine-tunes with on a machine or two
MODELS: dict[str, tuple[int, int]] = {
    "opt-125m": (8, 1024),
    "bert-large": (16, 512),
    "resnet-50": (64, 224),
    "vit-h": (16, 224),
    "gpt2-xl": (8, 1024),
    "t5-3b": (8, 512),
    "opt-2.7b": (8, 1024),
    "llama-8b": (4, 2048),
    "opt-13b": (4, 1024),
    "mixtral-8x7b": (8, 1024),
}
CLUSTERS = ("dgx-h100", "dgx-a100-640", "dgx-a100-640x2", "dgx-v100x2")
SINGLE = ("ddp", "zero2", "zero3", "megatron_sp")
PAIRS = ("ddp+zero3", "zero2+megatron_sp", "zero3+megatron_sp")  # for meshes of two axes
RESULTS = Path(__file__).parent / "results" / "experts.json"
TIME_LIMIT_S = 20.0
Row = dict[str, Any]


def autocast_of(cluster: Cluster) -> torch.dtype | None:
    """bfloat16 where the device is faster in it, as anybody trains there; else none."""
    peak = cluster.device.peak_flops
    return torch.bfloat16 if peak.get("bfloat16", 0.0) > peak["float32"] else None


def compare(analysis: Analysis, model: str, cluster: Cluster) -> Row:
    """One row: predicted seconds of the solver's plan and of each recipe (None: it does not fit or does not apply)."""
    started = time.perf_counter()
    ours = _planned(analysis, cluster, None)
    seconds = time.perf_counter() - started
    plans = {name: _planned(analysis, cluster, name) for name in (*SINGLE, *PAIRS)}
    recipes = {name: seconds_of(plan) if plan else None for name, plan in plans.items()}
    feasible = {name: cost for name, cost in recipes.items() if cost is not None}
    best = min(feasible, key=lambda name: feasible[name]) if feasible else None
    ratio = seconds_of(ours) / feasible[best] if ours and best else None
    return {
        "model": model, "batch": list(MODELS[model]), "cluster": cluster.name, "dtype": _dtype_name(autocast_of(cluster)),
        "mesh": "x".join(map(str, ours.mesh)) if ours else "", "solver_s": seconds_of(ours) if ours else None,
        "gap": ours.solver["gap"] if ours else None, "patterns": ours.patterns if ours else {}, "recipes_s": recipes,
        "best_recipe": best, "ratio": ratio, "planning_s": seconds, "holds": holds(ratio, best), "commit": _commit(),
    }  # fmt: skip


def seconds_of(plan: Plan) -> float:
    """The predicted step time of a plan's program, simulated."""
    return plan.predicted["step_time_s"]


def holds(ratio: float | None, best: str | None) -> bool:
    """Whether no recipe is cheaper: the solver proves its plans to within GAP of the best."""
    return best is None or (ratio is not None and ratio <= 1 + GAP)


def _planned(analysis: Analysis, cluster: Cluster, force: str | None) -> Plan | None:
    """The cheapest plan over all meshes; None where nothing fits or the recipe does not apply."""
    try:
        return plan_step(analysis, cluster, force=force, places=NO_PLACES, time_limit_s=TIME_LIMIT_S)
    except ValueError as error:
        if force is None and not isinstance(error, DoesNotFitError):
            raise
        print(f"{cluster.name}, {force or 'solver'}: {str(error)[:160]}", file=sys.stderr)
        return None


def _dtype_name(autocast: torch.dtype | None) -> str:
    return str(autocast or torch.float32).removeprefix("torch.")


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def price(models: Iterable[str], clusters: Iterable[str], kept: list[Row], again: bool) -> list[Row]:
    """The rows asked for, in the order of the tables; those in `kept` are not priced anew unless `again`. Each is saved when found."""
    rows = {(row["model"], tuple(row["batch"]), row["cluster"]): row for row in kept}
    for model in models:
        analyses: dict[torch.dtype | None, Analysis] = {}
        for cluster in map(Cluster.resolve, clusters):
            key = (model, MODELS[model], cluster.name)
            if key in rows and not again:
                continue
            dtype = autocast_of(cluster)
            if dtype not in analyses:
                analyses[dtype] = _analysed(model, dtype)
            rows[key] = compare(analyses[dtype], model, cluster)
            RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
            print(f"{model} on {cluster.name}: solver / best recipe = {rows[key]['ratio']}", file=sys.stderr, flush=True)
    order = [(model, MODELS[model], cluster) for model in MODELS for cluster in CLUSTERS]
    return sorted(rows.values(), key=lambda row: _place(order, (row["model"], tuple(row["batch"]), row["cluster"])))


def _place(order: list[Any], key: Any) -> int:
    return order.index(key) if key in order else len(order)


def _analysed(name: str, autocast: torch.dtype | None) -> Analysis:
    model, batch = zoo.load(name, MODELS[name])
    return analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()), autocast=autocast))


def markdown(rows: list[Row]) -> str:
    """The table of docs/experts.md."""
    lines = [
        "| model | batch | cluster | type | mesh | solver, ms | best recipe | its ms | solver / recipe | second best recipe |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        costs = sorted((cost, name) for name, cost in row["recipes_s"].items() if cost is not None)
        best, second = [*costs, None, None][:2]
        cells = [
            row["model"], "x".join(map(str, row["batch"])), row["cluster"], row["dtype"], row["mesh"] or "—",
            f"{row['solver_s'] * 1e3:.4g}" if row["solver_s"] else "does not fit",
            best[1] if best else "none fits", f"{best[0] * 1e3:.4g}" if best else "—",
            f"{row['ratio']:.4f}" if row["ratio"] else "—",
            f"{second[1]} {row['solver_s'] / second[0]:.3f}" if second and row["solver_s"] else "—",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> str:
    """How the ratios lie, in a sentence."""
    ratios = sorted(row["ratio"] for row in rows if row["ratio"])
    if not ratios:
        return ""
    cheaper = sum(ratio < 1 - GAP for ratio in ratios)
    above = sum(not row["holds"] for row in rows)
    return (
        f"Of {len(rows)} rows, {len(ratios)} have a recipe that fits. The solver's plan is cheaper than the best one in "
        f"{cheaper or 'none'}; it costs more in {above or 'none'}. Its time over that of the best recipe: "
        f"{ratios[0]:.4f} to {ratios[-1]:.4f}, median {ratios[len(ratios) // 2]:.4f}.\n"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; unknown models end the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.experts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--again", action="store_true", help="price rows anew that are in the results already")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="write the table of all kept rows there")
    args = parser.parse_args(argv)
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(map(repr, unknown))}; there are {', '.join(MODELS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where no row has a recipe that is cheaper than the solver's plan."""
    args = parse_args(argv)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = price(args.models.split(","), args.clusters.split(","), kept, args.again)
    if args.output:
        args.output.write_text(_HEAD + summary(rows) + "\n" + markdown(rows))
    print(json.dumps({"rows": rows}) if args.json else markdown(rows))
    return 0 if all(row["holds"] for row in rows) else 1


_HEAD = """# The solver against the experts' recipes

Predicted step times by one cost model with datasheet constants, AdamW, batches a user would fine-tune with; made by
`python -m bench.experts -o docs/experts.md`. A recipe is the best of its plans over all meshes. Both sides keep everything on the
devices and compute nothing twice: this is about sharding alone, [memory.md](memory.md) is about the rest. Times are those of the
simulated programs. What the solver minimises is not quite that: a plan of lower cost may be some hundredths of a per cent slower.
"second best recipe": its name and the solver's time over its. "none fits": no recipe stays within the memory. The command goes on with
the rows that are not priced yet.

"""

if __name__ == "__main__":
    sys.exit(main())
