"""The command line. `--json` prints exactly one JSON object on stdout; everything else that is said then goes to stderr.

Exit status: 0 when what was asked holds, 1 when a check does not hold, 2 for bad input, 130 when interrupted.
Heavy modules are imported inside the commands, so that `opweave --help` answers at once. `cli_base` has what all commands share,
`cli_memory` the commands about memory.
"""

from __future__ import annotations

import json
import warnings
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
    Stages,
    app,
    autocast_dtype,
    batch_sizes,
    busy,
    escaped,
    is_plan_file,
    limits_of,
    load_plan,
    messages,
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
from .cli_memory import refusals_explained, smallest_plan


def main() -> None:
    """Entry point of the console script."""
    warnings.showwarning = lambda message, *_, **__: messages.print(f"[yellow]warning:[/] {escaped(str(message))}", soft_wrap=True)
    app()


@app.command()
@reports_errors
def plan(
    model: Model,
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
    minimise: Annotated[str | None, typer.Option(metavar="memory", help="Find the smallest device memory that works.")] = None,
    suggestions: Annotated[bool, typer.Option(help="Where nothing fits, try for a minute what would.")] = True,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a model's training step for a cluster. Needs no GPU and allocates no weights."""
    from .cost_model.cluster import Cluster

    if minimise not in (None, "memory"):
        raise ValueError(f"--minimise {minimise!r} is nothing that can be minimised beside the --objective; known is memory")
    where = Cluster.resolve(cluster)
    sizes, limits = batch_sizes(batch), None if memory_limit is None else limits_of(memory_limit, where)
    options = {"mesh": None if mesh is None else parse_sizes(mesh, "--mesh"), "force": force, "places": places, "objective": objective}
    with busy(f"planning {model} on {where.name}") as doing:
        from .compiler import api

        built, example = resolve_model(model, sizes)
        given = {
            "optimizer": named_optimizer(optimizer, built), "autocast": autocast_dtype(autocast), "accumulate": accumulate,
            "memory_limit": limits, **options,
        }  # fmt: skip
        with refusals_explained(built, where, example, given, doing if suggestions else None, as_json):
            made = smallest_plan(built, where, example, given, doing) if minimise else api.plan(built, where, example, **given)
    # What `verify PLAN` needs to build the model again; the planner itself never sees a name of the zoo.
    made.model.update(spec=model, batch=list(sizes or ()), optimizer=optimizer)
    if output is not None:
        made.save(output)
    _show_plan(made, as_json, model=model, cluster=where.name)


def plan_report(made: Any, **names: str) -> dict[str, Any]:
    """What `plan` and `show` print with --json."""
    from .cli_tables import plain

    keys = (
        "mesh", "objective", "accumulate", "planning_time_s", "predicted", "solver", "patterns", "replicated_ops", "limits", "residency",
        "state", "force", "places", "autocast",
    )  # fmt: skip
    return {**names, **{key: plain(getattr(made, key)) for key in keys}}


def _show_plan(made: Any, as_json: bool, **names: str) -> None:
    from .cli_tables import memory_tables, plain, plan_summary, rows_table

    report = plan_report(made, **names)
    if as_json:
        print_json(report)
        return
    screen.print(plan_summary(report))
    for table in memory_tables(report):
        screen.print(table)
    rows = plain(list(made.modules))
    if rows:
        screen.print(rows_table("modules", rows))


@app.command()
@reports_errors
def show(plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")], as_json: JsonOption = False) -> None:
    """Show a plan: mesh, patterns by their usual names, predicted time and memory, and how each module is split."""
    made = load_plan(plan_file)
    _show_plan(made, as_json, model=made.model.get("spec", made.model["name"]), cluster=made.cluster["name"])


@app.command()
@reports_errors
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    module: Annotated[str, typer.Argument(help="Only modules whose path contains this.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Explain a plan module by module, and name the ops that run replicated with the reason."""
    from .cli_tables import plain, rows_table

    made = load_plan(plan_file)
    rows = [row for row in plain(list(made.modules)) if module in str(row.get("path", ""))]
    if module and not rows:
        raise ValueError(f"no module of the plan has {module!r} in its path; `opweave show {plan_file}` lists them")
    replicated = plain(list(made.replicated_ops))
    if as_json:
        print_json({"modules": rows, "replicated_ops": replicated})
        return
    screen.print(rows_table("modules", rows))
    if replicated:
        screen.print(rows_table("replicated", [row if isinstance(row, dict) else {"op": row} for row in replicated]))
    else:
        screen.print("every op of the plan has a rule")


@app.command()
@reports_errors
def diff(
    first: Annotated[Path, typer.Argument(help="A plan file.")],
    second: Annotated[Path, typer.Argument(help="Another plan file.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two plans: predictions, and the modules that are split differently."""
    from .cli_tables import mesh_text, pairs_table, plain, rows_table, seconds_text

    a, b = load_plan(first), load_plan(second)
    changed = _changed_modules(plain(list(a.modules)), plain(list(b.modules)))
    times = [plain(p.predicted)["step_time_s"] for p in (a, b)]
    if as_json:
        print_json({"mesh": [list(a.mesh), list(b.mesh)], "step_time_s": times, "modules": changed})
        return
    shown = zip((first, second), (a, b), times, strict=True)
    screen.print(pairs_table("plans", {str(path): f"mesh {mesh_text(p.mesh)}, step {seconds_text(time)}" for path, p, time in shown}))
    screen.print(rows_table("modules that differ", changed) if changed else "all modules are split equally")


def _changed_modules(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[dict[str, Any]]:
    before, after = ({row.get("path"): row for row in rows} for rows in (a, b))
    rows = []
    for path in [*before, *(p for p in after if p not in before)]:
        old, new = (rows_of.get(path, {}).get("layout", "absent") for rows_of in (before, after))
        if old != new:
            rows.append({"path": path, "first": old, "second": new})
    return rows


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
    from .cli_tables import pairs_table, plain

    sizes, made = batch_sizes(batch), None
    if is_plan_file(model):
        made = load_plan(Path(model))
        model, optimizer, force = source_of(made, model), made.model.get("optimizer", optimizer), force or made.force
        sizes = sizes or planned_sizes(made)
        ranks = ranks or "x".join(map(str, made.mesh))
        if parse_sizes(ranks, "--ranks") != made.mesh:
            raise ValueError(f"the plan is for the mesh {'x'.join(map(str, made.mesh))}, --ranks is {ranks}; leave --ranks away")
        if accumulate not in (None, made.accumulate):
            raise ValueError(f"the plan is for {made.accumulate} micro-batches, --accumulate is {accumulate}; leave --accumulate away")
    if ranks is None:
        raise ValueError("--ranks is missing; give the mesh to check, for example --ranks 2x4")
    mesh = parse_sizes(ranks, "--ranks")
    autocast = None if made is None else made.autocast
    kind = named_dtype(dtype or ("float64" if autocast is None else "float32"))
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
        how = str(kind).removeprefix("torch.") if autocast is None else f"{autocast} autocast"
        title = f"{model} on {ranks} ranks, {steps} steps in {how}"
        screen.print(pairs_table(title, {k: str(v) for k, v in result.items()}))


@app.command()
@reports_errors
def models(as_json: JsonOption = False) -> None:
    """List the models that ship: name, family, parameters, default batch and where the sizes come from."""
    from . import zoo
    from .cli_tables import rows_table

    rows = zoo.describe()
    if as_json:
        print_json({"models": rows})
    else:
        screen.print(rows_table("models", rows))


@app.command()
@reports_errors
def clusters(
    name: Annotated[str | None, typer.Argument(help="Show every constant of this cluster with its source.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the clusters that ship, or show one (also `detect`, or a cluster file) with the source of every constant."""
    from .cli_tables import cluster_row, cluster_table, clusters_table
    from .cost_model.cluster import Cluster, preset_names

    if name is not None:
        found = Cluster.resolve(name)
        if as_json:
            print_json(found.to_dict())
        else:
            screen.print(cluster_table(found))
        return
    found_all = [Cluster.preset(n) for n in preset_names()]
    if as_json:
        print_json({"clusters": [cluster_row(c) for c in found_all]})
    else:
        screen.print(clusters_table(found_all))


@app.command()
@reports_errors
def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file made by `opweave plan`.")],
    cluster: Annotated[str | None, typer.Option("--cluster", "-c", help="Price it for this cluster instead of the plan's.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the timeline as Chrome/Perfetto trace JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate one step of a plan, instruction by instruction: step time, streams, memory peak with its owners."""
    from .cost_model.cluster import Cluster
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
            built, example = resolve_model(spec, planned_sizes(made))
            optimizer = named_optimizer(made.model.get("optimizer", "adamw"), built)
        line = timeline_of_plan(made, built, example, where, optimizer=optimizer, stage=stages)
        with stages("simulation"):
            result = line.simulate()
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(line.instructions, result)))
    _show_simulation(line, result, made, where, stages.seconds, as_json)


def _show_simulation(line: Any, result: Any, made: Any, where: Any, stages_s: dict[str, float], as_json: bool) -> None:
    from .cli_tables import bytes_text, cell, joules_text, pairs_table, price_text, rows_table, seconds_text
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
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file made by `opweave plan`.")],
    cluster: Annotated[str | None, typer.Option("--cluster", "-c", help="Predict with this cluster instead of the plan's.")] = None,
    profile: Annotated[Path | None, typer.Option("--profile", help="Read this recorded profile instead of running.")] = None,
    record: Annotated[Path | None, typer.Option("--record", help="Write the profile of this run.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write corrections for `calibrate --from-profile`.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Run a plan here (under torchrun with as many ranks as it has) and print predicted against measured."""
    from . import calibration, comparison
    from .cost_model.cluster import Cluster

    made = load_plan(plan_file)
    spec = source_of(made, str(plan_file))
    leads = calibration.join_job() == 0
    where = Cluster.resolve(cluster or made.cluster["name"])
    built, example = resolve_model(spec, planned_sizes(made))
    given = comparison.Profile.from_dict(json.loads(profile.read_text())) if profile is not None else None
    optimizer = named_optimizer(made.model.get("optimizer", "adamw"), built)
    report, found = comparison.compare(made, built, example, where, optimizer=optimizer, profile=given, steps=steps)
    if not leads:
        return
    for path, data in ((record, found.to_dict()), (output, {"factors": report["factors"]})):
        if path is not None:
            path.write_text(json.dumps(data, indent=1))
    _show_comparison(spec, report, as_json)


def _show_comparison(spec: str, report: dict[str, Any], as_json: bool) -> None:
    from .cli_tables import bytes_text, pairs_table, rows_table, seconds_text

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
    from .cli_tables import cluster_row, pairs_table, rate_text, rows_table

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
    from .cli_tables import rows_table
    from .cost_model.cluster import Cluster

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
    from .cost_model.cluster import Cluster
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


@app.command()
@reports_errors
def solve(
    file: Annotated[Path, typer.Argument(help="A selection problem in the JSON of the ASPLOS/EuroSys 2025 contest.")],
    time_limit: Annotated[float, typer.Option(help="Seconds, reading the file included.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The same seed and work give the same answer.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the solution to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Solve a selection problem; prints cost, proven lower bound and status."""
    if not time_limit > 0:
        raise ValueError(f"--time-limit is {time_limit:g}; it must be above 0 seconds")
    from .cli_tables import pairs_table
    from .compiler.solver.command import solve_file

    answer = solve_file(file, time_limit, seed, output, progress=messages.is_terminal)
    if as_json:
        print_json(answer)
    else:
        screen.print(pairs_table(str(file), {k: str(v) for k, v in answer.items() if k != "solution"}))
    if answer.get("status") == "infeasible":
        raise CheckFailed(str(answer.get("reason") or "no selection fits the memory limits"), printed=as_json)


if __name__ == "__main__":
    main()
