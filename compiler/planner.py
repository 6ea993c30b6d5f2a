"""From an analysed step to a plan: choices, prices and selection for each mesh, the best one recorded.

`plan_step` is called by `api` once the step is captured and analysed.

Each mesh is solved in several forms, from the loosest to the full one, and only as far as needed: without memory limits (a bound on what
any plan of this mesh can reach, and the plan itself where its program fits); with limits, everything on the device; with limits and the
choice where everything lives (`price_places`), room and seconds left free for copies to queue, as long as another such plan may be faster,
once as others do it, with all optimizer state in one place; the same without prefetching, where nothing else fits. Meshes are taken best
bound first, so most of them are never solved in full. Where collectives were measured to cost what lies between them, experts' recipes are
candidates beside the whole meshes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from ..cost_model.cluster import Cluster
from ..cost_model.collectives import SPACING
from ..cost_model.energy import busy_weight
from ..cost_model.simulate import COMPUTE, Simulation
from ..runtime.dry_run import dry_run
from ..runtime.memory import MemoryReport
from ..runtime.meta_ops import MetaOps
from ..runtime.program import LocalProgram
from .analyse import Analysis
from .choices import ChoiceGraph, Restriction, build_choices
from .collector import collector_paused
from .defer import deferrable, waited_for
from .force import restriction
from .limits import Limits, memory_limits
from .lower import lower, move
from .place_recipes import AUTO, NO_PLACES, OFFLOAD_OPTIMIZER, check_recipe
from .plan import Plan
from .pricing import Pricer
from .problem import SelectionProblem
from .record import Candidate, Outcome, record
from .residency import DEVICE
from .schedule import schedule
from .spread import spread
from .tighten import Tightening, excess
from .timeline import Timeline, backend_of, timeline

if TYPE_CHECKING:
    from .solver import Solution

GAP = 1e-4
"""Plans are proven to within this share of the best possible predicted time."""
ENOUGH = 1e-3
"""The same where the last of it is not to be had soon: forms of the problem differ by more."""

_WAYS_OUT = (
    "Ways out: a smaller batch, bf16 autocast, more devices, or a larger memory_limit; opweave.what_would_fit(model, cluster, batch, ...) "
    "and `opweave plan` try them."
)
_UNLIMITED = {DEVICE: math.inf}
_MAX_TRIES = 8


@dataclass(frozen=True, slots=True)
class _Form:
    """A form of the problem; fields as in `pricing.Pricer`, and what it leaves free.

    The problem counts sums: of a fetch the seconds its copy takes, of a stream the seconds it is busy. Where a stream is busy all the time
    copies queue; without room for those under way, and seconds to catch up, the computation waits. room: share of the device's memory.
    """

    places: bool
    copies_hidden: float = 1.0
    room: float = 0.0
    prefetch: bool = True
    recipe: str = AUTO


_LOOSE, _FULL, _LEAN = _Form(False), _Form(True, 0.97), _Form(True, 0.0, prefetch=False)
# The simulation decides among those with places: room costs little where most is elsewhere anyway, and much where nearly all is resident.
# With 0.03, 0.12, 0.18 of the memory free opt-30b in batches of 8 on one A100 takes 7.98, 8.02, 8.05 s simulated (objective 7.78, 7.82,
# 7.85 s); mixtral-8x7b in batches of 8 on eight of 80 GB 0.84 s with 0.03 or 0.12 free, 0.75 s with 0.03 and a fifth of the seconds.
_ROOMY = ((0.98, 0.03), (0.98, 0.12), (0.8, 0.03), (0.98, 0.18), (0.8, 0.12), (0.0, 0.12))

# All optimizer state in one place: in regular layers copies come evenly. The solver's own choice adds up to less, and may queue for longer:
# mixtral-8x7b on eight V100 with 23 GiB took 10.56 s simulated instead of 10.37.
_ALL_STATE = _Form(True, 0.98, 0.03, recipe=OFFLOAD_OPTIMIZER)


def _forms(roomy: tuple[tuple[float, float], ...]) -> tuple[_Form, ...]:
    own = [_Form(True, *form) for form in roomy]
    return (_LOOSE, *own[:2], _ALL_STATE, *own[2:], _FULL, _LEAN)


_FORMS = {AUTO: _forms(_ROOMY), NO_PLACES: (_LOOSE,)}
_FORMS_OF_RECIPES = tuple(form for form in _FORMS[AUTO] if form.places and form.recipe == AUTO)
_MAX_SCHEDULES = 3
# With a plan at hand no other mesh and no other form of the problem is begun after so many seconds of planning (behind capture).
_ENOUGH_S = 30.0
# What a form with places gets at most, as long as there are others: without a plan and with one.
_FORM_S, _NEXT_FORM_S = 20.0, 10.0
# A mesh, or another plan of one, that is bounded by no more than this below a simulated step is not worth being lowered.
_NO_BETTER, _NO_BETTER_PLAN = 0.02, 0.01
# Where ranks share cores a collective takes longer the more is computed before it, which no sum of costs can say: a plan of one collective
# at the end of 80 ms was 10 to 17 % faster than the one of eight with the lower sum. There experts' plans are simulated, too.
_EXPERTS = ("ddp", "megatron")
_NO_BETTER_THAN_EXPERTS = -0.1
# Of thousands of plans the cheapest is one whose prices are too low rather than too high. Own plans that were simulated 2 % faster than
# data parallelism took 2 to 10 % longer.
_EXPERTS_MARGIN = 0.03
_SUM_IS_OFF = 0.02  # of the bytes that the problem adds up, those of the program are at most so much less
_SMALLER_BUCKETS = (1 / 8, 0)  # of the largest that did not fit


class DoesNotFitError(ValueError):
    """No plan stays within the memory limit."""


def plan_step(
    analysis: Analysis, cluster: Cluster, *, mesh: tuple[int, ...] | None = None, force: str | None = None,
    memory_limit: Any = None, places: str = AUTO, objective: str = "time", time_limit_s: float = 60.0, capture_s: float = 0.0,
) -> Plan:  # fmt: skip
    """The cheapest plan over the mesh candidates that fits the memory.

    memory_limit: see `limits.memory_limits`. places: see `place_recipes`. objective: what is cheap, see `cost_model.energy`. Raises
    DoesNotFitError, ClusterError where the cluster lacks a figure that the objective needs, and ValueError for a mesh that is not the
    cluster's size or a recipe that does not exist.
    """
    started = time.perf_counter()
    weight = busy_weight(objective, cluster)
    limits = memory_limits(memory_limit, cluster)
    check_recipe(places, [pool for pool in limits if pool != DEVICE])
    meshes = [_checked(mesh_of(mesh), cluster)] if mesh is not None else cluster.mesh_candidates()
    search = _Search(analysis, cluster, force, limits, time_limit_s, places, weight)
    best, outcome = search.run(meshes)
    plan = record(analysis, cluster, best, search.found, force, search.times, outcome)
    plan.objective, plan.limits, plan.places = objective, limits, places
    plan.planning_time_s["total"] = capture_s + time.perf_counter() - started
    plan.planning_time_s["capture"] = capture_s
    return plan


@dataclass(slots=True)
class _Mesh:
    """A mesh on its way through the forms. loose: its plan without limits; bound_s: no plan of it has a lower objective. is_experts: only
    what an expert's recipe leaves of it."""

    mesh: tuple[int, ...]
    graph: ChoiceGraph
    loose: Candidate
    bound_s: float
    is_experts: bool = False
    best: Candidate | None = None
    outcome: Outcome | None = None


@dataclass(slots=True)
class _Search:
    """The search over meshes and forms. busy_weight: what a second of computing counts beside one of the step, see `cost_model.energy`.
    best_s: the simulated objective of the best plan so far."""

    analysis: Analysis
    cluster: Cluster
    force: str | None
    limits: Limits
    time_limit_s: float
    places: str = AUTO
    busy_weight: float = 0.0
    times: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("capture", "strategies", "pricing", "solve", "verify"), 0.0))
    found: list[Candidate] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ops: MetaOps = field(default_factory=MetaOps)
    best_s: float = math.inf

    def run(self, meshes: list[tuple[int, ...]]) -> tuple[Candidate, Outcome]:
        """The cheapest candidate whose *program* stays within the limits. Raises DoesNotFitError."""
        experts = self._experts(meshes)
        loose = sorted(itertools.starmap(self._loose, [*self._recipes(meshes), *experts]), key=lambda m: m.bound_s)
        worth = _NO_BETTER_THAN_EXPERTS if experts else _NO_BETTER
        best: _Mesh | None = None
        for mesh in loose:
            if self.best_s <= mesh.bound_s * (1 + worth) or self._has_searched_enough():
                break
            self._tighten(mesh)
            if mesh.best is not None and (best is None or self._judged(mesh) < self._judged(best)):
                best, self.best_s = mesh, self._simulated(mesh)
        if best is None:
            raise DoesNotFitError(f"{_head(self.analysis, self.cluster, self.limits)}. {'; '.join(self.refused)}. {_WAYS_OUT}")
        assert best.best is not None and best.outcome is not None, "a mesh was chosen without a plan"
        if best.is_experts:  # the proof is about all plans of the mesh
            best.best.solution = _proven_by(best.best.solution, min(mesh.bound_s for mesh in loose if mesh.mesh == best.mesh))
        return best.best, best.outcome

    def _recipes(self, meshes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], Restriction | None]]:
        """The meshes that a forced plan has a meaning on, with what it leaves in. Raises the first one's ValueError where there is none."""
        if self.force is None:
            return [(mesh, None) for mesh in meshes]
        out: list[tuple[tuple[int, ...], Restriction | None]] = []
        refused: list[ValueError] = []
        for mesh in meshes:
            try:
                out.append((mesh, restriction(self.force, self.analysis.step, self.analysis.factors, mesh)))
            except ValueError as error:
                refused.append(error)
        if not out:
            raise refused[0]
        return out

    def _experts(self, meshes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], Restriction | None]]:
        """Experts' recipes on one axis, where what lies between two collectives was measured."""
        if self.force is not None or SPACING not in self.cluster.intra_node.tables:
            return []
        out: list[tuple[tuple[int, ...], Restriction | None]] = []
        for mesh, name in itertools.product([mesh for mesh in meshes if len(mesh) == 1 and mesh[0] > 1], _EXPERTS):
            with contextlib.suppress(ValueError):  # it has no meaning for this model
                out.append((mesh, restriction(name, self.analysis.step, self.analysis.factors, mesh)))
        return out

    def _loose(self, mesh: tuple[int, ...], recipe: Restriction | None) -> _Mesh:
        """A mesh without limits: its bound. Its program is made only if its turn comes."""
        started = time.perf_counter()
        graph = build_choices(self.analysis.step, self.analysis.factors, mesh, recipe)
        self.times["strategies"] += time.perf_counter() - started
        candidate = self._solve(mesh, graph, _UNLIMITED, _LOOSE)
        self.found.append(candidate)
        return _Mesh(mesh, graph, candidate, candidate.solution.lower_bound, is_experts=recipe is not None and self.force is None)

    def _tighten(self, mesh: _Mesh) -> None:
        """Find the best plan of a mesh that fits: the loose one as it is, or one that was made for the limits."""
        found = mesh.loose.solution.status != "infeasible"  # else the time was up before there was one
        if self.places in (AUTO, NO_PLACES) and found and mesh.loose.expected_peaks()[DEVICE] <= self.limits[DEVICE] * (1 + _SUM_IS_OFF):
            outcome = self._try(mesh.loose)
            if not excess(outcome.memory.pools, self.limits):
                mesh.best, mesh.outcome = mesh.loose, outcome
                return
        if mesh.is_experts:
            return
        forms = _FORMS.get(self.places, _FORMS_OF_RECIPES)
        if not any(limit for pool, limit in self.limits.items() if pool != DEVICE):
            forms = tuple(form for form in forms if form.recipe == AUTO)  # there is nowhere to put all state
        for form in forms:
            if self._is_worth_solving(form, mesh) and not self._has_searched_enough():
                self._fit(mesh, form, is_last=form == forms[-1])

    def _time_limit_s(self, form: _Form) -> float:
        """For a problem: as asked for, but for those with places only so much that other forms have their turn, too."""
        has_plan = math.isfinite(self.best_s)
        if not form.places or (form in (_FULL, _LEAN) and not has_plan):
            return self.time_limit_s
        return min(self.time_limit_s, _NEXT_FORM_S if has_plan else _FORM_S)

    def _has_searched_enough(self) -> bool:
        """Whether there is a plan and further ones are no longer worth the time."""
        return math.isfinite(self.best_s) and sum(self.times.values()) > _ENOUGH_S

    def _is_worth_solving(self, form: _Form, mesh: _Mesh) -> bool:
        """Whether a form of the problem may have a plan, or a better one, than those before it. Without prefetching more fits than
        otherwise."""
        if mesh.best is None:
            return True
        if self._simulated(mesh) <= mesh.bound_s * (1 + _NO_BETTER_PLAN):
            return False
        return form is not _LEAN and (mesh.best.with_places or mesh.best.solution.objective > mesh.bound_s * (1 + _NO_BETTER_PLAN))

    def _fit(self, mesh: _Mesh, form: _Form, *, is_last: bool) -> None:
        """Solve with limits until the program fits, too; the cheaper program, simulated, becomes the mesh's best.

        What the problem does not see, the dry run of the lowered program does; the problem's limits are lowered accordingly (`tighten`).
        """
        explains = is_last and mesh.best is None
        tight = Tightening(self.limits)
        tight.current[DEVICE] *= 1 - form.room
        reason = ""
        for _ in range(_MAX_TRIES):
            candidate = self._solve(mesh.mesh, mesh.graph, tight.current, form)
            if candidate.solution.status == "infeasible":
                reason = self._reason(candidate.solution.reason, tight.current)
                if explains and tight.problem_refuses():
                    continue
                break
            if candidate.solution.lower_bound >= min(self._simulated(mesh), self.best_s) * (1 - _NO_BETTER_PLAN):
                return
            if form.recipe != AUTO:  # the proof is about all plans of the mesh
                candidate.solution = _proven_by(candidate.solution, mesh.bound_s)
            outcome = self._try(candidate)
            if not excess(outcome.memory.pools, self.limits):
                if mesh.outcome is None or self._objective(outcome.simulation) < self._objective(mesh.outcome.simulation):
                    mesh.best, mesh.outcome = candidate, outcome
                    self.found.append(candidate)
                    self.best_s = min(self.best_s, self._simulated(mesh))
                return
            if not tight.program_exceeds(outcome.memory, candidate.expected_peaks()):
                break
        if explains:
            self.refused.append(f"mesh {show_mesh(mesh.mesh)}: {reason if tight.leanest is None else tight.reason()}")

    def _simulated(self, mesh: _Mesh) -> float:
        """The objective of a mesh's best plan; infinite where it has none. What the sum of costs does not see may be worth another mesh."""
        return math.inf if mesh.outcome is None else self._objective(mesh.outcome.simulation)

    def _judged(self, mesh: _Mesh) -> float:
        """`_simulated`, with the margin that an expert's plan has before own ones."""
        return self._simulated(mesh) * (1 - _EXPERTS_MARGIN * mesh.is_experts)

    def _objective(self, simulation: Simulation) -> float:
        """What the solver minimises, of a program that was simulated: seconds, those of computing counted again with their weight."""
        return simulation.step_time_s + self.busy_weight * simulation.busy_s.get(COMPUTE, 0.0)

    def _try(self, candidate: Candidate) -> Outcome:
        """What a candidate's program needs. Where that is too much for the device, and buckets are part of it, with smaller ones, then
        none: messages that nothing is packed for cost little time beside another plan."""
        outcome = self._scheduled(candidate)
        for share in _SMALLER_BUCKETS:
            packed = [num_bytes for name, num_bytes in outcome.memory.owners if "_bucket" in name]
            too_many = outcome.memory.peak_bytes - self.limits[DEVICE]
            if too_many <= 0 or too_many > sum(packed):
                break
            candidate.bucket_bytes = int(share * min(max(packed), candidate.bucket_bytes))
            outcome = self._scheduled(candidate)
        return outcome

    @collector_paused()
    def _scheduled(self, candidate: Candidate) -> Outcome:
        """Lower a candidate, schedule it within what memory it leaves, and see what that needs. Updates on the CPU that the step would
        wait for at its end, or the longest of them, are left to the next one, where that is faster."""
        started = time.perf_counter()
        expected_s = candidate.solution.objective / (1 + self.busy_weight)
        candidate.deferred, candidate.moves = frozenset(), []
        program, line = self._lowered(candidate)
        candidate.deferred = deferrable(program, line, self.cluster, expected_s)
        if candidate.deferred:
            program, line = self._lowered(candidate)
        outcome, late = self._arranged(candidate, program, line, expected_s)
        before = candidate.deferred, candidate.moves
        for names in (frozenset[str]().union(*late), *late[:1]) if len(late) > 1 else late:
            candidate.deferred, candidate.moves = before[0] | names, []
            other, _ = self._arranged(candidate, *self._lowered(candidate), expected_s)
            if other.simulation.step_time_s < outcome.simulation.step_time_s and not excess(other.memory.pools, self.limits):
                outcome = other
                break
            candidate.deferred, candidate.moves = before
        self.times["verify"] += time.perf_counter() - started
        return outcome

    def _lowered(self, candidate: Candidate) -> tuple[LocalProgram, Timeline]:
        program = lower(self.analysis.step, self.analysis.factors, candidate.assignment(), device="meta")
        return program, timeline(program, self.cluster, device="meta", ops=self.ops)

    def _arranged(
        self, candidate: Candidate, program: LocalProgram, line: Timeline, expected_s: float
    ) -> tuple[Outcome, list[frozenset[str]]]:
        """The program with its copies moved, and the updates that it still waits for at its end."""
        memory = self._needed(program)
        room = self.limits[DEVICE]
        for _ in range(_MAX_SCHEDULES):
            if memory.peak_bytes > self.limits[DEVICE]:
                break  # too much as it is
            moves = schedule(program, line, self.cluster, room, expected_s)
            back = move(program.graph, moves)
            scheduled = self._needed(program) if moves else memory
            if scheduled.peak_bytes <= self.limits[DEVICE]:
                candidate.moves, memory = moves, scheduled
                line = timeline(program, self.cluster, device="meta", ops=self.ops) if moves else line
                break
            room -= 1.05 * (scheduled.peak_bytes - self.limits[DEVICE])
            move(program.graph, back)
        simulation = line.simulate()
        return Outcome(memory, simulation), waited_for(program, line, simulation, _NO_BETTER * expected_s)

    def _needed(self, program: LocalProgram) -> MemoryReport:
        return dry_run(program, self.ops, backend=backend_of(self.cluster))

    def _solve(self, mesh: tuple[int, ...], graph: ChoiceGraph, limits: Limits, form: _Form) -> Candidate:
        t0 = time.perf_counter()
        recipe = self.places if form.recipe == AUTO else form.recipe
        pricer = Pricer(
            graph, self.cluster, limits, places=form.places, recipe=recipe, copies_hidden=form.copies_hidden, prefetch=form.prefetch,
            busy_weight=self.busy_weight,
        )  # fmt: skip
        priced = pricer.price()
        t1 = time.perf_counter()
        solution = _solution(priced.problem, self._time_limit_s(form))
        if form.places and solution.status != "infeasible":
            solution = replace(solution, selection=spread(priced, solution.selection))
        self.times["pricing"] += t1 - t0
        self.times["solve"] += time.perf_counter() - t1
        return Candidate(mesh, priced, solution, form.places)

    def _reason(self, text: str, limits: Limits) -> str:
        """The solver's reason with the op and its module in place of a time."""
        if together := _TOGETHER.search(text):
            least, limit = map(int, together.groups()[1:])
            pools = together.group(1).replace("'", "the ", 1).replace("and '", "and the ").replace("'", "")
            return f"the leanest plan needs {least:,} bytes of {pools} together, {least - limit:,} too many"
        found = _LEAST.search(text)
        if found is None:
            return text
        nodes: list[fx.Node] = list(self.analysis.step.graph.nodes)
        least, node = int(found.group(1)), nodes[min(int(found.group(2)), len(nodes) - 1)]
        info = node.meta.get("op")
        where = f"at {node.name}" + (f" of {info.path}" if info is not None and info.path else "")
        too_many = least - int(limits[DEVICE])
        if too_many <= 0:
            return f"no choice of layouts and places keeps all limits at all times; the tightest is {where}, with {least:,} bytes at least"
        return f"the leanest plan needs {least:,} bytes, {too_many:,} too many ({where})"


def show_mesh(mesh: tuple[int, ...]) -> str:
    """(2, 4) as "2x4"."""
    return "x".join(map(str, mesh))


def mesh_of(mesh: Any) -> tuple[int, ...]:
    """Devices per mesh axis from a tuple, a list or one number. Raises ValueError for anything else."""
    sizes = (mesh,) if isinstance(mesh, int) else mesh
    if isinstance(sizes, (tuple, list)) and sizes and all(isinstance(n, int) and n > 0 for n in sizes):
        return tuple(sizes)
    raise ValueError(f"mesh is {mesh!r}; give devices per axis as a tuple of positive whole numbers, e.g. (2,) or (2, 4)")


def _checked(mesh: tuple[int, ...], cluster: Cluster) -> tuple[int, ...]:
    if math.prod(mesh) != cluster.num_devices:
        raise ValueError(
            f"mesh {show_mesh(mesh)} has {math.prod(mesh)} devices, cluster {cluster.name!r} has {cluster.num_devices}; "
            f"candidates are {', '.join(map(show_mesh, cluster.mesh_candidates()))}"
        )
    return tuple(mesh)


def _proven_by(solution: Solution, bound_s: float) -> Solution:
    return replace(solution, lower_bound=bound_s, gap=1 - bound_s / solution.objective)


def _solution(problem: SelectionProblem, time_limit_s: float) -> Solution:
    # Here and not above: running a plan that was made elsewhere needs no solver to be installed.
    from .solver import nothing_printed, solve, warm_up

    with nothing_printed():
        warm_up()
        return solve(problem, time_limit_s=time_limit_s, gap=GAP, enough=ENOUGH)


def _head(analysis: Analysis, cluster: Cluster, limits: Limits) -> str:
    name = analysis.step.model_name or "the model"
    others = "".join(f", {int(limit):,} of the {pool}" for pool, limit in limits.items() if pool != DEVICE)
    return f"{name} does not fit on {cluster.name!r}: every device ({cluster.device.name}) has {int(limits[DEVICE]):,} usable bytes{others}"


_TOGETHER = re.compile(r"pools (.+) together need at least (\d+) bytes at time \d+, their limits are (\d+)")
_LEAST = re.compile(r"needs at least (\d+) bytes at time (\d+)")
