"""One rank of test_torchrun's memory job: steps of many plans, whose peaks must be those that were predicted, to the byte.

memory_worker.py ROWS FOLDER: rows "model:force:mesh:share" with commas between them, share of the plan's unlimited peak that a run may use
("1": no limit); the disk tier is in FOLDER.
"""

import math
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import opweave as ow
from opweave import zoo


def compiled(name: str, force: str | None, mesh: tuple[int, ...], folder: str, limit: object) -> tuple[ow.TrainingStep, object]:
    model, batch = zoo.load(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-3)
    cluster = ow.Cluster.preset("cpu", devices=math.prod(mesh))
    step = ow.compile(model, cluster, optimizer=optimizer, force=force, mesh=mesh, memory_limit=limit, disk_path=folder)
    return step.prepare(batch), batch


def run(what: str, name: str, force: str | None, mesh: tuple[int, ...], folder: str, limit: object) -> tuple[int, list[float]]:
    """(predicted bytes on the device, losses); the executor's account must be the prediction, and no rank's above it."""
    step, batch = compiled(name, force, mesh, folder, limit)
    losses = [float(step(batch)) for _ in range(2)]
    predicted, measured = step.plan.predicted["peak_bytes"], step.executor.memory.pools
    is_last = dist.get_rank() == dist.get_world_size() - 1
    assert measured == predicted if is_last else all(measured[p] <= predicted[p] for p in measured), f"{what}: {measured} {predicted}"
    if is_last:
        print(f"{what}: {measured['device']} bytes", flush=True)
    step.executor.close()
    return predicted["device"], losses


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    for row in sys.argv[1].split(","):
        name, force, mesh, share = row.split(":")
        place = (name, force or None, tuple(map(int, mesh.split("x"))), sys.argv[2])
        whole, losses = run(f"{row} whole", *place, None)
        if float(share) < 1:
            limit = {"device": int(float(share) * whole), "disk": 1e9}
            most, within = run(row, *place, limit)
            assert most <= limit["device"], f"{row}: {most} of {limit}"
            assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(within, losses, strict=True)), f"{row}: {within} {losses}"
    dist.barrier()
    print("memory ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
