"""Commands about memory: `run`, `frontier`, and what `plan` says where nothing fits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_base import (
    AccumulateOption,
    AutocastOption,
    BatchOption,
    CheckFailed,
    ClusterOption,
    ForceOption,
    JsonOption,
    LimitOption,
    MeshOption,
    Model,
    ObjectiveOption,
    OptimizerOption,
    PlacesOption,
    app,
    autocast_dtype,
    batch_sizes,
    busy,
    is_plan_file,
    limits_of,
    load_plan,
    messages,
    named_optimizer,
    parse_sizes,
    planned_sizes,
    print_error,
    print_json,
    reports_errors,
    resolve_model,
    screen,
    source_of,
    steps_bar,
)
from .cli_tables import bytes_text, pairs_table, residency_text, rows_table, seconds_text, state_text
from .cost_model.cluster import Cluster

_STEP_OPTIONS = ("mesh", "force", "places", "objective")


def _request(model: Any, cluster: Any, batch: Any, given: Mapping[str, Any]) -> Any:
    """A `suggestions.Request` of the keyword arguments of `api.plan`."""
    from .compiler.limits import memory_limits
    from .compiler.suggestions import Request

    return Request(
        model=model, cluster=cluster, batch=batch, limits=memory_limits(given["memory_limit"], cluster), optimizer=given["optimizer"],
        autocast=given["autocast"], accumulate=given["accumulate"], options={name: given[name] for name in _STEP_OPTIONS},
    )  # fmt: skip


def _trials(request: Any, doing: Callable[[str], None]) -> Any:
    from .compiler.frontier import Trials

    doing("capturing the step")
    begin = time.perf_counter()
    analysis = request.analysis()
    options = {**request.options, "capture_s": time.perf_counter() - begin}
    return Trials(analysis=analysis, cluster=request.cluster, limits=request.limits, options=options, progress=doing)


# --- opweave plan ----------------------------------------------------------------------------------------------------------------------


def smallest_plan(model: Any, cluster: Any, batch: Any, given: Mapping[str, Any], doing: Callable[[str], None]) -> Any:
    """The plan of the smallest device memory that works; says on stderr where that is more than the device has."""
    from .compiler.frontier import smallest

    request = _request(model, cluster, batch, given)
    found = smallest(_trials(request, doing))
    plan = found.plan
    plan.limits["device"] = float(found.limit_bytes)  # the plan without a limit is one for what it takes
    if found.limit_bytes > request.limits["device"]:
        messages.print(
            f"[yellow]warning:[/] the smallest device memory that works, {bytes_text(found.limit_bytes)}, is more than the "
            f"{bytes_text(request.limits['device'])} there are",
            soft_wrap=True,
        )
    return plan


@contextlib.contextmanager
def refusals_explained(
    model: Any, cluster: Any, batch: Any, given: Mapping[str, Any], doing: Callable[[str], None] | None, as_json: bool
) -> Iterator[None]:
    """Where no plan fits within, print the error, then what would fit, and leave with status 2. doing: None for the error alone."""
    from .compiler.planner import DoesNotFitError
    from .compiler.suggestions import diagnose

    try:
        yield
    except DoesNotFitError as error:
        if doing is None:
            raise
        print_error(str(error))
        try:
            found = diagnose(_request(model, cluster, batch, given), progress=doing)
        except DoesNotFitError:  # not even a device of any size helps: the error above says it all
            found = None
        if as_json:
            print_json({"error": str(error), **({} if found is None else {"does_not_fit": asdict(found)})})
        elif found is not None:
            _show_diagnosis(found)
        raise typer.Exit(2) from None


def _show_diagnosis(found: Any) -> None:
    messages.print(f"the leanest plan that was found takes {bytes_text(found.least_bytes)} on the device, most of all at {found.peak_at}:")
    messages.print(rows_table("largest there", found.peak_owner))
    rows = [
        {"change": s.change, "fits": "yes" if s.fits else "no", "step_time_s": s.step_time_s, "time_for_as_many_samples_s": s.same_work_s}
        for s in found.suggestions
    ]
    messages.print(rows_table("what was tried", rows))
    for text in found.untried:
        messages.print(f"not tried, the time was over: {text}", soft_wrap=True)


# --- opweave frontier ------------------------------------------------------------------------------------------------------------------


@app.command()
@reports_errors
def frontier(
    model: Model,
    cluster: ClusterOption = "detect",
    batch: BatchOption = None,
    points: Annotated[int, typer.Option(help="Points, the two ends included.")] = 8,
    mesh: MeshOption = None,
    force: ForceOption = None,
    optimizer: OptimizerOption = "adamw",
    autocast: AutocastOption = None,
    accumulate: AccumulateOption = 1,
    memory_limit: LimitOption = None,
    places: PlacesOption = "auto",
    objective: ObjectiveOption = "time",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Draw it into this picture (png, svg, pdf).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predicted step time against device memory, from the smallest that works to what the plan without a limit takes."""
    figure = None if output is None else _figure_class()
    where = Cluster.resolve(cluster)
    given = {
        "mesh": None if mesh is None else parse_sizes(mesh, "--mesh"), "force": force, "places": places,
        "objective": objective, "autocast": autocast_dtype(autocast), "accumulate": accumulate,
        "memory_limit": limits_of(memory_limit, where),
    }  # fmt: skip
    with busy(f"planning {model} on {where.name}") as doing:
        from .compiler.frontier import frontier as find

        built, example = resolve_model(model, batch_sizes(batch))
        given["optimizer"] = named_optimizer(optimizer, built)
        rows = [point.row() for point in find(_trials(_request(built, where, example, given), doing), points)]
    if figure is not None and output is not None:
        draw_frontier(figure(figsize=(7, 4.5)), rows, f"{model} on {where.name}", output)
    if as_json:
        print_json({"model": model, "cluster": where.name, "points": rows})
    else:
        _show_frontier(rows, f"{model} on {where.name}")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; install it with `pip install 'opweave[pictures]'`, or leave -o away") from error
    return Figure


def _show_frontier(rows: list[dict[str, Any]], title: str) -> None:
    shown = [
        {
            "device bytes": row["limit_bytes"],
            "step_time_s": row["step_time_s"],
            "peak bytes": {pool: n for pool, n in row["peak_bytes"].items() if n},
            "forward results": residency_text(row["residency"]),
            "parameters and state": state_text(row["state"]),
        }
        for row in rows
    ]
    for row, cells in zip(rows, shown, strict=True):
        cells |= {name: row[name] for name in ("joules", "price") if row[name] is not None}
    screen.print(rows_table(title, shown))


def draw_frontier(figure: Any, rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Step time against device memory as steps: a plan serves every limit up to the next point's."""
    limits = [row["limit_bytes"] for row in rows]
    times = [row["step_time_s"] * 1e3 for row in rows]
    axes = figure.add_subplot()
    axes.step(limits, times, where="post", marker="o")
    axes.set_xscale("log")
    axes.set_ylim(0, max(times) * 1.1)
    axes.set_xticks(limits, labels=[bytes_text(limit) for limit in limits], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("device memory")
    axes.set_ylabel("predicted step time (ms)")
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


# --- opweave run -----------------------------------------------------------------------------------------------------------------------


@app.command()
@reports_errors
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL|PLAN", help="A zoo model, package.module:function, or a plan file.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to train, on one batch.")] = 10,
    cluster: ClusterOption = "detect",
    batch: BatchOption = None,
    mesh: MeshOption = None,
    force: ForceOption = None,
    optimizer: OptimizerOption = "adamw",
    autocast: AutocastOption = None,
    accumulate: AccumulateOption = 1,
    memory_limit: LimitOption = None,
    places: PlacesOption = "auto",
    objective: ObjectiveOption = "time",
    disk_path: Annotated[Path | None, typer.Option(help="Folder for what the plan puts on disk; else the system's temporary one.")] = None,
    seed: Annotated[int, typer.Option(help="Of dropout.")] = 0,
    lean: Annotated[bool, typer.Option("--lean", help="On a CPU: give freed memory back to the system at once. Slower.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan a model here, or take a plan, and train some steps (under torchrun, on all ranks): times, bytes and losses, with predictions."""
    from . import calibration
    from .runtime.resident import return_freed_memory

    leads = calibration.join_job() == 0
    given = {"mesh": None if mesh is None else parse_sizes(mesh, "--mesh"), "force": force, "autocast": autocast_dtype(autocast)}
    sizes, made = batch_sizes(batch), None
    if is_plan_file(model):
        made = load_plan(Path(model))
        chosen = {"places": (places, "auto"), "accumulate": (accumulate, 1), "objective": (objective, "time")}
        options = {name: None if value == usual else value for name, (value, usual) in chosen.items()}
        _refuse_beside_a_plan({**given, **options, "memory-limit": memory_limit, "batch": batch})
        model, optimizer, sizes = source_of(made, model), made.model.get("optimizer", optimizer), planned_sizes(made)
    where = Cluster.resolve(made.cluster["name"] if made is not None and cluster == "detect" else cluster)
    limits: Any = None if memory_limit is None else limits_of(memory_limit, where)
    if made is not None:
        limits = made.limits
    if lean:
        return_freed_memory()
    from .compiler import api
    from .measured_run import run_steps
    from .runtime.memory import MemoryLimitError
    from .runtime.tiers import TierError

    built, example = materialised(model, sizes)
    step = api.compile(
        built, where, optimizer=named_optimizer(optimizer, built), memory_limit=limits, places=places, objective=objective,
        disk_path=disk_path, seed=seed, keep_model=False, plan=made,
        accumulate=None if made is not None else accumulate, **given,
    )  # fmt: skip
    try:
        with busy(f"planning {model} on {where.name}") if leads else contextlib.nullcontext():
            step.prepare(example)
    except TierError as error:
        raise ValueError(str(error)) from error
    try:
        with steps_bar("training", leads and not as_json) as progress:
            measured, losses = run_steps(step, example, steps, progress)
    except (MemoryLimitError, TierError, ArithmeticError) as error:
        raise CheckFailed(str(error)) from error
    if leads:
        _report_run(model, where.name, step.plan, measured, losses, as_json)


def _refuse_beside_a_plan(given: Mapping[str, Any]) -> None:
    """Options that a plan has answered already."""
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"{', '.join(named)} cannot be given beside a plan file, which says it; leave it away, or give the model")


def materialised(spec: str, sizes: tuple[int, int] | None) -> tuple[Any, Any]:
    """(model, batch) with weights: models of the zoo that come on the meta device are made again on the CPU, with random weights."""
    import torch

    from . import zoo

    model, batch = resolve_model(spec, sizes)
    if ":" in spec or not any(p.device.type == "meta" for p in model.parameters()):
        return model, batch
    row = zoo.row(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zoo.SEED)
        made = (type(model)(model.config) if row.config else type(model)(**row.kwargs)).train()
        return made, row.make_batch(row, made, sizes or row.batch)


def _report_run(model: str, cluster: str, plan: Any, measured: Any, losses: list[float], as_json: bool) -> None:
    from .measured_run import exceeded

    predicted = {name: plan.predicted.get(name) for name in ("step_time_s", "peak_bytes", "joules", "price")}
    limits = dict(plan.limits)
    if as_json:
        print_json(
            {"model": model, "cluster": cluster, "mesh": list(plan.mesh), "accumulate": plan.accumulate, "limits": limits,
             "measured": measured.to_dict(), "predicted": predicted, "residency": plan.residency, "state": plan.state, "losses": losses}
        )  # fmt: skip
    else:
        facts = {"step": f"{seconds_text(predicted['step_time_s'])} / {seconds_text(measured.step_time_s)}"}
        for pool, num_bytes in measured.peak_bytes.items():
            if num_bytes or predicted["peak_bytes"].get(pool):
                allowed = f", {bytes_text(limits[pool])} allowed" if pool in limits else ""
                facts[f"peak on {pool}"] = f"{bytes_text(predicted['peak_bytes'].get(pool, 0))} / {bytes_text(num_bytes)}{allowed}"
        facts["offloaded a step"] = bytes_text(measured.offloaded_bytes)
        facts["fetched a step"] = bytes_text(measured.fetched_bytes)
        facts["ops run twice"] = str(measured.recomputed_ops)
        facts["loss"] = f"{losses[0]:.6g} at first, {losses[-1]:.6g} at step {len(losses)}"
        screen.print(pairs_table(f"{model} on {cluster}: predicted / measured", facts))
    over = exceeded(measured.peak_bytes, limits)
    if over:
        raise CheckFailed("; ".join(over), printed=True)
