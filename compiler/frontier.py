"""Time against memory: the smallest device memory a step runs in, and the predicted step time between that and what the fastest plan takes.

All answers are plans that were made: a limit counts as one that works only where the planner found a plan for it. The planner works within
a gap and stops at the first plan that is as fast as its bound, so a plan made for little memory is now and then the faster one also where
there is more: each point of the frontier takes the fastest plan of all that fit its limit (with another objective than time: the best by
that), and says for which limit that was made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cost_model.cluster import Cluster
from ..cost_model.energy import PREDICTED
from .analyse import Analysis
from .limits import Limits
from .plan import Plan
from .planner import DoesNotFitError, plan_step
from .residency import DEVICE

SHARE = 0.01
"""The smallest memory is found to within this share."""
_UNLIMITED = float(1 << 60)

Progress = Callable[[str], None]


def silent(text: str) -> None:
    """Nobody is told."""


@dataclass(slots=True, kw_only=True)
class Trials:
    """Plans of one step for several limits; all that were found are kept in `plans`.

    limits: bytes per pool; the device's is what varies. options: further arguments of `plan_step`. progress: told what is tried next.
    """

    analysis: Analysis
    cluster: Cluster
    limits: Limits
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = silent
    plans: list[Plan] = field(default_factory=list)

    def at(self, device_bytes: float) -> Plan | None:
        """The plan for a device of this size; None where none was found."""
        return self.within(self.limits | {DEVICE: float(device_bytes)})

    def within(self, limits: Limits) -> Plan | None:
        """The plan for these limits; None where none was found."""
        try:
            plan = plan_step(self.analysis, self.cluster, memory_limit=limits, **self.options)
        except DoesNotFitError:
            return None
        self.plans.append(plan)
        return plan

    def unlimited(self) -> Plan:
        """The plan for a device of any size. Raises DoesNotFitError where forced places need more of another pool than there is."""
        self.progress("no limit")
        plan = plan_step(self.analysis, self.cluster, memory_limit=self.limits | {DEVICE: _UNLIMITED}, **self.options)
        self.plans.append(plan)
        return plan

    def best(self, limits: Limits) -> Plan:
        """The best plan found so far that stays within these limits, by the objective in `options`. Raises ValueError where none does."""
        fitting = [plan for plan in self.plans if fits(plan, limits)]
        if not fitting:
            raise ValueError(f"none of the {len(self.plans)} plans found so far stays within {limits}")
        least = PREDICTED[self.options.get("objective", "time")]
        return min(fitting, key=lambda plan: plan.predicted[least])


def fits(plan: Plan, limits: Limits) -> bool:
    """Whether a plan's predicted peaks are within the limits; a pool that has none must be unused."""
    return all(num_bytes <= limits.get(pool, 0) for pool, num_bytes in plan.predicted["peak_bytes"].items())


def device_peak(plan: Plan) -> int:
    """Most bytes on the device at once."""
    return int(plan.predicted["peak_bytes"][DEVICE])


@dataclass(frozen=True, slots=True, kw_only=True)
class Smallest:
    """limit_bytes: the smallest device limit for which a plan was found, `plan`. refused_bytes: the largest for which none was.

    unlimited_bytes: what the plan without a limit takes.
    """

    limit_bytes: int
    refused_bytes: int
    unlimited_bytes: int
    plan: Plan


def smallest(trials: Trials, *, share: float = SHARE, deadline: float = math.inf) -> Smallest:
    """The smallest device memory that works, by bisection on a logarithmic scale until the two limits differ by less than `share`.

    deadline: of `time.perf_counter()`; what was found until then is returned. Raises DoesNotFitError as `Trials.unlimited` does.
    """
    plan = trials.unlimited()
    unlimited = device_peak(plan)
    works, refused = unlimited, 0
    while works > max(refused * (1 + share), refused + 1) and time.perf_counter() < deadline:
        middle = math.isqrt(works * refused) if refused else works // 2
        if middle < 1:
            break
        trials.progress(f"a device of {middle:,} bytes")
        found = trials.at(middle)
        if found is None:
            refused = middle
        else:
            works, plan = middle, found
    return Smallest(limit_bytes=works, refused_bytes=refused, unlimited_bytes=unlimited, plan=plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A device limit and the best plan found for it. made_for_bytes: the limit that plan was made for, at most this one."""

    limit_bytes: int
    made_for_bytes: int
    plan: Plan

    def row(self) -> dict[str, Any]:
        """As `opweave frontier --json` prints it."""
        predicted = self.plan.predicted
        return {
            "limit_bytes": self.limit_bytes,
            "made_for_bytes": self.made_for_bytes,
            **{name: predicted.get(name) for name in PREDICTED.values()},
            "peak_bytes": dict(predicted["peak_bytes"]),
            "mesh": list(self.plan.mesh),
            "residency": self.plan.residency,
            "state": self.plan.state,
        }


def frontier(trials: Trials, num_points: int = 8) -> list[Point]:
    """Points from the smallest device memory that works to what the plan without a limit takes, in equal ratios; the objective never rises.

    Raises ValueError for fewer than two points, DoesNotFitError as `Trials.unlimited` does.
    """
    if num_points < 2:
        raise ValueError(f"a frontier has at least 2 points, {num_points} was asked for")
    least = smallest(trials)
    limits = _geometric(least.limit_bytes, least.unlimited_bytes, num_points)
    for i, limit in enumerate(limits[1:-1], start=2):  # the ends are planned
        trials.progress(f"point {i} of {len(limits)}: a device of {limit:,} bytes")
        trials.at(limit)
    return [_point(trials, limit) for limit in limits]


def _geometric(first: int, last: int, count: int) -> Sequence[int]:
    """Whole numbers in equal ratios, both ends exact and none twice."""
    between = [round(first * (last / first) ** (i / (count - 1))) for i in range(1, count - 1)]
    return sorted({first, *between, last})


def _point(trials: Trials, limit: int) -> Point:
    plan = trials.best(trials.limits | {DEVICE: float(limit)})
    made_for = min(int(plan.limits[DEVICE]), limit)  # a plan made without a limit was as well made for the first one that it fits
    return Point(limit_bytes=limit, made_for_bytes=made_for, plan=plan)
