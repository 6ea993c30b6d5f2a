"""Process groups of a mesh: one per tuple of mesh axes, the same on every rank.

Rank r of the job stands at the row-major mesh coordinates of r. A mesh of one device needs no `torch.distributed` at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from .. import torch_compat
from .collectives import CommunicationError
from .sharding import unravel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Axes = tuple[int, ...]
Result = TypeVar("Result")
DEFAULT_TIMEOUT = timedelta(minutes=10)
# Room for one rank's description in the agreement check; texts are shortened to fit.
_RECORD_BYTES = 8192


class GroupError(ValueError):
    """The job's processes do not form the mesh the plan needs."""


class AgreementError(ValueError):
    """The ranks do not run the same program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The devices along some axes, this rank among them. ranks: global ranks; index: this rank's place. process_group: None for one, and
    on paper."""

    ranks: tuple[int, ...]
    index: int
    process_group: Any

    @property
    def size(self) -> int:
        return len(self.ranks)


class AxisGroups:
    """The groups of this rank. `prepare` makes them, on all ranks in the same order; `group` looks them up.

    mesh: devices per axis. backend: "gloo" or "nccl"; by default nccl where the job has it, else gloo. timeout: how long a
    collective waits for the other ranks. Raises GroupError where the job does not fit the mesh.
    """

    connected = True

    def __init__(self, mesh: Iterable[int], *, backend: str | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        self.mesh = tuple(mesh)
        self.size = math.prod(self.mesh)
        self.timeout = timeout
        if self.size > 1 or (dist.is_available() and dist.is_initialized()):
            _check_job(self.mesh, self.size)
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.backend = backend or (_job_backend() if self.size > 1 else "none")
        self.coords = unravel(self.rank, self.mesh)
        self._groups: dict[Axes, Group] = {}
        self._device_meshes: dict[str, DeviceMesh] = {}

    def prepare(self, axes_list: Iterable[Axes]) -> None:
        """Make the groups of these axes. Every rank must ask for the same set; the order of asking does not matter."""
        for axes in sorted({self._checked(axes) for axes in axes_list} - self._groups.keys()):
            self._groups[axes] = self._make(axes)

    def group(self, axes: Axes) -> Group:
        """A prepared group. Raises KeyError where `prepare` was not told of it: making it here could hang the other ranks."""
        try:
            return self._groups[tuple(axes)]
        except KeyError:
            raise KeyError(f"the group over axes {tuple(axes)} was not prepared; prepared: {sorted(self._groups)}") from None

    def _checked(self, axes: Axes) -> Axes:
        axes = tuple(axes)
        if list(axes) != sorted(set(axes)) or not all(0 <= axis < len(self.mesh) for axis in axes):
            raise GroupError(f"axes {axes} are not ascending, distinct axes of the mesh {self.mesh}")
        return axes

    def _make(self, axes: Axes) -> Group:
        mine: Group | None = None
        for ranks in group_ranks(self.mesh, axes):
            # Every rank makes every group, also those it is not in: torch.distributed requires it.
            made = None
            if len(ranks) > 1:
                made = dist.new_group(list(ranks), timeout=self.timeout, backend=self.backend)
            if self.rank in ranks:
                mine = Group(ranks=ranks, index=ranks.index(self.rank), process_group=made)
        assert mine is not None, f"rank {self.rank} is in no group over {axes} of {self.mesh}"
        return mine

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Compare `facts` (what → text or hash: the plan, the model, ...) over all ranks.

        Raises AgreementError on ALL ranks, naming what differs and where, so nobody is left waiting.
        """
        if self.size == 1:
            return
        records = self._gather_records(_record(facts))
        differing = [_difference(name, records) for name in _names(records) if len({record.get(name) for record in records}) > 1]
        if differing:
            raise AgreementError(
                "the ranks of this job do not run the same program: "
                + "; ".join(differing)
                + ". Start every rank with the same script, model, plan file and options."
            )

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Do something on every rank and exchange the (small) results, in rank order. Where it fails on any rank, it raises on all.

        The error is that of the lowest rank that failed: the own one as it is, another's as its type and text.
        """
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if self.size == 1:
            if error is not None:
                raise error
            return [result]
        told = None if error is None else (type(error), str(error))
        rows: list[Any] = [None] * self.size
        with _others_answer():
            dist.all_gather_object(rows, (result, told))
        failed = next((rank for rank, (_, problem) in enumerate(rows) if problem is not None), None)
        if failed is None:
            return [row[0] for row in rows]
        if error is not None and failed == self.rank:
            raise error
        kind, text = rows[failed][1]
        raise (kind if issubclass(kind, ValueError) else RuntimeError)(f"{text} (on rank {failed})") from error

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh as torch's DTensors want it. All ranks call it."""
        if device_type not in self._device_meshes:
            from torch.distributed.device_mesh import init_device_mesh

            self._device_meshes[device_type] = init_device_mesh(device_type, self.mesh)
        return self._device_meshes[device_type]

    def _gather_records(self, record: dict[str, str]) -> list[dict[str, str]]:
        text = json.dumps(record).encode()
        assert len(text) <= _RECORD_BYTES, f"agreement record of {len(text)} bytes"
        device = torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")
        row = torch.zeros(_RECORD_BYTES, dtype=torch.uint8)
        row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = torch.empty((self.size, _RECORD_BYTES), dtype=torch.uint8, device=device)
        with _others_answer():
            torch_compat.all_gather_single(rows.view(-1), row.to(device))
        return [json.loads(bytes(r.tolist()).rstrip(b"\0")) for r in rows.cpu()]


class PaperGroups(AxisGroups):
    """The groups of the last rank of a mesh, without a job: nothing is sent. For what a program needs, not for what it computes.

    The last rank is among those that need most: where one rank keeps a value and the others hold zeros beside it, it is one of the others.
    """

    connected = False

    def __init__(self, mesh: Iterable[int], *, backend: str = "gloo") -> None:
        self.mesh = tuple(mesh)
        self.size = math.prod(self.mesh)
        self.timeout = DEFAULT_TIMEOUT
        self.rank = self.size - 1
        self.backend = backend
        self.coords = unravel(self.rank, self.mesh)
        self._groups = {}
        self._device_meshes = {}

    def group(self, axes: Axes) -> Group:
        """Any group; it need not be prepared."""
        self.prepare([axes])
        return super().group(axes)

    def _make(self, axes: Axes) -> Group:
        ranks = group_ranks(self.mesh, axes)[-1]
        return Group(ranks=ranks, index=len(ranks) - 1, process_group=None)


@contextmanager
def _others_answer() -> Iterator[None]:
    """Says in our words that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"the ranks could not be asked whether they agree: {error}. Another rank has stopped before it came here; its own "
            "message, earlier in the output, says why."
        ) from error


def group_ranks(mesh: tuple[int, ...], axes: Axes) -> list[tuple[int, ...]]:
    """All groups over `axes`: each the ranks that differ only there, row-major over `axes`."""
    strides = [math.prod(mesh[axis + 1 :]) for axis in range(len(mesh))]

    def offsets(chosen: Iterable[int]) -> list[int]:
        chosen = list(chosen)
        return [
            sum(at * strides[axis] for at, axis in zip(coords, chosen, strict=True))
            for coords in itertools.product(*(range(mesh[axis]) for axis in chosen))
        ]

    others = [axis for axis in range(len(mesh)) if axis not in axes]
    inside = offsets(axes)
    return [tuple(start + offset for offset in inside) for start in offsets(others)]


def _check_job(mesh: tuple[int, ...], size: int) -> None:
    shape = "x".join(map(str, mesh))
    if not dist.is_available():
        raise GroupError(f"the mesh {shape} needs {size} ranks, but this build of PyTorch has no torch.distributed; install one that has.")
    if not dist.is_initialized():
        raise GroupError(
            f"the mesh {shape} needs {size} ranks, but torch.distributed is not initialised in this process. Start the script with "
            f"`torchrun --nproc-per-node {size} ...` and call torch.distributed.init_process_group() first, or plan for one device."
        )
    world = dist.get_world_size()
    if world != size:
        raise GroupError(
            f"the mesh {shape} needs {size} rank{'s' if size > 1 else ''}, but this job has {world}. Start `torchrun` with {size} "
            f"process{'es' if size > 1 else ''} in all, or make a plan for {world} devices."
        )


def _job_backend() -> str:
    backend = str(dist.get_backend())
    return "nccl" if "nccl" in backend and torch.cuda.is_available() else "gloo"


def _record(facts: Mapping[str, str]) -> dict[str, str]:
    """Each fact as "hash start-of-text": the hash decides, the text is for people."""
    room = max(8, (_RECORD_BYTES - 512) // (2 * max(1, len(facts))) - 120)
    return {name: f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text[: min(room, 120)]}" for name, text in facts.items()}


def _names(records: list[dict[str, str]]) -> list[str]:
    return sorted({name for record in records for name in record})


def _difference(name: str, records: list[dict[str, str]]) -> str:
    by_value: dict[str, list[int]] = {}
    for rank, record in enumerate(records):
        by_value.setdefault(record.get(name, "missing"), []).append(rank)

    def show(value: str, ranks: list[int]) -> str:
        listed = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
        return f"rank{'s' if len(ranks) > 1 else ''} {listed}: {value}"

    return f"{name} differs ({' | '.join(show(value, ranks) for value, ranks in by_value.items())})"


def join_job(device_type: str, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Join the job torchrun started this process in, where the user has not: NCCL for "cuda", gloo for "cpu". Else nothing."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)


def on_first_rank(make: Callable[[], Any]) -> Any:
    """What `make()` yields on rank 0, on every rank; run by rank 0 alone. Without a process group: just `make()`.

    An error on rank 0 is raised on all ranks, so that none waits for the others.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
