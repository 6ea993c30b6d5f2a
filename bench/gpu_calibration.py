"""Calibrates one GPU, then sets predicted beside measured step times of models that were not used for it.

    python -m bench.gpu_calibration [--models gpu-opt,gpu-vit] [--clusters FOLDER] [-o bench/results/gpu-calibration.json] [--json]

One process on one GPU, each model at three batch sizes, as `bench.prediction` does on CPUs. FOLDER keeps the cluster file,
"cluster-1.json", for planning. Without a GPU it says so and ends with status 77; --cpu runs the same on the CPU, with the models of
`bench.prediction`, for tests of the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from opweave.cost_model.cluster import Cluster

from . import prediction, prediction_models, prediction_summary

SKIPPED = 77
GPU_NAMES = tuple(case.name for case in prediction_models.GPU_CASES)


def measure(models: Sequence[str], clusters: Path) -> dict[str, Any]:
    """The result file: the device, what the calibration says of itself, rows, and their errors."""
    rows = prediction.run(1, models, clusters)
    cluster = Cluster.load(clusters / "cluster-1.json")
    prediction.forget(clusters)
    found = prediction_summary.summary(rows)
    return {
        "environment": {**prediction.environment(), "device": cluster.device.name},
        "calibration": dict(cluster.calibration or {}),
        "summary": {key: found[key] for key in ("num_rows", "median_error", "p90_error")},
        "rows": [asdict(row) for row in rows],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | batch | predicted, ms | measured, ms | error |", "|---|---|---|---|---|"]
    for row in rows:
        predicted, measured = 1e3 * row["predicted_s"], 1e3 * row["measured_s"]
        size = row["plan"].removeprefix("batch ")
        lines.append(f"| {row['model']} | {size} | {predicted:.2f} | {measured:.2f} | {predicted / measured - 1:+.0%} |")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help=f"default: {','.join(GPU_NAMES)}")
    parser.add_argument("--clusters", type=Path, help="folder of the calibrated cluster file; made where it is missing")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here (--cpu runs the script on the CPU)", file=sys.stderr)
        return SKIPPED
    names = args.models.split(",") if args.models else list(prediction_models.NAMES if args.cpu else GPU_NAMES)
    with tempfile.TemporaryDirectory() as folder:
        clusters = args.clusters or Path(folder)
        clusters.mkdir(parents=True, exist_ok=True)
        result = measure(names, clusters)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else table(result["rows"]) + "\n" + json.dumps(result["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
