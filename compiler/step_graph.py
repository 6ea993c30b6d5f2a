"""The captured training step: one functional ATen graph from inputs to loss, gradients and updated state.

A `StepGraph` is an `fx.Graph` of `call_function` nodes over *global* tensors. Nothing in it knows about devices or ranks.

- placeholders, one per `GraphInput`, in the same order and with the same name;
- one `output` node whose args are a flat tuple, one entry per `GraphOutput`, in the same order;
- `node.meta["val"]`: the fake tensor (or tuple of fake tensors) the node yields;
- `node.meta["op"]`: an `OpInfo` for every `call_function` node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ..torch_compat import OpOverload

Phase = Literal["fwd", "bwd", "update"]
InputKind = Literal["param", "buffer", "state", "batch", "seed"]
OutputKind = Literal["loss", "extra", "param", "buffer", "state", "grad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpInfo:
    """Where an op comes from.

    path: module path of the user's model, e.g. "model.layers.3.self_attn.q_proj" ("" = outside any module).
    phase: forward, backward or optimizer update.
    partner: for a backward op, the name of the forward node whose gradient it computes ("" = none).
    line: "file.py:123" of the user's code that ran the op, where known.
    """

    path: str
    phase: Phase
    partner: str = ""
    line: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One placeholder.

    name: placeholder name. fqn: qualified name in the model (param, buffer, state: of its parameter), or the
    path inside the batch (batch). slot: for optimizer state its name in torch's optimizer ("exp_avg").
    group: index of the optimizer's parameter group (param and state; -1 where frozen).
    """

    name: str
    kind: InputKind
    fqn: str
    slot: str = ""
    group: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOutput:
    """One output of the step: the loss, an extra value of the user's loss function, new state, or (without an optimizer) a gradient."""

    kind: OutputKind
    fqn: str = ""
    slot: str = ""


@dataclass(slots=True)
class StepGraph:
    """The whole training step as data. Made by `capture`, never edited by the planner."""

    graph: fx.Graph
    inputs: tuple[GraphInput, ...]
    outputs: tuple[GraphOutput, ...]
    model_name: str = ""
    # How to rebuild what the user's loss function returned beside the loss (`capture_tree.ExtraSpec`); None where there is nothing.
    extra_spec: Any = None
    # Tied parameters: alias fqn -> fqn that owns the storage.
    tied: dict[str, str] = field(default_factory=dict)
    # What is no tensor in the batch, by path: built into the graph, so other values need another graph.
    batch_constants: dict[str, Any] = field(default_factory=dict)
    # How many micro-batches a step has; the graph is that of one of them (see `micro_batches`).
    num_micro_batches: int = 1
    # Dtype of the forward pass under autocast; None without.
    autocast: torch.dtype | None = None

    @property
    def ops(self) -> list[fx.Node]:
        """All `call_function` nodes in execution order."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def returned(self) -> Sequence[Any]:
        """What leaves the step, as `outputs` describes it."""
        return self.graph.output_node().args[0]  # type: ignore[return-value]

    def output_values(self, kind: OutputKind) -> list[fx.Node]:
        """The values that leave the step as outputs of a kind."""
        return [value for value, info in zip(self.returned, self.outputs, strict=True) if info.kind == kind]

    def placeholder(self, name: str) -> fx.Node:
        """The placeholder node of an input by name."""
        return next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)

    def verify(self) -> None:
        """Check the invariants of the module docstring; an AssertionError here is a bug of opweave."""
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        assert [n.name for n in placeholders] == [i.name for i in self.inputs], "placeholders and inputs disagree"
        assert len(self.returned) == len(self.outputs), f"{len(self.returned)} graph outputs, {len(self.outputs)} described"
        for node in self.graph.nodes:
            assert node.op in ("placeholder", "call_function", "output"), f"unexpected {node.op} node {node.name}"
            if node.op == "call_function":
                assert isinstance(node.meta.get("op"), OpInfo), f"{node.name} has no OpInfo"
            if node.op != "output":
                assert "val" in node.meta, f"{node.name} has no fake value"
            schema = getattr(node.target, "_schema", None) if isinstance(node.target, OpOverload) else None
            assert schema is None or not schema.is_mutable, f"{node.name} ({node.target}) works in place"
