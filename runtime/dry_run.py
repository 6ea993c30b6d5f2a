"""A program without data: one rank on meta tensors, to know its peak memory before anything is allocated.

Every instruction runs for its shapes only, by the executor's own text, collectives and tiers, and with the same accounting as a real step
(`memory`): the prediction is that of the program itself, with all its copies and the buffers of its messages, not of a formula. Needs no
process group, whatever the size of the mesh.
"""

from __future__ import annotations

from typing import Any

import torch

from ..torch_compat import OpOverload
from . import update
from .communicator import Communicator
from .execute import slot_names, stored_slots
from .groups import PaperGroups
from .memory import MemoryAccount, MemoryReport
from .meta_ops import MetaOps
from .program import STORED_KINDS, LocalProgram, Port
from .program_text import write
from .reuse import gathers_in_place
from .tiers import TierStore
from .workspace import NOT_COUNTED


def _inputs(program: LocalProgram, coords: tuple[int, ...], store: TierStore) -> list[Any]:
    """Values without data for the program's text, as `execute.gather_inputs` orders them. Behind the second micro-batch nothing is new."""
    parts = program.num_micro_batches > 1
    ports = [port for port in program.inputs if not parts or port.kind in STORED_KINDS]
    values: list[Any] = [coords]
    for port in ports:
        value = _empty(port)
        values.append(value if port.tier == "device" else store.park(value, port.tier, cast=port.cast))
    if parts:
        values.append([_empty(port) for port in program.inputs if port.kind not in STORED_KINDS] for _ in range(2))
    return values


def _empty(port: Port) -> torch.Tensor:
    assert port.spec is not None, f"{port.name} has no layout"
    return torch.empty(port.spec.local_shape(), dtype=port.dtype, device="meta")


@torch.no_grad()
def dry_run(program: LocalProgram, ops: MetaOps | None = None, *, backend: str = "gloo") -> MemoryReport:
    """Peak memory of one step of `program`, which must have been lowered for the device "meta", on a rank that needs most.

    ops: what is known of ops already. backend: of the collectives ("gloo" on CPUs, or "nccl"): their buffers differ, and the workspaces of
    ops.
    """
    ops = ops or MetaOps()
    account = MemoryAccount(slot_names(program), stored_slots(program))
    groups = PaperGroups(program.mesh, backend=backend)
    store = TierStore()
    values = _inputs(program, groups.coords, store)
    stored = list(values)  # alive all the time, as in a state: an address must not be given to another storage
    text = write(program.graph, tracked=True, into=gathers_in_place(program))
    bindings = {update.fused_update: update.update_on_paper} | Communicator(groups).bindings() | store.bindings(None)
    step = text.bind(bindings | ({} if backend == "gloo" else NOT_COUNTED))
    step.__globals__.update({name: ops.of(op) for name, op in text.constants.items() if isinstance(op, OpOverload)})
    try:
        step(values, account.track, account.drop)
    except Exception as error:
        text.explain(error)
        raise
    del stored
    return account.report()
