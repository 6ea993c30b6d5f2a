"""Memory: the frontier of time against device memory, what is predicted against what is measured, and training larger than memory.

    python -m bench.memory [--parts frontier,peaks,times,tight] [--json] [-o bench/results]
    python -m bench.memory --efficiency [--json]

frontier    predicted step time at several device limits, ours against per-block and selective checkpointing, offloading of the optimizer,
            offloading of everything (`compiler.place_recipes`) and ZeRO-3, of the same mesh and cost model: 6 models x 3 clusters
peaks       predicted peak bytes per pool against the executor's account in real runs on this CPU with the disk tier: models x limits
times       measured step time on this CPU with the disk tier, against checkpointing and offload-all of the same runtime, taking turns
tight       a model whose state and activations need 4 times the device limit, trained in a process whose memory is limited, against the
            same step without limit
efficiency  predicted step time of models larger than the GPU against the same GPU with unlimited memory, beside the bound of arithmetic

Each part is a file bench/results/memory-PART.json with rows, a summary, machine, versions and commit. A part that was stopped goes on where
it was, with the rows it has; `--again` makes them anew. Exit status 1 where a part does not hold what it is to show.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import memory_frontier, memory_runs

RESULTS = Path(__file__).parent / "results"
PARTS = ("frontier", "peaks", "times", "tight")
EFFICIENCY = "efficiency"
Row = dict[str, Any]


def provenance() -> Row:
    """Machine, versions and commit, as they are now."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": done.stdout.strip() or "unknown",
    }


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


class Part:
    """A part's file: rows, summary and provenance."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.path = folder / f"memory-{name}.json"

    def rows(self) -> list[Row]:
        """What is there."""
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def save(self, rows: list[Row], summary: Row) -> Row:
        """Replace it; returns the content."""
        content = {**provenance(), "summary": summary, "rows": rows}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)
        return content


def run_part(name: str, args: argparse.Namespace) -> Row:
    """Make one part's rows and keep them."""
    part = Part(name, args.output)
    kept = [] if args.again else part.rows()
    planned: dict[str, tuple[Callable[[Any], list[Row]], Callable[[list[Row]], Row]]] = {
        "frontier": (lambda save: memory_frontier.frontier(args.models, args.clusters, kept, save), memory_frontier.frontier_summary),
        EFFICIENCY: (lambda save: memory_frontier.efficiency(_cases(args.models), kept, save), efficiency_summary),
    }
    if name in planned:
        make, summarise = planned[name]
        rows = make(lambda found: part.save(found, summarise(found)))
        return part.save(rows, summarise(rows))
    make_rows, summarise = memory_runs.PARTS[name]
    rows = make_rows(args.disk_path, kept, lambda found: part.save(found, summarise(found)))
    return part.save(rows, summarise(rows))


def _cases(models: list[str]) -> list[tuple[str, str]]:
    """(model, cluster) of the efficiency table."""
    return [case for case in memory_frontier.EFFICIENCY if case[0] in models]


def efficiency_summary(rows: list[Row]) -> Row:
    """Efficiencies by model, and whether all were planned in time. The rest is to be read beside the bound."""
    return {
        "by_model": {
            f"{row['model']} on {row['cluster']}, batch {row['batch'][0]}": {
                "efficiency": row["efficiency"], "bound": row["bound_efficiency"], "binds": row["bound"]["binds"],
            }
            for row in rows
        },
        "holds": all(row["planned_in_time"] and row["ours"] for row in rows),
    }  # fmt: skip


def text_of(name: str, content: Row) -> str:
    """A part for people."""
    tables = {"frontier": memory_frontier.frontier_table, EFFICIENCY: memory_frontier.efficiency_table} | memory_runs.TABLES
    summary = "\n".join(f"{key}: {value}" for key, value in content["summary"].items())
    return f"## {name}\n\n{tables[name](content['rows'])}\n{summary}\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; an unknown part or model ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--efficiency", action="store_true", help="the efficiency table instead")
    parser.add_argument("--models", default=None, help="of the frontier, or of the efficiency table")
    parser.add_argument("--clusters", default=",".join(memory_frontier.CLUSTERS), help="of the frontier")
    parser.add_argument("--disk-path", default=None, help="folder of the disk tier (default: the system's temporary one)")
    parser.add_argument("--again", action="store_true", help="plan rows anew that are in the results already")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.parts = [EFFICIENCY] if args.efficiency else args.parts.split(",")
    models = [name for name, _ in memory_frontier.EFFICIENCY] if args.efficiency else list(memory_frontier.MODELS)
    args.models, args.clusters = args.models.split(",") if args.models else models, args.clusters.split(",")
    for what, given, known in (("part", args.parts, (*PARTS, EFFICIENCY)), ("model", args.models, models)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {what} {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where every part holds what it is to show."""
    args = parse_args(argv)
    found = {name: run_part(name, args) for name in args.parts}
    print(json.dumps(found) if args.json else "\n".join(text_of(name, content) for name, content in found.items()))
    return 0 if all(content["summary"]["holds"] for content in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
