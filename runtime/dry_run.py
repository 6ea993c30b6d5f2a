"""A program without data: one rank on meta tensors, to know its peak memory before anything is allocated.

Every instruction runs for its shapes only, with the same accounting as a real step (`memory`), so the prediction is that of the program
itself, with all its copies, not of a formula. Needs no process group, whatever the size of the mesh.
"""

from __future__ import annotations

from typing import Any

import torch

from . import update
from .execute import slot_names, stored_slots, write
from .groups import group_ranks
from .lockstep import DEFINITIONS, collective_request
from .memory import MemoryAccount, MemoryReport
from .program import LocalProgram
from .sharding import unravel


def _update(params: list[torch.Tensor], grads: list[Any], states: list[list[torch.Tensor]], *_: Any) -> list[torch.Tensor]:
    """What the fused update returns: parameters and states, changed in place."""
    return [*params, *(state for slots in states for state in slots)]


@torch.no_grad()
def dry_run(program: LocalProgram) -> MemoryReport:
    """Peak memory of one step of `program`, which must have been lowered for the device "meta"."""
    account = MemoryAccount(slot_names(program), stored_slots(program))
    values: list[Any] = [unravel(0, program.mesh)]
    for port in program.inputs:
        assert port.spec is not None, f"{port.name} has no layout"
        values.append(torch.empty(port.spec.local_shape(), dtype=port.dtype, device="meta"))
    stored = list(values)  # alive all the time, as in a state: an address must not be given to another storage
    text = write(program.graph, lockstep=True, tracked=True)
    rank = text.bind({update.fused_update: _update})(values, account.track, account.drop)
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
        value, options = collective_request(request)
        axes = tuple(options.pop("axes"))
        if axes not in sizes:
            sizes[axes] = len(group_ranks(program.mesh, axes)[0])
        answer = DEFINITIONS[request[0]]([value] * sizes[axes], **options)[0] if sizes[axes] > 1 else value
