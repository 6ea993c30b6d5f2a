"""Planning time, capture to verified plan, and how it grows with equal layers.

    python -m bench.planning [--models gpt2,opt-30b,llama-70b] [--growth 12,24,48,96] [--json] [-o docs/planning.md]

Each model is planned twice in one process; the second run is reported (the first loads code and compiles the solver's kernels where their
cache is empty). Exit status 1 where a time exceeds its goal or the solve time more than doubles from the first depth to the last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import opweave as ow
from opweave import zoo

# model → (cluster, global batch, goal in seconds)
CASES: dict[str, tuple[str, tuple[int, int], float]] = {
    "gpt2": ("dgx-a100-640", (8, 1024), 5.0),
    "opt-30b": ("dgx-a100-640", (8, 1024), 30.0),
    "llama-70b": ("dgx-a100-640x4", (8, 2048), 60.0),
}


def planned(name: str) -> dict[str, Any]:
    """One row: the seconds of each stage."""
    cluster, batch_size, goal = CASES[name]
    for _ in range(2):
        model, batch = zoo.load(name, batch_size)
        plan = ow.plan(model, cluster, batch, optimizer=torch.optim.AdamW(model.parameters()))
    return _row(name, cluster, plan) | {"goal_s": goal, "holds": plan.planning_time_s["total"] <= goal}


def grown(depths: list[int]) -> list[dict[str, Any]]:
    """OPT of 2048 features at several depths, on one mesh."""
    from transformers import OPTConfig, OPTForCausalLM

    rows = []
    for depth in depths:
        config = OPTConfig(
            hidden_size=2048, ffn_dim=8192, num_hidden_layers=depth, num_attention_heads=32, dropout=0.0, word_embed_proj_dim=2048
        )
        with torch.device("meta"):
            model = OPTForCausalLM(config)
        ids = torch.zeros(16, 512, dtype=torch.int64)
        for _ in range(2):
            batch = {"input_ids": ids, "labels": ids}
            plan = ow.plan(model, "dgx-a100-640", batch, optimizer=torch.optim.AdamW(model.parameters()), mesh=(2, 4))
        rows.append(_row(f"opt 2048 x {depth} layers", "dgx-a100-640", plan))
    return rows


def _row(name: str, cluster: str, plan: ow.Plan) -> dict[str, Any]:
    return {
        "model": name,
        "cluster": cluster,
        "mesh": "x".join(map(str, plan.mesh)),
        "num_meshes": len(plan.candidates),
        "gap": plan.solver["gap"],
        **{f"{stage}_s": seconds for stage, seconds in plan.planning_time_s.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table."""
    stages = ("capture", "strategies", "pricing", "solve", "verify", "total")
    lines = ["| model | cluster | meshes tried | " + " | ".join(f"{s}, s" for s in stages) + " | gap |", "|---" * (len(stages) + 4) + "|"]
    for row in rows:
        times = " | ".join(f"{row[f'{s}_s']:.2f}" for s in stages)
        lines.append(f"| {row['model']} | {row['cluster']} | {row['num_meshes']} | {times} | {row['gap']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--growth", default="12,24,48,96")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output")
    args = parser.parse_args()
    rows = [planned(name) for name in args.models.split(",") if name]
    depths = [int(d) for d in args.growth.split(",") if d]
    growth = grown(depths)
    ratio = growth[-1]["solve_s"] / growth[0]["solve_s"] if growth else None
    if args.output:
        Path(args.output).write_text(_HEAD + markdown(rows) + "\n" + markdown(growth))
    print(json.dumps({"rows": rows, "growth": growth, "solve_growth": ratio}) if args.json else markdown(rows + growth))
    return 0 if all(row["holds"] for row in rows) and (ratio is None or ratio < 2) else 1


_HEAD = """# Planning time

Seconds from capture to verified plan, all mesh candidates of the cluster, on two shared cores; made by
`python -m bench.planning -o docs/planning.md`. "verify" lowers the plan and runs it without data for its exact peak memory.

"""

if __name__ == "__main__":
    sys.exit(main())
