"""The command line. `--json` prints exactly one JSON object on stdout; everything else that is said then goes to stderr.

Exit status: 0 when what was asked holds, 1 when a check does not hold, 2 for bad input, 130 when interrupted.
Heavy modules are imported inside the commands, so that `opweave --help` answers at once. Here are the commands about plans and about what
ships; `cli_checks` has those that hold a plan against something, `cli_memory` those about memory, `cli_base` what all share.
"""

from __future__ import annotations

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
    app,
    autocast_dtype,
    batch_sizes,
    busy,
    escaped,
    limits_of,
    load_plan,
    messages,
    named_optimizer,
    parse_sizes,
    print_json,
    reports_errors,
    resolve_model,
    screen,
)
from .cli_checks import calibrate, compare, simulate, verify
from .cli_memory import frontier, refusals_explained, run, smallest_plan
from .cli_tables import (
    cluster_row,
    cluster_table,
    clusters_table,
    memory_tables,
    mesh_text,
    pairs_table,
    plain,
    plan_summary,
    rows_table,
    seconds_text,
)
from .cost_model.cluster import Cluster, preset_names


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
    keys = (
        "mesh", "objective", "accumulate", "planning_time_s", "predicted", "solver", "patterns", "replicated_ops", "limits", "residency",
        "state", "force", "places", "autocast",
    )  # fmt: skip
    return {**names, **{key: plain(getattr(made, key)) for key in keys}}


def _show_plan(made: Any, as_json: bool, **names: str) -> None:
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
def models(as_json: JsonOption = False) -> None:
    """List the models that ship: name, family, parameters, default batch and where the sizes come from."""
    from . import zoo

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
    from .compiler.solver.command import solve_file

    answer = solve_file(file, time_limit, seed, output, progress=messages.is_terminal)
    if as_json:
        print_json(answer)
    else:
        screen.print(pairs_table(str(file), {k: str(v) for k, v in answer.items() if k != "solution"}))
    if answer.get("status") == "infeasible":
        raise CheckFailed(str(answer.get("reason") or "no selection fits the memory limits"), printed=as_json)


# `opweave --help` lists them in this order.
_COMMANDS = (plan, run, frontier, show, explain, diff, verify, simulate, compare, calibrate, models, clusters, solve)
app.registered_commands.sort(key=lambda command: _COMMANDS.index(command.callback))


if __name__ == "__main__":
    main()
