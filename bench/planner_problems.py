"""The planner's own problems: ten models on three clusters, every problem of each plan with the solver's process seconds and its gap.

    python -m bench.planner_problems [--models gpt2,vit-h] [--clusters dgx-a100-640] [--json] [-o FILE]

With ``-o`` a finished row is appended at once as a line of JSON, and rows that are there already are not measured again, so an
interrupted run goes on where it stopped. Exit status 1 where a row misses its goal: every problem of a plan within ``GAP`` and ``GOAL_S``
process seconds (``LARGE_S`` for the largest models).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import opweave as ow
from opweave import zoo
from opweave.compiler import solver
from opweave.compiler.problem import SelectionProblem

MODELS: dict[str, tuple[int, int]] = {
    "gpt2": (8, 1024),
    "gpt2-xl": (8, 1024),
    "opt-1.3b": (8, 1024),
    "opt-30b": (8, 1024),
    "llama-7b": (8, 1024),
    "llama-70b": (8, 2048),
    "bert-large": (16, 512),
    "t5-3b": (8, 512),
    "vit-h": (16, 224),
    "mamba-1.4b": (8, 32),  # its reference form scans token by token: 43 thousand ops, 674 thousand at 512 tokens
}
CLUSTERS = ("dgx-a100-640", "dgx-a100-640x4", "dgx-v100")
LARGE = ("opt-30b", "llama-70b")
GAP, GOAL_S, LARGE_S = 1e-4, 2.0, 5.0


def measured(model_name: str, cluster: str) -> dict[str, Any]:
    """One row: nodes, process seconds and gap of each problem that planning the model poses; the kernels are loaded before."""
    problems: list[dict[str, Any]] = []
    solve = solver.solve

    def timed(problem: SelectionProblem, **options: Any) -> solver.Solution:
        before = time.process_time()
        solution = solve(problem, **options)
        seconds = time.process_time() - before
        problems.append({"nodes": problem.num_nodes, "cpu_s": round(seconds, 3), "gap": solution.gap, "status": solution.status})
        return solution

    model, batch = zoo.load(model_name, MODELS[model_name])
    solver.warm_up()
    error = ""
    with mock.patch.object(solver, "solve", timed):
        try:
            ow.plan(model, cluster, batch, optimizer=torch.optim.AdamW(model.parameters()))
        except ow.DoesNotFitError as does_not_fit:
            error = str(does_not_fit).splitlines()[0]
    return {"model": model_name, "cluster": cluster, "problems": problems, "error": error}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The row's slowest problem, its largest gap, and whether both hold."""
    solved = [p for p in row["problems"] if p["status"] != "infeasible"]
    most_s = max((p["cpu_s"] for p in row["problems"]), default=0.0)
    gap = max((p["gap"] for p in solved), default=0.0)
    goal = LARGE_S if row["model"] in LARGE else GOAL_S
    most = max((p["nodes"] for p in row["problems"]), default=0)
    holds = gap <= GAP and most_s <= goal
    return {"model": row["model"], "cluster": row["cluster"], "problems": len(row["problems"]), "most_nodes": most} | {
        "most_cpu_s": most_s, "most_gap": gap, "goal_s": goal, "holds": holds,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | cluster | problems | nodes, most | CPU s, slowest | gap, largest | holds |", "|---|---|---|---|---|---|---|"]
    for row in map(summary, rows):
        holds = "yes" if row["holds"] else "no"
        lines.append(
            f"| {row['model']} | {row['cluster']} | {row['problems']} | {row['most_nodes']} | {row['most_cpu_s']:.2f} "
            f"| {row['most_gap']:.1e} | {holds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner_problems", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output and args.output.exists() else []
    rows = {(row["model"], row["cluster"]): row for row in done}
    for name in args.models.split(","):
        for cluster in args.clusters.split(","):
            if (name, cluster) not in rows:
                row = rows[name, cluster] = measured(name, cluster)
                if args.output:
                    with args.output.open("a") as target:
                        target.write(json.dumps(row) + "\n")
    wanted = [rows[name, cluster] for name in args.models.split(",") for cluster in args.clusters.split(",")]
    print(json.dumps({"rows": list(map(summary, wanted))}) if args.json else markdown(wanted))
    return 0 if all(summary(row)["holds"] for row in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
