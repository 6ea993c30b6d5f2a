"""A program without data: one rank on meta tensors, to know its peak memory before anything is allocated.

Every instruction runs for its shapes only, with the same accounting as a real step (`memory`), so the prediction is that of the program
itself, with all its copies, not of a formula. Needs no process group, whatever the size of the mesh.
"""

from __future__ import annotations

from typing import Any

import torch

from ..torch_compat import OpOverload
from . import collectives, update
from .execute import slot_names, stored_slots
from .groups import group_ranks
from .lockstep import collective_request
from .memory import MemoryAccount, MemoryReport
from .meta_ops import MetaOps
from .program import STORED_KINDS, LocalProgram, Port
from .program_text import write
from .reuse import gathers_in_place
from .sharding import unravel
from .tiers import TierStore


def _update(params: list[torch.Tensor], grads: list[Any], states: list[list[torch.Tensor]], *_: Any) -> list[torch.Tensor]:
    """What the fused update returns: parameters and states, changed in place."""
    return [*params, *(state for slots in states for state in slots)]


def _result(collective: Any, value: Any, n: int, options: dict[str, Any]) -> Any:
    """A new tensor (or a list of them) of the shape a collective over n devices yields."""
    if n == 1:
        return value
    if isinstance(value, list):
        dims = options.get("dims", [None] * len(value))
        return [_shaped(collective, x, n, dim, None) for x, dim in zip(value, dims, strict=True)]
    split, gather = options.get("split_dim"), options.get("gather_dim")
    return _shaped(collective, value, n, options.get("dim", split), gather)


def _shaped(collective: Any, x: torch.Tensor, n: int, dim: int | None, gather_dim: int | None) -> torch.Tensor:
    shape = list(x.shape)
    if gather_dim is not None:
        shape[gather_dim] *= n
    if dim is not None:
        grows = collective in (collectives.all_gather, collectives.all_gather_bucket)
        shape[dim] = shape[dim] * n if grows else shape[dim] // n
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _inputs(program: LocalProgram, store: TierStore) -> list[Any]:
    """Values without data for the program's text, as `execute.gather_inputs` orders them. Behind the second micro-batch nothing is new."""
    parts = program.num_micro_batches > 1
    ports = [port for port in program.inputs if not parts or port.kind in STORED_KINDS]
    values: list[Any] = [unravel(0, program.mesh)]
    for port in ports:
        value = _empty(port)
        values.append(value if port.tier == "device" else store.park(value, port.tier))
    if parts:
        values.append([_empty(port) for port in program.inputs if port.kind not in STORED_KINDS] for _ in range(2))
    return values


def _empty(port: Port) -> torch.Tensor:
    assert port.spec is not None, f"{port.name} has no layout"
    return torch.empty(port.spec.local_shape(), dtype=port.dtype, device="meta")


@torch.no_grad()
def dry_run(program: LocalProgram, ops: MetaOps | None = None) -> MemoryReport:
    """Peak memory of one step of `program`, which must have been lowered for the device "meta". ops: what is known of ops already."""
    ops = ops or MetaOps()
    account = MemoryAccount(slot_names(program), stored_slots(program))
    store = TierStore()
    values = _inputs(program, store)
    stored = list(values)  # alive all the time, as in a state: an address must not be given to another storage
    text = write(program.graph, lockstep=True, tracked=True, into=gathers_in_place(program))
    bindings = {update.fused_update: _update} | store.bindings(None)
    step = text.bind(bindings)
    step.__globals__.update({name: ops.of(op) for name, op in text.constants.items() if isinstance(op, OpOverload)})
    rank = step(values, account.track, account.drop)
    sizes: dict[tuple[int, ...], int] = {}
    answer = None
    while True:
        try:
            request = rank.send(answer)
        except StopIteration:
            del stored
            return account.report()
        except Exception as error:
            text.explain(error)
            raise
        into = request[2].pop("into", None)
        value, options = collective_request(request)
        axes = tuple(options.pop("axes"))
        if axes not in sizes:
            sizes[axes] = len(group_ranks(program.mesh, axes)[0])
        answer = _result(request[0], value, sizes[axes], options)
        if into is not None and sizes[axes] > 1:
            # Received in the memory of the old parameters.
            answer = [into.get(i, part) for i, part in enumerate(answer)] if isinstance(into, dict) else into
