"""The plan: every decision with what it is predicted to cost, as data a person and a later run can read.

A plan is JSON: a format name and version, fingerprints of the step and of the cluster, the mesh, one entry per decision, and the
report (prediction, solver, times, usual names). `load` checks all of it; `check` compares it with a step and a cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import torch
from torch import fx

from .choices import ChoiceGraph
from .factors import FactorMap, is_getitem
from .layout import fits
from .lower import BUCKET_BYTES, Assignment
from .place_recipes import AUTO
from .residency import DISK, HOST, RECOMPUTE, StatePlace
from .rule_table import op_name
from .step_graph import StepGraph
from .strategies import strategy

FORMAT = "opweave.plan"
PLACES = ("residency", "state")
VERSION = 1


class PlanError(ValueError):
    """A plan file is damaged, of another version, or made for something else."""


_CODES = {"type": "array", "items": {"type": "integer"}}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["format", "version", "model", "cluster", "mesh", "decisions", "predicted", "solver"],
    "properties": {
        "format": {"const": FORMAT},
        "version": {"type": "integer"},
        "model": {"type": "object", "required": ["name", "fingerprint"], "properties": {"fingerprint": {"type": "string"}}},
        "cluster": {"type": "object", "required": ["name", "fingerprint"], "properties": {"fingerprint": {"type": "string"}}},
        "mesh": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
        "decisions": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["kind", "nodes", "codes"],
                "properties": {
                    "kind": {"enum": ["op", "input", "value", "read", "residency", "state"]},
                    "nodes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    "codes": _CODES,
                    "phase": {"type": "string"},
                    "path": {"type": "string"},
                    "text": {"type": "string"},
                    "name": {"type": "string"},
                    "seconds": {"type": "number"},
                },
                "additionalProperties": False,
            },
        },
        "bucket_bytes": {"type": "integer", "minimum": 0},
        "places": {"type": "string"},
        "autocast": {"enum": [None, "bfloat16", "float16"]},
        "predicted": {"type": "object"},
        "solver": {"type": "object"},
        "accumulate": {"type": "integer", "minimum": 1},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One choice: kind as in `choices`, the graph nodes that share it, and its codes per mesh axis.

    codes: atom of the op ("op") or of the tensor (others) that the axis splits, -1 replicated, below that partial or pass-through.
    text: the same for people. seconds: predicted time of all members together ("op"). The kinds "residency" (of the results of forward
    ops) and "state" (of parameters) have no codes, their text is the choice (see `residency`); what is not listed stays on the device.
    """

    kind: str
    nodes: tuple[str, ...]
    codes: tuple[int, ...]
    phase: str = ""
    path: str = ""
    text: str = ""
    name: str = ""
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Plan:
    """See the module docstring. Times in seconds, sizes in bytes. force, places: the recipes it was restricted to; None, "auto": to none.
    objective: what was minimised, see `cost_model.energy`. autocast: dtype of the forward pass ("bfloat16"); None: that of the model.
    accumulate: the number of micro-batches of a step."""

    model: dict[str, Any]
    cluster: dict[str, Any]
    mesh: tuple[int, ...]
    decisions: list[Decision]
    predicted: dict[str, Any]
    solver: dict[str, Any]
    planning_time_s: dict[str, float] = field(default_factory=dict)
    patterns: dict[str, int] = field(default_factory=dict)
    replicated_ops: list[dict[str, Any]] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    force: str | None = None
    objective: str = "time"
    accumulate: int = 1
    places: str = AUTO
    autocast: str | None = None
    early_updates: bool = False
    bucket_bytes: int = BUCKET_BYTES
    moves: list[tuple[str, str]] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    residency: dict[str, dict[str, int]] = field(default_factory=dict)
    state: dict[str, dict[str, int]] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What to capture the step with."""
        return None if self.autocast is None else getattr(torch, self.autocast)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        out: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for name in self.__slots__:
            out[name] = getattr(self, name)
        out["mesh"] = list(self.mesh)
        out["decisions"] = [
            {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(d).items() if v or k == "codes"} for d in self.decisions
        ]
        return out

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Checked. Raises PlanError saying what is wrong."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(
                f"this is no plan: its format is {data.get('format')!r}, expected {FORMAT!r}"
                if isinstance(data, dict)
                else "this is no plan: expected a JSON object"
            )
        if data.get("version") != VERSION:
            raise PlanError(f"the plan has version {data.get('version')!r}, this opweave reads version {VERSION}; make the plan again")
        try:
            jsonschema.validate(data, _SCHEMA)
        except jsonschema.ValidationError as error:
            where = "/".join(map(str, error.absolute_path)) or "the top level"
            raise PlanError(f"the plan is damaged at {where}: {error.message}; make the plan again") from None
        names = {n for n in cls.__slots__ if n in data}
        rest = {n: data[n] for n in names - {"decisions", "mesh"}}
        unknown = set(data) - names - {"format", "version"}
        if unknown:
            raise PlanError(f"the plan has unknown entries {sorted(unknown)}; it was edited or made by another version")
        decisions = [Decision(**{**d, "nodes": tuple(d["nodes"]), "codes": tuple(d["codes"])}) for d in data["decisions"]]
        return cls(mesh=tuple(data["mesh"]), decisions=decisions, **rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; an existing file is replaced only once the new one is whole."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(part, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan file. Raises PlanError; FileNotFoundError where there is none."""
        text = Path(path).read_text(errors="replace")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); the file is damaged or cut off"
            ) from None
        return cls.from_dict(data)

    def check(self, step: StepGraph, cluster: Any = None) -> None:
        """Raise PlanError where the plan was made for another step (model, batch shapes, optimizer, micro-batches) or cluster."""
        if step.num_micro_batches != self.accumulate:
            raise PlanError(
                f"the plan was made for accumulate={self.accumulate}, this step has accumulate={step.num_micro_batches}; use the plan's "
                "number of micro-batches, or make a plan for this one"
            )
        have = fingerprint(step)
        if have != self.model["fingerprint"]:
            raise PlanError(
                f"the plan was made for {self.model['name']!r} (fingerprint {self.model['fingerprint']}), this is {step.model_name!r} "
                f"(fingerprint {have}): model, batch shapes, optimizer and dtypes must be the same; make a plan for this one"
            )
        if cluster is not None and cluster.fingerprint() != self.cluster["fingerprint"]:
            raise PlanError(
                f"the plan was made for cluster {self.cluster['name']!r} ({self.cluster['fingerprint']}), this is {cluster.name!r} "
                f"({cluster.fingerprint()}); make a plan for this cluster, or pass the cluster the plan was made for"
            )

    def assignment(self, step: StepGraph, factors: FactorMap) -> Assignment:
        """The decisions on the nodes of a step. Raises PlanError where they do not fit it."""
        nodes = {n.name: n for n in step.graph.nodes}
        moves = [(name, before) for name, before in self.moves]
        out = Assignment(mesh=self.mesh, early_updates=self.early_updates, moves=moves, bucket_bytes=self.bucket_bytes)
        for d in self.decisions:
            if d.kind not in PLACES and len(d.codes) != len(self.mesh):
                raise PlanError(
                    f"decision for {d.nodes[0]} has {len(d.codes)} codes, the mesh has {len(self.mesh)} axes; the plan is damaged"
                )
            for name in d.nodes:
                node = nodes.get(name)
                if node is None:
                    raise PlanError(f"the plan speaks of {name!r}, which the step does not have; it is damaged or of another model")
                _assign(out, d, node, factors)
        _check_complete(out, step)
        return out


def _assign(out: Assignment, d: Decision, node: fx.Node, factors: FactorMap) -> None:
    if d.kind in PLACES:
        _assign_place(out, d, node)
        return
    is_op = d.kind == "op"
    bound = factors.bind(node) if is_op else None
    sizes = bound.sizes if bound is not None else factors.atoms(node)
    lowest = -1 - len(bound.linear) if bound is not None else -4 if d.kind in ("value", "read") else -1
    if any(not lowest <= c < len(sizes) for c in d.codes) or not fits(d.codes, sizes, out.mesh):
        raise PlanError(
            f"decision {list(d.codes)} for {node.name} does not fit its dimensions on mesh {list(out.mesh)}; the plan is damaged"
        )
    if bound is not None:
        out.ops[node] = strategy(bound, d.codes)
    elif d.kind == "input":
        out.inputs[node] = d.codes
    elif d.kind == "value":
        out.kept[node] = d.codes
    else:
        out.reads[node, d.phase] = d.codes


def _assign_place(out: Assignment, d: Decision, node: fx.Node) -> None:
    try:
        if d.kind == "state":
            if node.op != "placeholder":
                raise ValueError(f"{node.name} is no parameter")
            out.state[node] = StatePlace.parse(d.text)
        elif d.text not in (HOST, DISK, RECOMPUTE) or node.op != "call_function" or node.meta["op"].phase != "fwd":
            raise ValueError(f"{d.text!r} is nothing that can become of {node.name}")
        else:
            out.residency[node] = d.text
    except ValueError as error:
        raise PlanError(f"decision for {node.name}: {error}; the plan is damaged") from None


def _check_complete(out: Assignment, step: StepGraph) -> None:
    missing = [n.name for n in step.ops if not is_getitem(n) and n not in out.ops]
    stored = [n for n, i in zip((n for n in step.graph.nodes if n.op == "placeholder"), step.inputs, strict=True) if i.kind != "state"]
    missing += [n.name for n in stored if n not in out.inputs]
    if missing:
        raise PlanError(f"the plan has no decision for {len(missing)} ops and inputs ({missing[0]}, ...); it is damaged, make it again")


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """torch.bfloat16 as "bfloat16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def fingerprint(step: StepGraph) -> str:
    """What a plan is tied to: every op with its arguments, shapes and dtypes; 16 hex digits."""
    digest = hashlib.sha256()
    for node in step.graph.nodes:
        val = node.meta.get("val")
        values = val if isinstance(val, (list, tuple)) else [val]
        shapes = [(tuple(v.shape), str(v.dtype)) if hasattr(v, "shape") else v for v in values]
        digest.update(
            f"{node.name}|{op_name(node) if node.op == 'call_function' else node.op}|{node.args}|{node.kwargs}|{shapes}\n".encode()
        )
    for entry in (*step.inputs, *step.outputs):
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:16]


def decisions_of(graph: ChoiceGraph, selection: list[int], op_seconds: dict[int, Any], names: dict[int, str]) -> list[Decision]:
    """The chosen option of every choice as plan entries."""
    out = []
    for choice, pick in zip(graph.choices, selection, strict=True):
        option = choice.options[pick]
        first = choice.members[0]
        info = first.meta.get("op")
        codes = option.codes if choice.kind == "op" else option
        seconds = float(op_seconds[choice.index][pick]) * len(choice.members) if choice.kind == "op" else 0.0
        if choice.kind == "op":
            assert choice.op is not None
            text = " ".join("R" if c == -1 else "pass" if c < -1 else choice.op.names[c] for c in codes)
        else:
            text = " ".join("R" if c == -1 else "+" if c < -1 else "{}.{}".format(*graph.factors.splits(first)[c]) for c in codes)
        out.append(
            Decision(
                kind=choice.kind, nodes=tuple(m.name for m in choice.members), codes=tuple(codes), phase=choice.phase,
                path=info.path if info is not None else "", text=text, name=names.get(choice.index, ""), seconds=seconds,
            )
        )  # fmt: skip
    return out


def to_assignment(graph: ChoiceGraph, selection: list[int]) -> Assignment:
    """The solver's selection as an assignment for lowering."""
    out = Assignment(mesh=graph.mesh)
    pick = {c.index: c.options[i] for c, i in zip(graph.choices, selection, strict=True)}
    out.ops = {node: pick[c.index] for node, c in graph.op_choice.items()}
    out.inputs = {node: pick[c.index] for node, c in graph.input_choice.items()}
    out.kept = {node: pick[c.index] for node, c in graph.kept.items()}
    out.reads = {key: pick[c.index] for key, c in graph.reads.items()}
    return out
