"""The program one rank runs: a local graph, and how its inputs and outputs are cut.

The graph is the same on all ranks (SPMD). What differs between ranks enters through one placeholder named `coords`: the tuple
of this rank's mesh coordinates, used by the functions of `runtime.collectives` that need it. Targets of `call_function` nodes are
ATen/opweave ops, Python functions of `runtime.collectives` and `runtime.update`, or `operator.getitem`.

A collective starts where its node stands and yields a pending value; `collectives.wait` yields the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .sharding import ShardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An input or output of the program: what it is (kind, fqn, slot as in the plan) and how it is cut."""

    name: str
    kind: str
    fqn: str
    slot: str = ""
    group: int = -1
    dtype: torch.dtype = torch.float32
    spec: ShardSpec | None = None  # None: a value without layout (a Python number)


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
