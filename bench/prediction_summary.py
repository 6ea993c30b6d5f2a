"""The rows of `bench.prediction` and what is made of them: a summary, tables, a picture.

error: |predicted / measured - 1| over all rows. kendall_tau: per model and number of ranks, over pairs of plans of which one was the faster
in every round, and by more than `LEAST_NOISE`; its mean and least value. picked_vs_best: measured time of "auto" over that of the
fastest plan (equal plans counting with their mean), worst and median over models. calibration_gain: measured time of "datasheet" over
that of "auto" where the two plans differ.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOALS = {"median_error": 0.10, "p90_error": 0.25, "kendall_tau": 0.8, "picked_vs_best": 1.05}
LEAST_NOISE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan of one model. planned_s: what the plan says. rounds_s: the median step of each round, in which the plans took turns.
    same_as: a plan with the same decisions."""

    model: str
    plan: str
    ranks: int
    predicted_s: float
    measured_s: float
    planned_s: float
    mesh: str
    same_as: str | None = None
    rounds_s: Sequence[float] = ()

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def noise(self) -> float:
        """How much longer the slowest round took than the fastest."""
        return max(self.rounds_s) / min(self.rounds_s) - 1 if self.rounds_s else 0.0


def kendall_tau(rows: Iterable[Row]) -> float | None:
    """Agreement of the order by prediction with the measured one, -1 to 1; None where all plans are alike within noise."""
    signs = []
    for a, b in itertools.combinations(rows, 2):
        if a.same_as is None and b.same_as is None and _differ(a, b):
            signs.append(1 if (a.predicted_s < b.predicted_s) == (a.measured_s < b.measured_s) else -1)
    return statistics.fmean(signs) if signs else None


def _differ(a: Row, b: Row) -> bool:
    """Whether two plans' measured times can be told apart: the machine is faster and slower from round to round, for both alike."""
    a_is_faster = a.measured_s < b.measured_s
    agree = all((x < y) == a_is_faster for x, y in zip(a.rounds_s, b.rounds_s, strict=True))
    return agree and abs(a.measured_s / b.measured_s - 1) > LEAST_NOISE


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """See the module's text."""
    per_model = [_of_model(model, ranks, group) for (model, ranks), group in _groups(rows).items() if ranks > 1]
    taus = [m["kendall_tau"] for m in per_model if m["kendall_tau"] is not None]
    picked = [m["picked_vs_best"] for m in per_model]
    gains = [m["calibration_gain"] for m in per_model if m["calibration_gain"] is not None]
    return {
        "num_rows": len(rows),
        **_errors([row.error for row in rows]),
        "kendall_tau": statistics.fmean(taus) if taus else None,
        "kendall_tau_least": min(taus, default=None),
        "picked_vs_best": max(picked, default=None),
        "picked_vs_best_median": statistics.median(picked) if picked else None,
        "calibration_gain": {"num_plans": len(gains), "median": statistics.median(gains) if gains else None, "all": sorted(gains)},
        "goals": GOALS,
        "models": per_model,
    }


def _errors(errors: Iterable[float]) -> dict[str, float]:
    ordered = sorted(map(abs, errors))
    return {"median_error": statistics.median(ordered), "p90_error": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]}


def _groups(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.ranks), []).append(row)
    return found


def _of_model(model: str, ranks: int, rows: Sequence[Row]) -> dict[str, Any]:
    measured_s = _by_plan(rows)
    auto_s, best = measured_s["auto"], min(measured_s, key=lambda plan: measured_s[plan])
    datasheet = next(row for row in rows if row.plan == "datasheet")
    return {
        "model": model,
        "ranks": ranks,
        "kendall_tau": kendall_tau(rows),
        "best": best,
        "picked_vs_best": auto_s / measured_s[best],
        "calibration_gain": None if datasheet.same_as else measured_s["datasheet"] / auto_s,
    }


def _by_plan(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds by plan: rows with the same decisions are runs of one plan, whose mean counts for each."""
    runs: dict[str, list[float]] = {}
    for row in rows:
        runs.setdefault(row.same_as or row.plan, []).append(row.measured_s)
    return {row.plan: statistics.fmean(runs[row.same_as or row.plan]) for row in rows}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted over measured time, one point per row. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 5))
    ends = [min(r.measured_s for r in rows) * 800, max(r.measured_s for r in rows) * 1250]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.9 * e for e in ends], [1.1 * e for e in ends], color="black", alpha=0.1, linewidth=0, label="within 10 %")
    for ranks, marker in zip(sorted({r.ranks for r in rows}), "osD^", strict=False):
        chosen = [r for r in rows if r.ranks == ranks]
        label = f"{ranks} rank{'s' if ranks > 1 else ''}"
        points = [1e3 * r.measured_s for r in chosen], [1e3 * r.predicted_s for r in chosen]
        axes.scatter(*points, s=14, marker=marker, label=label, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="measured step, ms", ylabel="predicted step, ms", xlim=ends, ylim=ends)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'model':12} {'plan':10} ranks  predicted   measured   error  noise"]
    for r in rows:
        times = f"{1e3 * r.predicted_s:8.1f}ms {1e3 * r.measured_s:8.1f}ms {r.error:+7.1%} {r.noise:6.1%}"
        lines.append(f"{r.model:12} {r.plan:10} {r.ranks:5} {times}")
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The summary by number of ranks, as `docs/cost-model.md` has it."""
    lines = [
        "| ranks | rows | median error | 90th percentile | order of plans (tau, mean) | picked / fastest, median |",
        "|---|---|---|---|---|---|",
    ]
    counts = sorted({row.ranks for row in rows})
    for name, chosen in [*((str(n), [row for row in rows if row.ranks == n]) for n in counts), ("all", list(rows))]:
        found = summary(chosen)
        lines.append(
            f"| {name} | {found['num_rows']} | {found['median_error']:.1%} | {found['p90_error']:.1%} | "
            f"{_number(found['kendall_tau'], 2)} | {_number(found['picked_vs_best_median'], 3)} |"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def holds(found: dict[str, Any]) -> bool:
    """Whether all goals are met that there are figures for."""
    below: dict[str, Callable[[float, float], bool]] = {"kendall_tau": lambda value, goal: value >= goal}
    return all(found[name] is None or below.get(name, lambda value, goal: value <= goal)(found[name], goal) for name, goal in GOALS.items())
