"""What a plan is usually called: data, tensor, sequence, vocabulary, expert parallel, ZeRO-n. For reports only; decisions are per op."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from .blocks import normalise
from .choices import Choice, ChoiceGraph
from .force import Quantities, op_atom_ids, quantities
from .layout import num_pieces
from .rule import tensor_args
from .rule_table import op_name
from .strategies import OpStrategy, is_pass

_HEAVY = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "opweave::attention",
    "opweave::moe_mlp",
    "embedding",
    "_log_softmax",
    "nll_loss_forward",
)


def axis_name(graph: ChoiceGraph, choice: Choice, code: int, known: Quantities) -> str:
    """The usual name of what one mesh axis does with an op: "data", "sequence", "column", "row", "head", "vocabulary", ... or ""."""
    assert choice.op is not None
    if code < 0:
        return "replicated" if not is_pass(code) else "partial"
    node, op = choice.members[0], choice.op
    atom = op_atom_ids(node, op, graph.factors).get(code, -1)
    if atom in known.batch:
        return "data"
    if atom in known.sequence:
        return "sequence"
    name = op_name(node).split(".")[0]
    letter = op.names[code].split(".")[0]
    is_loss = name in ("_log_softmax", "nll_loss_forward", "nll_loss_backward")
    if is_loss or (name in ("embedding", "embedding_dense_backward") and letter == "v"):
        return "vocabulary"
    if "attention" in name:
        return "head"
    if "moe" in name:
        return "expert" if letter == "e" else "expert tensor"
    if not any(r is not None and code in r for r in op.results):
        return "row"
    return "column" if atom in known.weights else "sequence"  # of a batch whose tensors do not say which of their dims that is


_WORDS = {
    "data": "data parallel", "sequence": "sequence parallel", "column": "tensor parallel (column)", "row": "tensor parallel (row)",
    "head": "tensor parallel (heads)", "vocabulary": "vocabulary parallel", "expert": "expert parallel",
    "expert tensor": "tensor parallel (experts)", "replicated": "replicated",
}  # fmt: skip


def usual_names(graph: ChoiceGraph, selection: list[int]) -> tuple[dict[int, str], dict[str, int]]:
    """Per op choice its usual name, and how often each name occurs among the heavy forward ops and the parameters' states."""
    known = quantities(graph.step, graph.factors)
    names: dict[int, str] = {}
    counts: Counter[str] = Counter()
    for choice, pick in zip(graph.choices, selection, strict=True):
        if choice.kind != "op":
            continue
        option: OpStrategy = choice.options[pick]
        parts = list(dict.fromkeys(axis_name(graph, choice, c, known) for c in option.codes))
        whole = [p for p in parts if p not in ("replicated", "partial")] or ["replicated"]
        names[choice.index] = " + ".join(_WORDS.get(p, p) for p in whole)
        if choice.phase == "fwd" and op_name(choice.members[0]).split(".")[0] in _HEAVY:
            for p in whole:
                counts[_WORDS.get(p, p)] += len(choice.members)
    counts.update(_zero_names(graph, selection))
    return names, dict(sorted(counts.items()))


def _zero_names(graph: ChoiceGraph, selection: list[int]) -> Counter[str]:
    """ZeRO stage of each parameter: 3 where stored more finely than it is read, 2 where only gradient and state are, 1 state alone."""
    out: Counter[str] = Counter()
    for param, op in graph.updates.items():
        stored = _layout(graph, selection, graph.input_choice[param])
        update = graph.op_choice[op].options[selection[graph.op_choice[op].index]].operands[0]
        grad = graph.kept.get(tensor_args(op)[1])
        read = graph.reads.get((param, "fwd"))
        pieces = lambda layout: num_pieces(layout, graph.mesh)  # noqa: E731
        if read is not None and pieces(_layout(graph, selection, read)) < pieces(stored):
            out["ZeRO-3"] += 1
        elif pieces(update) > pieces(stored):
            split_grad = grad is not None and pieces(_layout(graph, selection, grad)) > pieces(stored)
            out["ZeRO-2" if split_grad else "ZeRO-1"] += 1
    return out


def _layout(graph: ChoiceGraph, selection: list[int], choice: Choice) -> tuple[int, ...]:
    return choice.options[selection[choice.index]]


def module_rows(graph: ChoiceGraph, selection: list[int], decisions: list[Any]) -> list[dict[str, Any]]:
    """The plan by module (equal layers together): number of ops, usual names of the heavy ones, split of the parameters, seconds."""
    rows: dict[str, dict[str, Any]] = {}
    for choice, decision in zip(graph.choices, decisions, strict=True):
        if choice.kind != "op" or choice.phase == "update":
            continue
        path = normalise(decision.path) or "(model)"
        row = rows.setdefault(path, {"path": path, "ops": 0, "names": Counter(), "seconds": 0.0, "bytes": 0})
        row["ops"] += len(choice.members)
        row["seconds"] += decision.seconds
        if choice.phase == "fwd" and _is_heavy(choice.members[0]):
            row["names"][f"{op_name(choice.members[0]).split('.')[0].split('::')[-1]}: {decision.name}"] += len(choice.members)
    params = _param_rows(graph, selection)
    out = []
    for path, row in rows.items():
        layout, num_bytes = params.get(path, ("", 0))
        out.append(
            {
                "path": path,
                "ops": row["ops"],
                "name": "; ".join(row["names"]),
                "layout": layout,
                "seconds": row["seconds"],
                "bytes": num_bytes,
            }
        )
    return out


def _is_heavy(node: fx.Node) -> bool:
    return op_name(node).split(".")[0] in _HEAVY


def _param_rows(graph: ChoiceGraph, selection: list[int]) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[list[str], int]] = {}
    infos = zip((n for n in graph.step.graph.nodes if n.op == "placeholder"), graph.step.inputs, strict=True)
    seen: set[int] = set()
    for node, info in infos:
        if info.kind != "param":
            continue
        choice = graph.input_choice[node]
        layout = _layout(graph, selection, choice)
        path, _, name = normalise(info.fqn).rpartition(".")
        texts, total = found.get(path, ([], 0))
        val = node.meta["val"]
        total += val.numel() * val.element_size() // num_pieces(layout, graph.mesh)
        if choice.index not in seen:
            seen.add(choice.index)
            splits = graph.factors.splits(node)
            cut = " ".join("R" if c < 0 else f"dim {splits[c][0]}" for c in layout)
            texts = [*texts, f"{name}: {cut}"]
        found[path] = (texts, total)
    return {path: ("; ".join(texts), total) for path, (texts, total) in found.items()}
