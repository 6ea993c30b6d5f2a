"""Commands that hold a plan or a cluster file against something: `verify`, `simulate`, `compare`, `calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_base import (
    BatchOption,
    CheckFailed,
    ForceOption,
    JsonOption,
    Stages,
    app,
    batch_sizes,
    busy,
    is_plan_file,
    load_plan,
    named_dtype,
    named_optimizer,
    parse_sizes,
    planned_sizes,
    print_json,
    reports_errors,
    resolve_model,
    screen,
    source_of,
    steps_bar,
)
from .cli_tables import (
    bytes_text,
    cell,
    cluster_row,
    joules_text,
    mesh_text,
    pairs_table,
    plain,
    price_text,
    rate_text,
    rows_table,
    seconds_text,
)
from .cost_model.cluster import Cluster

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file made by `opweave plan`.")]


@app.command()
@reports_errors
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL|PLAN", help="A zoo model, package.module:function, or a plan file.")],
    ranks: Annotated[str | None, typer.Option(metavar="2x4", help="Mesh of the ranks run in lockstep.")] = None,
    batch: BatchOption = None,
    dtype: Annotated[str | None, typer.Option(help="float64 (default), float32 (default under autocast) or bfloat16.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or momentum.")] = "adamw",
    force: ForceOption = None,
    accumulate: Annotated[int | None, typer.Option("--accumulate", metavar="K", min=1, help="Micro-batches of a step.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative difference allowed; 1e-10 in float64, 1e-5 in float32.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a plan on all its ranks in this process and compare loss and parameters with the unsplit model."""
    sizes, made = batch_sizes(batch), None
    if is_plan_file(model):
        made = load_plan(Path(model))
        model, optimizer, force = source_of(made, model), made.model.get("optimizer", optimizer), force or made.force
        sizes = sizes or planned_sizes(made)
        ranks = _ranks_of(made, ranks, accumulate)
    if ranks is None:
        raise ValueError("--ranks is missing; give the mesh to check, for example --ranks 2x4")
    mesh = parse_sizes(ranks, "--ranks")
    autocast = None if made is None else made.autocast
    kind = named_dtype(dtype or ("float64" if autocast is None else "float32"))
    how = str(kind).removeprefix("torch.") if autocast is None else f"{autocast} autocast"
    with busy(f"running {model} on {ranks} ranks in lockstep"):
        from .compiler import api
        from .compiler.verify import VerificationError

        built, example = resolve_model(model, sizes)
        chosen = named_optimizer(optimizer, built)
        if made is not None:
            from .compiler.timeline import in_any_precision

            made = in_any_precision(made, built, example, chosen)
        try:
            report = api.verify(
                built, example, ranks=mesh, optimizer=chosen, steps=steps, dtype=kind, force=force, plan=made, accumulate=accumulate,
                tolerance=tolerance,
            )  # fmt: skip
        except (VerificationError, ArithmeticError) as error:
            raise CheckFailed(str(error)) from error
    result = {key: plain(getattr(report, key)) for key in ("max_relative_difference", "collectives", "replicated_ops")}
    if as_json:
        print_json({"model": model, "ranks": list(mesh), **result})
    else:
        screen.print(pairs_table(f"{model} on {ranks} ranks, {steps} steps in {how}", {k: str(v) for k, v in result.items()}))


def _ranks_of(made: Any, ranks: str | None, accumulate: int | None) -> str:
    """--ranks of a plan. Raises ValueError where an option contradicts the plan."""
    planned = mesh_text(made.mesh)
    if ranks is not None and parse_sizes(ranks, "--ranks") != made.mesh:
        raise ValueError(f"the plan is for the mesh {planned}, --ranks is {ranks}; leave --ranks away")
    if accumulate not in (None, made.accumulate):
        raise ValueError(f"the plan is for {made.accumulate} micro-batches, --accumulate is {accumulate}; leave --accumulate away")
    return planned


def _rebuilt(spec: str, made: Any) -> tuple[Any, Any, Any]:
    """(model, batch, optimizer) that a plan was made for."""
    model, batch = resolve_model(spec, planned_sizes(made))
    return model, batch, named_optimizer(made.model.get("optimizer", "adamw"), model)


@app.command()
@reports_errors
def simulate(
    plan_file: PlanArgument,
    cluster: Annotated[str | None, typer.Option("--cluster", "-c", help="Price it for this cluster instead of the plan's.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the timeline as Chrome/Perfetto trace JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate one step of a plan, instruction by instruction: step time, streams, memory peak with its owners."""
    from .cost_model.simulate import chrome_trace

    made = load_plan(plan_file)
    spec = source_of(made, str(plan_file))
    where = Cluster.resolve(cluster or made.cluster["name"])
    if where.num_devices != made.cluster.get("num_devices", where.num_devices):
        raise ValueError(
            f"the plan is for {made.cluster['num_devices']} devices, cluster {where.name!r} has {where.num_devices}; give one of that size"
        )
    with busy(f"simulating {spec} on {where.name}"):
        from .compiler.timeline import timeline_of_plan

        stages = Stages()
        with stages("model"):
            built, example, optimizer = _rebuilt(spec, made)
        line = timeline_of_plan(made, built, example, where, optimizer=optimizer, stage=stages)
        with stages("simulation"):
            result = line.simulate()
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(line.instructions, result)))
    _show_simulation(line, result, made, where, stages.seconds, as_json)


def _show_simulation(line: Any, result: Any, made: Any, where: Any, stages_s: dict[str, float], as_json: bool) -> None:
    from .cost_model.energy import step_joules, step_price
    from .cost_model.simulate import COMPUTE, seconds_per_class

    classes = {k: v for k, v in sorted(seconds_per_class(line.instructions, result).items(), key=lambda pair: -pair[1]) if v > 0}
    peaks = {pool: peak.num_bytes for pool, peak in result.peaks.items()}
    owners = {pool: [{"owner": o, "bytes": n} for o, n in peak.owners[:10]] for pool, peak in result.peaks.items()}
    report = {
        "step_time_s": result.step_time_s,
        "streams": result.busy_s,
        "exposed_s": result.exposed_s,
        "peak_bytes": peaks,
        "owners": owners,
        "classes": classes,
        "num_instructions": len(line.instructions),
        "simulation_time_s": stages_s["simulation"],
        "stages_s": stages_s,
        "planned_step_time_s": made.predicted["step_time_s"],
        "joules": step_joules(where, result.step_time_s, result.busy_s.get(COMPUTE, 0.0)),
        "price": step_price(where, result.step_time_s),
    }
    if as_json:
        print_json(report)
        return
    facts = {
        "step": f"{seconds_text(result.step_time_s)} (the plan says {seconds_text(made.predicted['step_time_s'])})",
        "busy": cell("_s", result.busy_s),
        "exposed": cell("_s", result.exposed_s) or "none",
        "simulated in": f"{cell('_s', stages_s)} of the processor",
        "peak": cell("bytes", peaks),
        "energy": joules_text(report["joules"]) or "-",
        "price": price_text(report["price"]) or "-",
    }
    screen.print(pairs_table(f"{len(line.instructions)} instructions on {where.name}", facts))
    screen.print(rows_table("seconds by class", [{"class": k, "time": v} for k, v in classes.items()]))
    for pool, rows in owners.items():
        screen.print(rows_table(f"peak of {pool}: {bytes_text(peaks[pool])}", rows))


@app.command()
@reports_errors
def compare(
    plan_file: PlanArgument,
    cluster: Annotated[str | None, typer.Option("--cluster", "-c", help="Predict with this cluster instead of the plan's.")] = None,
    profile: Annotated[Path | None, typer.Option("--profile", help="Read this recorded profile instead of running.")] = None,
    record: Annotated[Path | None, typer.Option("--record", help="Write the profile of this run.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write corrections for `calibrate --from-profile`.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Run a plan here (under torchrun with as many ranks as it has) and print predicted against measured."""
    from . import calibration, comparison

    made = load_plan(plan_file)
    spec = source_of(made, str(plan_file))
    leads = calibration.join_job() == 0
    where = Cluster.resolve(cluster or made.cluster["name"])
    built, example, optimizer = _rebuilt(spec, made)
    given = comparison.Profile.from_dict(json.loads(profile.read_text())) if profile is not None else None
    report, found = comparison.compare(made, built, example, where, optimizer=optimizer, profile=given, steps=steps)
    if not leads:
        return
    for path, data in ((record, found.to_dict()), (output, {"factors": report["factors"]})):
        if path is not None:
            path.write_text(json.dumps(data, indent=1))
    _show_comparison(spec, report, as_json)


def _show_comparison(spec: str, report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    predicted, measured = report["predicted"], report["measured"]
    facts = {
        "step": f"{seconds_text(predicted['step_time_s'])} / {seconds_text(measured['step_time_s'])} ({report['step_time_error']:+.0%})",
        "peak": f"{bytes_text(predicted['peak_bytes'])} / {bytes_text(measured['peak_bytes'])} ({report['peak_error']:+.0%})",
    }
    screen.print(pairs_table(f"{spec}: predicted / measured", facts))
    screen.print(rows_table("by class", report["rows"]))


@app.command()
@reports_errors
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="The cluster file to write.")] = Path("cluster.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and shorter runs.")] = False,
    check: Annotated[Path | None, typer.Option("--check", help="Measure a few samples again: does this file still hold?")] = None,
    from_profile: Annotated[Path | None, typer.Option("--from-profile", help="Correct the file OUTPUT by a recorded profile.")] = None,
    memory_share: Annotated[float, typer.Option(help="Largest share of the memory to use.")] = 0.25,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine and write its cluster file; under torchrun, all ranks together. An interrupted run goes on where it was."""
    from . import calibration
    from .cost_model.calibrate import Options

    if check is not None:
        _check_calibration(check, as_json)
    elif from_profile is not None:
        _correct_calibration(output, from_profile, as_json)
    else:
        leads = calibration.join_job() == 0
        options = Options(quick=quick, memory_share=memory_share, folder=output.resolve().parent)
        with steps_bar("calibrating", leads) as progress:
            made = calibration.calibrate_here(output, options, progress)
        if leads:
            _show_calibration(output, made, as_json)


def _show_calibration(path: Path, made: Any, as_json: bool) -> None:
    found = made.calibration
    if as_json:
        print_json({"file": str(path), "calibration": found, "cluster": cluster_row(made)})
        return
    facts = {
        "file": path,
        "devices": f"{made.num_nodes} x {made.devices_per_node} {made.device.name}",
        "float32": rate_text(made.device.flops_per_s("float32")) + "FLOP/s",
        "memory": rate_text(made.device.memory_bandwidth_bytes_per_s) + "B/s",
        "overlap": f"{made.overlap:.0%}",
        "took": f"{found['seconds']} s",
    }
    screen.print(pairs_table("calibrated", facts))
    screen.print(rows_table("relative error on held-out samples", [{"class": k, **v} for k, v in found["residuals"].items()]))


def _check_calibration(path: Path, as_json: bool) -> None:
    from . import calibration

    leads = calibration.join_job() == 0
    report = calibration.check_here(Cluster.load(path))
    if leads and as_json:
        print_json(report)
    elif leads:
        screen.print(rows_table(f"{path}: predicted against measured now", report["rows"]))
        screen.print(f"median error {report['median_error']:.0%}, {report['tolerance']:.0%} is allowed")
    if not report["holds"]:
        raise CheckFailed(
            f"{path} does not hold here any more: median error {report['median_error']:.0%}; run `opweave calibrate -o {path}`",
            printed=True,
        )


def _correct_calibration(path: Path, profile: Path, as_json: bool) -> None:
    from .cost_model.fit_cluster import corrected

    data = json.loads(profile.read_text())
    factors = data.get("factors") if isinstance(data, dict) else None
    if not isinstance(factors, dict) or not all(isinstance(f, int | float) for f in factors.values()):
        raise ValueError(f'{profile} has no corrections: it needs {{"factors": {{"matmul/float32": 1.1, ...}}}}')
    corrected(Cluster.load(path), factors).save(path)
    if as_json:
        print_json({"file": str(path), "factors": factors})
    else:
        screen.print(f"{path}: {len(factors)} curves corrected")
