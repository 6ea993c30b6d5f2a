"""The program one rank runs: a local graph, and how its inputs and outputs are cut.

The graph is the same on all ranks (SPMD). What differs between ranks enters through one placeholder named `coords`: the tuple
of this rank's mesh coordinates, used by the functions of `runtime.collectives` that need it. Targets of `call_function` nodes are
ATen/opweave ops, Python functions of `runtime.collectives`, `runtime.tiers` and `runtime.update`, or `operator.getitem`.

A collective starts where its node stands and yields a pending value; `collectives.wait` yields the tensor. Copies to and from other tiers
of memory are pairs like that too (see `tiers`). A program may run a part of itself once per micro-batch (see `micro_batches`).

The optimizer is not in the graph: `update.fused_update` is a name that the executor binds to the step counts of its `ProgramState` and the
`param_groups` of the user's optimizer, as it binds the collectives to its process groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .sharding import ShardSpec

# Kinds of inputs and outputs that outlive the step: a `ProgramState` holds them.
STORED_KINDS = ("param", "buffer", "state")
Key = tuple[str, str, str]  # (kind, fqn, slot)
# What is not stored, by port name: of the one batch, or of each micro-batch.
Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An input or output of the program: what it is (kind, fqn, slot as in the plan) and how it is cut.

    tier: where a parameter or state is stored. Beside the device it is passed to the program, and given back by it, as a `tiers.Parked`.
    cast: the narrower type in which the device reads a parameter, where it is stored in that, too.
    """

    name: str
    kind: str
    fqn: str
    slot: str = ""
    group: int = -1
    dtype: torch.dtype = torch.float32
    spec: ShardSpec | None = None  # None: a value without layout (a Python number)
    tier: str = "device"
    cast: torch.dtype | None = None

    @property
    def key(self) -> Key:
        """What identifies a stored tensor: the same for the input and the output that replaces it."""
        return (self.kind, self.fqn, self.slot)


@dataclass(slots=True)
class LocalProgram:
    """`graph` placeholders: `coords`, then one per entry of `inputs`; its output is a flat tuple, one per entry of `outputs`.

    An output of kind param, buffer or state is the new value of the input of the same (kind, fqn, slot): the executor stores it there.
    Update nodes work in place on their inputs, so for param and state the output usually is the input's own tensor.
    """

    mesh: tuple[int, ...]
    graph: fx.Graph
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    # The optimizer's class name ("AdamW") for the update; "" where nothing is updated.
    optimizer: str = ""
    # Ops that run a second time in every step, to have their results again without keeping them.
    num_recomputed: int = 0
    # How often the instructions before `micro_batches.end` run in a step; 1: there is no such call.
    num_micro_batches: int = 1

    @property
    def stored(self) -> dict[Key, Port]:
        """The inputs that a `ProgramState` holds."""
        return {port.key: port for port in self.inputs if port.kind in STORED_KINDS}


def each_micro_batch(program: LocalProgram, inputs: Inputs) -> list[Mapping[str, Any]]:
    """The inputs of every micro-batch. Raises ValueError where they are not as many as the program runs."""
    found = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if len(found) != program.num_micro_batches:
        raise ValueError(f"inputs of {len(found)} micro-batches were given, the program runs {program.num_micro_batches} in a step")
    return found


def shard_inputs(program: LocalProgram, inputs: Inputs, coords: tuple[int, ...]) -> Inputs:
    """The pieces of the device at `coords` of global inputs, by port name. Raises ValueError on a wrong global shape."""
    if isinstance(inputs, Mapping):
        return _shard(program, inputs, coords)
    return [_shard(program, values, coords) for values in inputs]


def _shard(program: LocalProgram, values: Mapping[str, Any], coords: tuple[int, ...]) -> dict[str, Any]:
    specs = {port.name: port for port in program.inputs}
    out = dict(values)
    for name, value in values.items():
        port = specs.get(name)
        if port is None or port.spec is None or not isinstance(value, torch.Tensor):
            continue
        try:
            out[name] = port.spec.shard(value, coords)
        except ValueError as error:
            raise ValueError(
                f"input {port.fqn or name!r}: {error}. Give batches of the shape the step was compiled with (drop_last=True for "
                "a loader), or compile another step for this shape"
            ) from None
    return out
