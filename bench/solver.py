"""`python -m bench.solver DIR`: the contest's instances, each within its time limit, checked by an independent scorer.

Every row: instance, cost, lower_bound, status, seconds (JSON parsing included), feasible (re-scored on the file in integer arithmetic),
best_known, cost_at_10_s. Limits and best known values come from ``results.csv`` beside the instances where there is one.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from opweave.compiler import problem_io
from opweave.compiler.solver import Solution, nothing_printed, solve, warm_up, warm_up_search

ANYTIME_S = 10.0
DEFAULT_LIMIT_S = 60.0
MARGIN, MARGIN_S = 0.02, 2.0
"""Kept back of each limit for the last steps and the check of the answer: a fraction and seconds, at most three tenths in all."""


def score(path: Path, selection: list[int]) -> tuple[int | None, bool]:
    """Cost and feasibility from the file alone, with Python integers; knows nothing of the solver's forms."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as source:
        problem = json.load(source)["problem"]
    nodes, edges = problem["nodes"], problem["edges"]
    if len(selection) != len(nodes["costs"]):
        return None, False
    cost = sum(costs[s] for costs, s in zip(nodes["costs"], selection, strict=True))
    for (u, v), costs in zip(edges["nodes"], edges["costs"], strict=True):
        entry = costs[selection[u] * len(nodes["costs"][v]) + selection[v]]
        cost += entry
    forbidden = cost >= 10**18
    change: dict[int, int] = {}
    for (start, end), usages, s in zip(nodes["intervals"], nodes["usages"], selection, strict=True):
        if start < end:
            change[start] = change.get(start, 0) + usages[s]
            change[end] = change.get(end, 0) - usages[s]
    load, fits, limit = 0, True, problem.get("usage_limit")
    for at in sorted(change):
        load += change[at]
        fits = fits and (limit is None or load <= limit)
    return int(cost), fits and not forbidden


def run_instance(path: Path, name: str, limit_s: float, seed: int, best_known: int | None) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    problem = problem_io.load(path)
    loaded = time.perf_counter() - started
    kept_back = min(MARGIN * limit_s + MARGIN_S, 0.3 * limit_s)
    with nothing_printed():
        solution = solve(problem, time_limit_s=max(limit_s - loaded - kept_back, 0.01), gap=0.0, seed=seed)
    seconds = time.perf_counter() - started
    cost, feasible = score(path, solution.selection.tolist())
    return {
        "instance": name,
        "seed": seed,
        "cost": cost,
        "lower_bound": _number(solution.lower_bound),
        "status": solution.status,
        "seconds": round(seconds, 2),
        "feasible": feasible,
        "best_known": best_known,
        "cost_at_10_s": _cost_at(solution, ANYTIME_S - loaded),
        "reason": solution.reason,
    }


def _cost_at(solution: Solution, seconds: float) -> int | float | None:
    best = min((point.objective for point in solution.history if point.seconds <= seconds), default=math.inf)
    return _number(best)


def _number(value: float) -> int | float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == math.floor(value) else value


def instances(folder: Path) -> dict[str, Path]:
    """Name -> file; the contest's files go by their last letter."""
    found = {}
    for path in sorted(folder.glob("*.json*")):
        stem = path.name.removesuffix(".gz").removesuffix(".json")
        found[stem.removeprefix("asplos-2025-iopddl-")] = path
    return found


def references(folder: Path) -> dict[str, dict[str, str]]:
    table = folder / "results.csv"
    if not table.exists():
        return {}
    with open(table, newline="") as source:
        return {row["instance"]: row for row in csv.DictReader(source)}


def environment() -> dict[str, str]:
    """Machine, versions and commit that a result belongs to."""
    import numba
    import numpy
    import ortools

    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "numpy": numpy.__version__, "numba": numba.__version__, "ortools": ortools.__version__}
    return {"machine": f"{platform.machine()} {platform.processor()}".strip(), "commit": commit, **versions}


def geometric_mean(rows: list[dict[str, Any]]) -> float | None:
    """Of cost / best known, over the rows that have both."""
    ratios = [row["cost"] / row["best_known"] for row in rows if row["best_known"] and row["feasible"]]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.solver", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instances", help="comma-separated names; default: all that results.csv lists, or all files")
    parser.add_argument("--time-limit", type=float, help="seconds per instance; default: the contest's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    files, known = instances(options.folder), references(options.folder)
    names = options.instances.split(",") if options.instances else [n for n in files if n in known] or list(files)
    unknown = [name for name in names if name not in files]
    if unknown:
        parser.error(f"no instance {unknown[0]!r} in {options.folder}; there are {', '.join(files)}")
    with nothing_printed():  # before the first clock starts: in a new installation the kernels are compiled now
        warm_up()
        warm_up_search()
    rows = []
    for name in names:
        reference = known.get(name, {})
        limit = options.time_limit or float(reference.get("time_limit_s", DEFAULT_LIMIT_S))
        best_known = int(reference["best_known"]) if reference.get("best_known") else None
        rows.append(run_instance(files[name], name, limit, options.seed, best_known))
        if not options.json:
            print(_line(rows[-1]), flush=True)
    mean = geometric_mean(rows)
    if options.json:
        print(json.dumps({"rows": rows, "geometric_mean": mean, "environment": environment()}))
    elif mean is not None:
        print(f"geometric mean of cost / best known: {mean:.5f}")
    return 0 if all(row["feasible"] or row["status"] == "infeasible" for row in rows) else 1


def _line(row: dict[str, Any]) -> str:
    ratio = f"{row['cost'] / row['best_known']:.5f}" if row["best_known"] and row["cost"] else "-"
    gap = f"{100 * (row['cost'] - row['lower_bound']) / row['cost']:.2f} %" if row["cost"] and row["lower_bound"] is not None else "-"
    return (
        f"{row['instance']:>12} cost {row['cost']} (x {ratio})  bound {row['lower_bound']} (gap {gap})  {row['status']}  "
        f"{row['seconds']:.1f} s  {'feasible' if row['feasible'] else 'NOT FEASIBLE'}  at 10 s: {row['cost_at_10_s']}"
    )


if __name__ == "__main__":
    sys.exit(main())
