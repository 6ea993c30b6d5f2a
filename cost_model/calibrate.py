"""Calibration: measure this machine (all ranks of the job together), fit the price curves, write a cluster file.

The order is fixed and the same on all ranks: ops, copies, disk, collectives per group, overlap. Ranks time ops at the same moment, as
in a step, where they share memory bandwidth; their times are averaged. Where there are more ranks than cores, they take turns: the
processor time of an op is multiplied by that. Finished samples are kept in FILE.partial, and a calibration that was interrupted goes on
from there; FILE itself is replaced only by a complete result.

Collectives are the runtime's, handed in as `Communication`, and so are its own ops (this folder does not know the runtime).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from . import detect, measure
from .cluster import Cluster, ClusterError
from .collectives import AT_ONCE, BUCKET_KINDS, SPACING, many
from .fit_cluster import NETWORK, OP_PASSES, fitted
from .journal import Journal, barrier, from_rank_0, machine, mean, rank, slowest, versions, world

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SLOW_S = 0.25  # what disturbs a collective that takes longer is small beside it, so a few runs will do
PASSES = 3  # over the links, one behind each part of the ops
_SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_BUCKET_BYTES = 1 << 24  # no more than this is under way at once
Step = tuple[str, Callable[[], Any]]  # a name, and what measures it
Progress = Callable[[int, int, str], None]  # done, total, what


class Communication(Protocol):
    """The runtime's collectives over one mesh axis or several. `start` begins one, `wait` ends it."""

    def start(self, kind: str, tensor: torch.Tensor) -> Any: ...

    def wait(self, pending: Any) -> Any: ...


# mesh, axes -> its collectives; all ranks ask in the same order.
Connect = Callable[[tuple[int, ...], tuple[int, ...]], Communication]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """quick: fewer sizes, shorter runs. memory_share: most of the free memory that samples may take. folder: on the disk to measure."""

    quick: bool = False
    memory_share: float = 0.25
    folder: Path = Path()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __post_init__(self) -> None:
        if not 0 < self.memory_share <= 1:
            raise ClusterError(f"memory share is {self.memory_share}; it is a fraction of the memory, above 0 and at most 1")

    @property
    def budget_s(self) -> float:
        """For one op. Ranks that take turns need about twice as long for it by the clock."""
        return 0.01 if self.quick else 0.02 if measure.crowded() else 0.03


# --- measuring -------------------------------------------------------------------------------------------------------------------------


def calibrate(
    output: str | os.PathLike[str] | None = None,
    *,
    connect: Connect | None = None,
    functions: measure.Functions = measure.PLAIN,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Cluster:
    """Measure and fit; rank 0 writes `output`. All ranks of a job call it and get the same cluster.

    connect: the runtime's collectives, needed with several ranks. functions: the runtime's own ops, see `measure`. Raises
    ClusterError where what was measured cannot be.
    """
    options = options or Options()
    if world() > 1 and connect is None:
        raise ClusterError(f"{world()} ranks calibrate together only with `connect`, which gives the collectives to measure")
    begin = time.perf_counter()
    start = detect.detect_cluster()
    path = None if output is None else Path(output)
    device = torch.device("cuda", torch.cuda.current_device()) if start.device.kind == "cuda" else torch.device("cpu")
    dtypes = [str(dtype) for dtype in options.dtypes]
    key = {"machine": machine(), "versions": versions(), "ranks": world(), "quick": options.quick, "dtypes": dtypes}
    journal = Journal(None if path is None else path.with_name(path.name + ".partial"), key)
    steps = _steps(start, device, options, connect, functions, journal.samples)
    try:
        for done, (name, run) in enumerate(steps):
            if progress and rank() == 0:
                progress(done, len(steps), name)
            journal.take(name, run)
    finally:
        journal.save()
    cluster = _fitted_on_rank_0(start, journal, seconds=time.perf_counter() - begin, quick=options.quick)
    if path is not None and rank() == 0:
        cluster.save(path)
    journal.remove()
    return cluster


def _fitted_on_rank_0(start: Cluster, journal: Journal, *, seconds: float, quick: bool) -> Cluster:
    """The same on all ranks, or the same error: seconds of work that ranks who share cores need not all do."""
    made: dict[str, Any] | Exception | None = None
    if rank() == 0:
        try:
            made = fitted(start, journal.samples, seconds=seconds, quick=quick).to_dict()
        except (ClusterError, ValueError) as error:
            made = error
    made = from_rank_0(made)
    if isinstance(made, Exception):
        raise made
    return Cluster.from_dict(made)


def _steps(
    start: Cluster, device: torch.device, options: Options, connect: Connect | None, functions: measure.Functions,
    samples: Mapping[str, Any],
) -> list[Step]:  # fmt: skip
    """Everything to measure, in order: (name, what measures it). The same list on every rank. samples: where the results will be.

    Passes over the links come between those over the ops, some time apart: a shared machine is slower for seconds or minutes.
    """
    scale = 4 if device.type == "cuda" else 1
    room = start.device.usable_bytes * options.memory_share
    rows = [row for row in measure.rows(options.dtypes, scale=scale, quick=options.quick) if 2 * row.num_bytes < room]

    def ops(turn: str, *, float32: bool) -> list[Step]:
        chosen = [row for row in rows if (row.dtype == torch.float32) == float32]
        return [(f"{turn} {row.name}", partial(op_sample, row, device, options.budget_s / 2, functions)) for row in chosen]

    first, again = OP_PASSES  # the second of float32 only, whose curves most of what a step takes has
    parts = [ops(first, float32=True), ops(again, float32=True), ops(first, float32=False)]
    network = _network_steps(start, device, options, connect, samples) if connect is not None else [[] for _ in parts]
    steps: list[Step] = [("turns", partial(_turns_sample, device)), ("views", partial(_view_sample, options.budget_s))]
    steps += [step for part in itertools.chain(*zip(parts, network, strict=True)) for step in part]
    sizes = [1 << 12, 1 << 16, 1 << 20, 1 << 24] + ([1 << 27] if device.type == "cuda" else [])
    for direction in ("device_to_host", "host_to_device"):
        steps.append((f"copy {direction}", partial(_copy_sample, direction, device, sizes, options.budget_s)))
    steps.append(("disk", partial(_disk_sample, options.folder, quick=options.quick)))
    if device.type == "cuda":
        steps.append(("host update", partial(op_sample, measure.rows((torch.float32,))[-1], torch.device("cpu"), 0.2, functions)))
    return steps


def op_sample(row: measure.Row, device: torch.device, budget_s: float, functions: measure.Functions = measure.PLAIN) -> Any:
    timing = measure.measure(row, device, budget_s=budget_s, functions=functions)
    seconds = mean(timing.seconds if timing else None)
    return None if timing is None or seconds is None else {"work": list(timing.work), "dtype": timing.dtype, "seconds": seconds}


def _turns_sample(device: torch.device) -> float:
    """How many ranks share a core, as measured; 1 on a device of their own. Some ranks get more of the time than others, but a step waits
    for all, so what counts is the share that they have in the mean. Ranks begin and end a little apart, and the last one has its core for
    itself, so what is measured is now and then below what there must be."""
    barrier()
    share = mean(1 / measure.turns()) if device.type == "cpu" and measure.crowded() else None
    return max(1.0, measure.local_ranks() / measure.cores(), 1 / share) if share else 1.0


def _view_sample(budget_s: float) -> float | None:
    barrier()
    return mean(measure.view_seconds(budget_s))


def _copy_sample(direction: str, device: torch.device, sizes: list[int], budget_s: float) -> list[list[float]]:
    """[bytes, seconds], all ranks copying at once."""
    barrier()
    return [[x, mean(y) or y] for x, y in measure.copy_points(direction, device, sizes, budget_s)]


def _disk_sample(folder: Path, quick: bool) -> dict[str, Any]:
    sizes = (1 << 16, 1 << 20, 1 << 23) if quick else (1 << 16, 1 << 20, 1 << 23, 1 << 25)
    points = measure.disk_points(folder, sizes) if rank() == 0 else None
    return from_rank_0(points)


def _groups(start: Cluster) -> dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]]:
    """(size, devices per node) of every group a mesh axis can make -> a mesh and the axes that make it."""
    found: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for mesh in start.mesh_candidates():
        for axis in range(len(mesh)):
            found.setdefault((mesh[axis], start.devices_of_group_on_a_node(mesh, (axis,))), (mesh, (axis,)))
    return {key: where for key, where in found.items() if key[0] > 1}


def _network_steps(
    start: Cluster, device: torch.device, options: Options, connect: Connect, samples: Mapping[str, Any]
) -> list[list[Step]]:
    """What is measured of the links, pass by pass: another program's second of work must not make a price."""
    groups = [(key, connect(*where)) for key, where in sorted(_groups(start).items())]  # all ranks make the same ones
    sizes: tuple[int, ...] = (1 << 10, 1 << 14, 1 << 18, 1 << 22) if options.quick else _SIZES
    kinds = [(kind, kind, sizes, 1) for kind in KINDS]
    if device.type == "cpu":
        buckets = (1 << 16, 1 << 20) if options.quick else (1 << 16, 1 << 20, 1 << 22)
        chosen = {n: tuple(b for b in buckets if b <= _BUCKET_BYTES // n) for n in AT_ONCE}
        kinds += [(many(kind, n), kind, chosen[n], n) for kind in BUCKET_KINDS for n in AT_ONCE]

    def steps(turn: int) -> Iterator[Step]:
        for (size, per_node), wires in groups:
            for table, kind, of_bytes, n in kinds:
                name, first = (f"{NETWORK} {i} {table} {size} {per_node}" for i in (turn, 0))
                yield name, partial(_collective_points, wires, kind, of_bytes, size, device, n, samples, first)
            if device.type == "cpu":
                yield f"{NETWORK} {turn} {SPACING} {size} {per_node}", partial(_spacing, wires, size, device)
            if turn == 0:
                yield f"overlap {size} {per_node}", partial(_overlap, wires, device)

    return [list(steps(turn)) if turn < 2 or not options.quick else [] for turn in range(PASSES)]


def _collective_points(
    wires: Communication, kind: str, sizes: Sequence[int], group: int, device: torch.device, at_once: int,
    samples: Mapping[str, Any], first: str,
) -> list[list[float]]:  # fmt: skip
    """[bytes, seconds of one message] of a pass; what took long in the first pass, the sample of that name, is not measured again."""
    slow = {num_bytes: seconds for num_bytes, seconds in samples.get(first, ()) if seconds * at_once > SLOW_S}  # the same on all ranks
    return [[float(b), slow.get(b) or collective_sample(wires, kind, b, group, device, at_once) / at_once] for b in sizes]


def _tensor(kind: str, num_bytes: int, group: int, device: torch.device) -> torch.Tensor:
    """What a rank gives to a collective whose gathered tensor has `num_bytes`."""
    share = num_bytes // 4 // (group if kind in ("all_gather", "all_to_all") else 1)
    return torch.ones(max(group, share - share % group), device=device)


def collective_sample(wires: Communication, kind: str, num_bytes: int, group: int, device: torch.device, at_once: int = 1) -> float:
    """Seconds that a collective, or so many started at once, add to the computation around them, on the slowest rank.

    In a step ranks come from computing: they are not quite in step, where they share cores some of them still compute while others wait,
    and what follows a wait runs with cold caches. So what is timed is a series of both, from barrier to barrier, less a series of the
    computation alone. What is sent was made a while ago: tensors take turns.
    """
    copies = max(at_once, min(16, measure.ROTATE_BYTES // num_bytes))
    tensors = itertools.cycle([_tensor(kind, num_bytes, group, device) for _ in range(copies)])

    def communicate() -> None:
        for pending in [wires.start(kind, next(tensors)) for _ in range(at_once)]:
            wires.wait(pending)

    return _added(_computation(device), communicate, device, 5 if num_bytes * at_once <= 1 << 18 else 2)[1]


def _added(compute: Callable[[], Any], communicate: Callable[[], Any], device: torch.device, series: int) -> tuple[float, float]:
    """(seconds of the computation, seconds that communication behind it adds), in series of so many from barrier to barrier."""

    def seconds(both: bool, series: int = series) -> float:
        barrier()
        begin = time.perf_counter()
        for _ in range(series):
            compute()
            if both:
                communicate()
        _synchronise(device)
        barrier()
        return (time.perf_counter() - begin) / series

    # Where ranks share cores, one that began late saw only the end of what the others did: the slowest saw all of it.
    first = slowest([seconds(True, 1)])[0]
    if first > SLOW_S:
        without = slowest([seconds(False, 1)])[0]
        return without, max(1e-6, first - without)
    runs = range(max(2, min(6, int(0.25 / max(first * series, 1e-6)))))
    times = slowest([seconds(both) for _ in runs for both in (True, False)])
    with_it, without = measure.midmean(times[::2]), measure.midmean(times[1::2])
    return without, max(1e-6, with_it - without)


def _spacing(wires: Communication, group: int, device: torch.device) -> list[list[list[float]]]:
    """[seconds that ranks compute between two collectives, seconds that a small one then adds], from nothing to 3 ms of a core, twice. The
    third point is what `collective_sample` has between its own."""
    layers, small = measure.Layers(), _tensor("all_gather", 1 << 10, group, device)

    def long() -> None:
        for _ in range(4):
            layers.run()

    pieces: list[Callable[[], Any]] = [lambda: None, layers.layer, layers.run, long]
    return [[list(_added(piece, lambda: wires.wait(wires.start("all_gather", small)), device, 5)) for piece in pieces] for _ in range(2)]


def _computation(device: torch.device) -> Callable[[], Any]:
    """What runs between collectives. On a GPU little: how fast its host is must not hide them."""
    if device.type == "cpu":
        return measure.Layers().run
    work, memory = torch.rand(128, 128, device=device), torch.zeros(measure.PASS_BYTES // 4, device=device)

    def compute() -> None:
        memory.add_(1.0)
        torch.mm(work, work)
        torch.mm(work, work)

    return compute


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _overlap(wires: Communication, device: torch.device) -> float:
    """Share of compute time that hides an all_reduce running beside it, 0 to 1."""
    size = 4096 if device.type == "cuda" else 320
    a, message = torch.rand(size, size, device=device), torch.ones(1 << 20, device=device)

    def compute() -> None:
        for _ in range(4):
            torch.mm(a, a)

    def seconds(run: Callable[[], Any]) -> float:
        def once() -> float:
            barrier()
            begin = time.perf_counter()
            run()
            _synchronise(device)
            return time.perf_counter() - begin

        times = [once()]
        times += [once() for _ in range(2 if slowest(times)[0] > SLOW_S else 8)]
        return sorted(times)[len(times) // 4]

    def both() -> None:
        pending = wires.start("all_reduce", message)
        compute()
        wires.wait(pending)

    alone, link, together = seconds(compute), seconds(lambda: wires.wait(wires.start("all_reduce", message))), seconds(both)
    share = (alone + link - together) / min(alone, link)
    return min(1.0, max(0.0, mean(share) or 0.0))
