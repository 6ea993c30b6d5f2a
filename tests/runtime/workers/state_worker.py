"""One rank of test_state: loads what another world size saved, under several plans, and saves for it."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import fx, nn

from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.program import LocalProgram, Port, shard_inputs
from opweave.runtime.sharding import ShardSpec
from opweave.runtime.state import CheckpointError, ProgramState

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import Linear, batches, linear_program, optimizer_of, stored_on


def executor_of(groups: AxisGroups, zero: int) -> Executor:
    program, model = linear_program(mesh=groups.mesh, zero=zero), Linear()
    state = ProgramState.from_model(program, model, groups.coords)
    return Executor(program, groups, optimizer=optimizer_of("AdamW", model.parameters()), state=state)


def move(folder: Path) -> None:
    groups = AxisGroups((2,))
    plain, split = executor_of(groups, zero=0), executor_of(groups, zero=3)
    for executor in (plain, split):
        assert executor.state.load(folder / "one", groups) == {"num_steps": 1}
    for executor in (plain, split):
        executor.run(shard_inputs(executor.program, {"x": batches()[1]}, groups.coords))
    assert torch.allclose(plain.state.full(("param", "w", ""), groups), split.state.full(("param", "w", ""), groups), rtol=1e-6)
    shown = split.state.state_dict(groups)
    assert str(shown["model"]["w"].placements) == "(Shard(dim=0),)" and shown["model"]["w"].shape == (4, 4)
    assert torch.equal(shown["model"]["w"].full_tensor(), split.state.full(("param", "w", ""), groups))
    assert float(shown["optimizer"]["w"]["step"]) == 2
    split.state.save(folder / "two", groups, extra={"num_steps": 2})
    split.state.export_safetensors(folder / "two.safetensors", groups)
    # What two ranks split, two ranks that replicate can load.
    plain.state.load(folder / "two", groups)
    assert torch.equal(plain.state.tensors["param", "w", ""], split.state.full(("param", "w", ""), groups))
    damaged(folder, groups, plain)
    in_tiers(folder, groups, plain)
    print("state ok", flush=True)


def in_tiers(folder: Path, groups: AxisGroups, plain: Executor) -> None:
    """State in other tiers, split and whole: loads what was saved without, in two pieces and in one, and is loaded without."""
    weight = plain.state.tensors["param", "w", ""].clone()
    for zero in (3, 2):
        program = stored_on(linear_program(mesh=groups.mesh, zero=zero), "disk", "host")
        state = ProgramState.from_model(program, Linear(), groups.coords)
        state.load(folder / "two", groups)
        assert torch.equal(state.full(("param", "w", ""), groups), weight)
        state.save(folder / "tiers", groups, extra={"num_steps": 2})
        plain.state.tensors["param", "w", ""].zero_()
        plain.state.load(folder / "tiers", groups)
        assert torch.equal(plain.state.tensors["param", "w", ""], weight)
        state.export_safetensors(folder / "tiers.safetensors", groups)


def damaged(folder: Path, groups: AxisGroups, executor: Executor) -> None:
    """One rank's file is damaged: both ranks refuse, with the same words."""
    file = next((folder / "two").glob("data-*/__1_0.distcp"))
    good = file.read_bytes()
    dist.barrier()
    if groups.rank == 0:
        file.write_bytes(good[:-1])
    dist.barrier()
    try:
        executor.state.load(folder / "two", groups)
        raise AssertionError("damage was not found")
    except CheckpointError as error:
        assert "__1_0.distcp has" in str(error), error
    dist.barrier()
    if groups.rank == 0:
        file.write_bytes(good)
    dist.barrier()


class Fused(nn.Module):
    """Names and shapes of test_state.Tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 12)
        self.head = nn.Linear(12, 4, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.randn(12))


def layouts(folder: Path) -> None:
    groups = AxisGroups((2, 2))
    full = torch.arange(48.0).reshape(4, 12)
    inner, outer, rows = (1, 1), (1, 0), (0, 0)
    for axes in ((inner, None), (None, inner), (inner, inner), (rows, inner), (inner, rows), (outer, rows), (inner, outer)):
        graph = fx.Graph()
        graph.placeholder("coords")
        factors = ((4,), (3, 4)) if outer not in axes else ((4,), (2, 6))
        spec = ShardSpec(shape=(4, 12), factors=factors, axes=axes, mesh=(2, 2))
        whole = ShardSpec(shape=(12,), factors=((12,),), axes=(None, None), mesh=(2, 2))
        ports = (
            Port(name="w", kind="param", fqn="embed.weight", group=0, spec=spec),
            Port(name="mean", kind="buffer", fqn="mean", spec=whole),
            Port(name="exp_avg", kind="state", fqn="embed.weight", slot="exp_avg", group=0, spec=spec),
        )
        program = LocalProgram(mesh=(2, 2), graph=graph, inputs=ports, outputs=())
        if axes[0] == inner:
            program = stored_on(program, "disk")
        state = ProgramState.from_model(program, Fused(), groups.coords)
        state.load(folder / "one", groups)
        assert torch.equal(state.value(("param", "embed.weight", "")), spec.shard(full, groups.coords)), f"load into {axes}"
        shown = state.state_dict(groups)["model"]
        assert torch.equal(shown["head.weight"].full_tensor(), full), f"exposure of {axes}: {shown['head.weight'].placements}"
        assert torch.equal(state.full(("param", "embed.weight", ""), groups), full), f"whole of {axes}"
        state.save(folder / "four", groups)
    print("layouts ok", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder = Path(sys.argv[1])
    (layouts if len(sys.argv) > 2 else move)(folder)
    dist.destroy_process_group()


main()
