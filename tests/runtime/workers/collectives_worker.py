"""One rank of test_collectives: every real collective on many shapes and types against the lockstep definition."""

import itertools
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from opweave.runtime import collectives as co
from opweave.runtime import lockstep as ls
from opweave.runtime.communicator import Communicator, DirectTransport
from opweave.runtime.groups import AxisGroups, group_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
SHAPE = (8, 4, 16)


def tensors(rank: int, dtype: torch.dtype, shape=SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 8).to(dtype)


def compare(communicator: Communicator, groups: AxisGroups, axes, function, make, **options) -> None:
    """make(rank) → argument; runs for real, and in lockstep over this rank's group."""
    ranks = next(r for r in group_ranks(groups.mesh, axes) if groups.rank in r)
    pending = getattr(communicator, function.__name__)(make(groups.rank), axes, **options)
    got = co.wait(pending)
    defaults = {"op": "sum"} if "reduce" in function.__name__ else {}
    expected = ls.DEFINITIONS[function]([make(rank) for rank in ranks], **(defaults | options))
    mine = expected[ranks.index(groups.rank)]
    for one, other in zip(*((v if isinstance(v, list) else [v]) for v in (got, mine)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, f"{function.__name__}: {one.shape} {other.shape}"
        sent = sum(v.numel() * v.element_size() for v in got) if isinstance(got, list) else one.numel() * one.element_size()
        direct = communicator.transport(axes).__class__ is DirectTransport and sent < 2**16
        assert same(one, other, exact=direct or len(ranks) == 2), f"{function.__name__} {axes} {options}"


def same(one: torch.Tensor, other: torch.Tensor, exact: bool) -> bool:
    """A ring over more than two ranks, and so every big all-reduce, adds in another order."""
    if exact or not one.is_floating_point():
        return torch.equal(one, other)
    eps = torch.finfo(one.dtype).eps
    return torch.allclose(one.double(), other.double(), rtol=8 * eps, atol=128 * eps)


def check_all(communicator: Communicator, groups: AxisGroups, axes, dtypes) -> None:
    for dtype in dtypes:

        def one(rank, dtype=dtype):
            return tensors(rank, dtype)

        def strided(rank, dtype=dtype):
            return tensors(rank, dtype).permute(2, 0, 1)

        def many(rank, dtype=dtype):
            return [tensors(rank, dtype), tensors(rank, dtype, (4, 8)), tensors(rank, dtype, (8,))]

        for op, make in itertools.product(("sum", "max", "min"), (one, strided)):
            compare(communicator, groups, axes, co.all_reduce, make, op=op)
        for dim, outer in ((0, 1), (0, 2), (1, 1), (2, 1), (2, 4)):
            compare(communicator, groups, axes, co.all_gather, one, dim=dim, outer=outer)
            compare(communicator, groups, axes, co.reduce_scatter, one, dim=dim, outer=outer, op="sum")
            compare(communicator, groups, axes, co.reduce_scatter, one, dim=dim, outer=outer, op="max")
        compare(communicator, groups, axes, co.all_gather, strided, dim=0, outer=1)
        compare(communicator, groups, axes, co.reduce_scatter, strided, dim=0, outer=1)
        for split, gather in (((0, 1), (2, 1)), ((2, 2), (0, 1)), ((2, 4), (1, 1)), ((1, 1), (0, 2))):
            options = dict(zip(("split_dim", "split_outer", "gather_dim", "gather_outer"), (*split, *gather), strict=True))
            compare(communicator, groups, axes, co.all_to_all, one, **options)
        compare(communicator, groups, axes, co.all_reduce_bucket, many, op="sum")
        compare(communicator, groups, axes, co.reduce_scatter_bucket, many, dims=[2, 0, 0], outers=[1, 1, 2])
        compare(communicator, groups, axes, co.all_gather_bucket, many, dims=[0, 1, 0], outers=[1, 1, 2])
    compare(communicator, groups, axes, co.all_reduce, lambda rank: torch.tensor(float(rank)))
    compare(communicator, groups, axes, co.all_reduce, lambda rank: tensors(rank, torch.float64, (1 << 16,)))
    compare(communicator, groups, axes, co.all_gather, lambda rank: tensors(rank, torch.float32) > 0, dim=1, outer=1)

    def mixed(rank):  # large ones go by themselves
        return [tensors(rank, torch.float32, shape) for shape in ((8,), (1 << 17, 4), (4, 8), (4, 1 << 16))]

    compare(communicator, groups, axes, co.all_reduce_bucket, mixed)
    compare(communicator, groups, axes, co.reduce_scatter_bucket, mixed, dims=[0, 0, 1, 1], outers=[1, 2, 1, 1])
    compare(communicator, groups, axes, co.all_gather_bucket, mixed, dims=[0, 0, 1, 1], outers=[1, 2, 1, 1])


def check_overlap(communicator: Communicator, axes) -> None:
    """Many in flight at once, waited for in another order."""
    rank = communicator.groups.rank
    started = [communicator.all_gather(torch.full((4,), 100.0 * i + rank), axes, 0, 1) for i in range(20)]
    for i in reversed(range(20)):
        got = co.wait(started[i])
        assert int(got[0]) // 100 == i and got.numel() == 4 * communicator.groups.group(axes).size, f"message {i} holds {got}"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = tuple(map(int, sys.argv[1].split("x")))
    groups = AxisGroups(mesh, timeout=timedelta(seconds=60))
    all_axes = [axes for n in range(1, len(mesh) + 1) for axes in itertools.combinations(range(len(mesh)), n)]
    groups.prepare(reversed(all_axes))
    for axes in all_axes:
        communicator = Communicator(groups)
        check_all(communicator, groups, axes, DTYPES if len(all_axes) == 1 else DTYPES[:1])
        check_overlap(communicator, axes)
    # The backend's own collectives run here too, as they will on NCCL.
    check_all(Communicator(groups, native=True), groups, all_axes[-1], DTYPES[:1])
    dist.barrier()
    if groups.rank == 0:
        print("collectives ok")
    dist.destroy_process_group()


main()
