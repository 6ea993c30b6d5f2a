"""The solver against the experts' recipes, priced by one cost model.

    python -m bench.experts [--models gpt2,bert-large] [--clusters dgx-a100-640] [--json] [-o docs/experts.md]

For every model and cluster: the predicted step time of the solver's plan, of every recipe (`compiler.force`) that fits the memory, the
best of them, and by how much less the solver's plan costs. Exit status 1 where a recipe is cheaper than the solver's plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from opweave import zoo
from opweave.compiler.analyse import Analysis, analyse
from opweave.compiler.capture import capture
from opweave.compiler.planner import GAP, DoesNotFitError, plan_step
from opweave.cost_model.cluster import Cluster

# model → global batch (samples, and length or image size)
MODELS: dict[str, tuple[int, int]] = {
    "opt-125m": (32, 1024),
    "opt-2.7b": (16, 1024),
    "opt-13b": (8, 1024),
    "gpt2-xl": (16, 1024),
    "llama-8b": (8, 2048),
    "bert-large": (64, 512),
    "t5-3b": (16, 512),
    "vit-h": (64, 224),
    "resnet-50": (256, 224),
    "mixtral-8x7b": (8, 1024),
}
CLUSTERS = ("dgx-a100-640", "dgx-h100", "dgx-v100", "dgx-a100-640x2")
RECIPES = ("ddp", "zero1", "zero2", "zero3", "megatron", "megatron_sp")
PAIRS = ("zero3+megatron", "zero3+megatron_sp")  # on meshes of two axes; "megatron" alone is data parallel + megatron there


def compare(analysis: Analysis, model: str, cluster: Cluster) -> dict[str, Any]:
    """One row: predicted seconds of the solver's plan and of each recipe (None: it does not fit or does not apply)."""
    started = time.perf_counter()
    ours, mesh, gap = _cost(analysis, cluster, None)
    seconds = time.perf_counter() - started
    recipes = {name: _cost(analysis, cluster, name)[0] for name in (*RECIPES, *PAIRS)}
    feasible = {name: cost for name, cost in recipes.items() if cost is not None}
    best = min(feasible, key=lambda name: feasible[name]) if feasible else None
    ratio = ours / feasible[best] if ours is not None and best is not None else None
    return {
        "model": model, "cluster": cluster.name, "mesh": mesh, "solver_s": ours, "gap": gap, "recipes_s": recipes, "best_recipe": best,
        "ratio": ratio, "planning_s": seconds, "holds": best is None or (ratio is not None and ratio <= 1 + GAP),
    }  # fmt: skip


def _cost(analysis: Analysis, cluster: Cluster, force: str | None) -> tuple[float | None, str, float]:
    costs = []
    for mesh in cluster.mesh_candidates():
        if force in PAIRS and len(mesh) != 2:
            continue
        try:
            plan = plan_step(analysis, cluster, mesh=mesh, force=force, time_limit_s=20.0)
        except (DoesNotFitError, ValueError):
            continue
        costs.append((plan.solver["objective_s"], "x".join(map(str, plan.mesh)), plan.solver["gap"]))
    return min(costs) if costs else (None, "", 0.0)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/experts.md."""
    lines = ["| model | batch | cluster | mesh | solver, s | best recipe | its s | solver / recipe |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        best = row["best_recipe"]
        recipe = f"{row['recipes_s'][best]:.4g}" if best else "none fits"
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else "—"
        ours = f"{row['solver_s']:.4g}" if row["solver_s"] else "does not fit"
        batch = "x".join(map(str, MODELS[row["model"]]))
        lines.append(f"| {row['model']} | {batch} | {row['cluster']} | {row['mesh']} | {ours} | {best or '—'} | {recipe} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output")
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        model, batch = zoo.load(name, MODELS[name])
        analysis = analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters())))
        for cluster in args.clusters.split(","):
            rows.append(compare(analysis, name, Cluster.resolve(cluster)))
            print(
                f"{name} on {cluster}: solver / best recipe = {rows[-1]['ratio']}, {rows[-1]['planning_s']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            if args.output:
                with open(args.output, "w") as file:
                    file.write(_HEAD + markdown(rows))
    print(json.dumps({"rows": rows}) if args.json else markdown(rows))
    return 0 if all(row["holds"] for row in rows) else 1


_HEAD = """# The solver against the experts' recipes

Predicted step times (float32, AdamW, residency "keep") by one cost model with datasheet constants; made by
`python -m bench.experts -o docs/experts.md`. "none fits": no recipe stays within the device memory.

"""

if __name__ == "__main__":
    sys.exit(main())
