"""All ranks of a program in one process: evidence for a plan without a cluster.

The program's text is made into generators, one per rank, that stop at every collective and hand out its arguments. Each round runs every
rank up to its next collective, computes that on lists, and hands the results back. The collectives here are the definition
the real ones are tested against: combination in group order, on plain tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import collectives as co
from . import update
from .execute import check_updates_last, gather_inputs, slot_names, store_outputs, stored_slots
from .groups import group_ranks
from .memory import MemoryAccount, MemoryReport
from .program import Inputs, LocalProgram, shard_inputs
from .program_text import write
from .sharding import unravel
from .state import ProgramState
from .tiers import TierOptions, TierStore

Tensors = list[torch.Tensor]


@dataclass(slots=True)
class CollectiveCounts:
    """num: instructions run per kind, over groups of more than one device. num_bytes: what one rank put into them."""

    num: dict[str, int] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one more."""
        self.num[kind] = self.num.get(kind, 0) + 1
        self.num_bytes[kind] = self.num_bytes.get(kind, 0) + num_bytes


class LockstepExecutor:
    """Runs all ranks of `program` on the CPU.

    optimizer: whose `param_groups` give the hyper-parameters. states: one per rank, rank-major; may be set later. tiers: where the tiers
    behind the device are; every rank has a store of its own, and its copies are complete when they have started. After a run, `collectives`
    has the counts of that run, and with `account=True` `memory` what the values of rank 0 needed (collectives here have no buffers).
    """

    def __init__(
        self,
        program: LocalProgram,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        states: Sequence[ProgramState] | None = None,
        account: bool = False,
        tiers: TierOptions | None = None,
    ) -> None:
        check_updates_last(program.graph)
        self.program = program
        self.optimizer = optimizer
        self.size = 1
        for size in program.mesh:
            self.size *= size
        self.coords = [unravel(rank, program.mesh) for rank in range(self.size)]
        self.collectives = CollectiveCounts()
        self.memory: MemoryReport | None = None
        at_once = replace(tiers or TierOptions(), num_io_threads=0)
        self.stores = [TierStore(at_once) for _ in range(self.size)]
        self._text = write(program.graph, lockstep=True)
        self._tracked_text = write(program.graph, lockstep=True, tracked=True) if account else None
        self._states: list[ProgramState] = []
        if states is not None:
            self.states = list(states)

    @property
    def states(self) -> list[ProgramState]:
        """The stored tensors of each rank. Raises RuntimeError before they are set."""
        if not self._states:
            raise RuntimeError("the executor has no states yet: set `executor.states`, one `ProgramState` per rank, before the first run")
        return self._states

    @states.setter
    def states(self, states: Sequence[ProgramState]) -> None:
        if len(states) != self.size:
            raise ValueError(f"{len(states)} states were given for the {self.size} ranks of the mesh {self.program.mesh}")
        for state in states:
            state.check(self.program)
        self._states = list(states)

    def run(self, inputs: Inputs) -> list[Any]:
        """One step on global inputs, one mapping per micro-batch if several; returns the outputs that are not stored as global values."""
        results = self.run_local([shard_inputs(self.program, inputs, coords) for coords in self.coords])
        ports = [port for port in self.program.outputs if port.key not in self.program.stored]
        return [
            port.spec.unshard([result[i] for result in results]) if port.spec is not None else results[0][i]
            for i, port in enumerate(ports)
        ]

    @torch.no_grad()
    def run_local(self, inputs: Sequence[Inputs]) -> list[list[Any]]:
        """One step on each rank's own inputs; returns each rank's outputs that are not stored."""
        self.collectives = CollectiveCounts()
        ranks = [self._start(rank, inputs[rank]) for rank in range(self.size)]
        results = self._rounds(ranks)
        return [store_outputs(self.program, state, values) for state, values in zip(self.states, results, strict=True)]

    def _start(self, rank: int, inputs: Inputs) -> Generator[Any, Any, Any]:
        state = self.states[rank]
        values = [self.coords[rank], *gather_inputs(self.program, state, inputs, torch.device("cpu"))]
        updater = update.Updater(state.steps, self.optimizer, self.program.optimizer)
        bindings = updater.bindings() | self.stores[rank].bindings(updater)
        if self._tracked_text is None or rank != 0:
            return self._text.bind(bindings)(values)
        self._account = MemoryAccount(slot_names(self.program), stored_slots(self.program))
        return self._tracked_text.bind(bindings)(values, self._account.track, self._account.drop)

    def _rounds(self, ranks: Sequence[Generator[Any, Any, Any]]) -> list[Any]:
        answers: list[Any] = [None] * self.size
        while True:
            requests, results = [], []
            for rank, generator in enumerate(ranks):
                try:
                    requests.append(generator.send(answers[rank]))
                except StopIteration as stop:
                    results.append(stop.value)
                except Exception as error:
                    self._explain(error, rank)
                    raise
            if results:
                assert not requests, "some ranks have finished while others wait in a collective"
                if self._tracked_text is not None:
                    self.memory = self._account.report()
                return results
            answers = self._collective(requests)

    def _explain(self, error: Exception, rank: int) -> None:
        for text in (self._text, self._tracked_text):
            if text is not None:
                text.explain(error)
        error.add_note(f"on rank {rank} of the mesh {self.program.mesh} in lockstep")

    def _collective(self, requests: Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        functions = {request[0] for request in requests}
        assert len(functions) == 1, f"ranks stand at different collectives: {functions}"
        function = functions.pop()
        value, options = collective_request(requests[0])
        axes = options.pop("axes")
        groups = group_ranks(self.program.mesh, tuple(axes))
        if len(groups[0]) == 1:
            return [collective_request(request)[0] for request in requests]
        self.collectives.add(function.__name__, _num_bytes(value))
        answers: list[Any] = [None] * self.size
        for ranks in groups:
            values = [collective_request(requests[rank])[0] for rank in ranks]
            for rank, answer in zip(ranks, DEFINITIONS[function](values, **options), strict=True):
                answers[rank] = answer
        return answers


def collective_request(request: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The tensor(s) a collective works on, and its other arguments by name."""
    function, args, kwargs = request
    bound = _SIGNATURES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    options = dict(bound.arguments)
    return options.pop("x" if "x" in options else "xs"), options


_SIGNATURES = {function: inspect.signature(function) for function in co.STARTS}


def _num_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_num_bytes, value))


# ---------------------------------------------------------------- collectives on lists: one entry per device of a group
#
# Results are distinct tensors on every rank: a rank may later write into its own.


def all_reduce(xs: Tensors, op: str) -> Tensors:
    """Every device gets the combination."""
    total = co.combine(xs, op, torch.empty_like(xs[0], memory_format=torch.contiguous_format))
    return [total, *(total.clone() for _ in xs[1:])]


def all_gather(xs: Tensors, dim: int, outer: int) -> Tensors:
    """Every device gets all pieces."""
    rows = torch.stack([x.contiguous() for x in xs])  # stack keeps the memory format of its operands, join wants rows in order
    return [co.join(rows.clone(), xs[0].shape, dim, outer) for _ in xs]


def reduce_scatter(xs: Tensors, dim: int, outer: int, op: str) -> Tensors:
    """Device j gets the combination of the pieces j."""
    n = len(xs)
    cuts = [co.cut(x, n, dim, outer) for x in xs]
    shape = co.cut_shape(xs[0].shape, n, dim)
    return [
        co.combine([rows[j] for rows in cuts], op, torch.empty_like(cuts[0][j], memory_format=torch.contiguous_format)).view(shape)
        for j in range(n)
    ]


def all_to_all(xs: Tensors, split_dim: int, split_outer: int, gather_dim: int, gather_outer: int) -> Tensors:
    """Device j gets piece j of every device."""
    n = len(xs)
    cuts = [co.cut(x, n, split_dim, split_outer) for x in xs]
    shape = co.cut_shape(xs[0].shape, n, split_dim)
    outer = co.outer_after_cut(n, split_dim, split_outer, gather_dim, gather_outer)
    return [co.join(torch.stack([rows[j] for rows in cuts]).contiguous(), shape, gather_dim, outer) for j in range(n)]


def _transposed(per_tensor: Sequence[Tensors]) -> list[Tensors]:
    return [list(values) for values in zip(*per_tensor, strict=True)]


def all_reduce_bucket(xs: Sequence[Tensors], op: str) -> list[Tensors]:
    """`all_reduce` of each tensor."""
    return _transposed([all_reduce(list(values), op) for values in zip(*xs, strict=True)])


def reduce_scatter_bucket(xs: Sequence[Tensors], dims: list[int], outers: list[int], op: str) -> list[Tensors]:
    """`reduce_scatter` of each tensor."""
    each = zip(zip(*xs, strict=True), dims, outers, strict=True)
    return _transposed([reduce_scatter(list(values), dim, outer, op) for values, dim, outer in each])


def all_gather_bucket(xs: Sequence[Tensors], dims: list[int], outers: list[int]) -> list[Tensors]:
    """`all_gather` of each tensor."""
    each = zip(zip(*xs, strict=True), dims, outers, strict=True)
    return _transposed([all_gather(list(values), dim, outer) for values, dim, outer in each])


DEFINITIONS: dict[Callable[..., Any], Callable[..., list[Any]]] = {
    co.all_reduce: all_reduce,
    co.all_gather: all_gather,
    co.reduce_scatter: reduce_scatter,
    co.all_to_all: all_to_all,
    co.all_reduce_bucket: all_reduce_bucket,
    co.reduce_scatter_bucket: reduce_scatter_bucket,
    co.all_gather_bucket: all_gather_bucket,
}
