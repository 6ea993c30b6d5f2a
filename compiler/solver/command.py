"""`opweave solve FILE`: solve a problem file, report progress, write the answer as JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from .. import problem_io
from .quiet import nothing_printed
from .solution import HistoryPoint, Solution
from .solve import solve


def solve_file(
    path: str | Path,
    time_limit_s: float = 60.0,
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool = False,
    gap: float = 0.0,
) -> dict[str, Any]:
    """Solve ``path`` (contest JSON or opweave's own, ``.gz`` allowed) and return the answer; also written to ``output`` if given.

    Keys: ``solution`` (strategy index per node, empty if infeasible), ``cost``, ``lower_bound`` (null where there is none), ``gap``,
    ``status``, ``reason``, ``seconds`` (reading the file included). With ``progress`` a live line goes to standard error.
    """
    started = time.perf_counter()
    problem = problem_io.load(path)
    kept_back = min(0.02 * time_limit_s + 2.0, 0.3 * time_limit_s)  # for starting the process and the last steps
    remaining = max(time_limit_s - kept_back - (time.perf_counter() - started), 0.01)
    with nothing_printed():
        solution = solve(problem, time_limit_s=remaining, gap=gap, seed=seed, progress=_live_line if progress else None)
    if progress:
        sys.stderr.write("\n")
    answer = as_json(solution, time.perf_counter() - started)
    if output is not None:
        Path(output).write_text(json.dumps(answer) + "\n")
    return answer


def as_json(solution: Solution, seconds: float) -> dict[str, Any]:
    """The answer's JSON object."""
    return {
        "solution": solution.selection.tolist(),
        "cost": number(solution.objective),
        "lower_bound": number(solution.lower_bound),
        "gap": number(solution.gap),
        "status": solution.status,
        "reason": solution.reason,
        "seconds": round(seconds, 3),
    }


def number(value: float) -> float | int | None:
    """A JSON number; whole values as integers, infinities as null."""
    if not math.isfinite(value):
        return None
    return int(value) if value == math.floor(value) else float(value)


def _live_line(point: HistoryPoint) -> None:
    gap = (point.objective - point.lower_bound) / max(abs(point.objective), 1e-300) if math.isfinite(point.objective) else math.inf
    sys.stderr.write(f"\r{point.seconds:7.1f} s  best {point.objective:.6g}  bound {point.lower_bound:.6g}  gap {100 * gap:.3f} %   ")
    sys.stderr.flush()
