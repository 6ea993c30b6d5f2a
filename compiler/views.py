"""Views: which ops share their operand's memory, and the rule that no view outlives its phase.

A view saved by the forward pass for the backward pass would keep its operand alive and hide what crosses from one phase to the other.
So the backward pass makes its views again, from the tensor itself: then what crosses is always a tensor that owns its memory (one to be
offloaded or recomputed), and a parameter gathered for the forward pass can be freed and gathered again (ZeRO-3).
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..torch_compat import OpOverload
from .factors import is_getitem
from .rule import tensor_args


def aliased_operand(node: fx.Node) -> fx.Node | None:
    """The operand whose memory a view op's result shares; None for ops that make new memory."""
    target = node.target
    if not isinstance(target, OpOverload) or target.is_view is False:
        return None
    return tensor_args(node)[0] if tensor_args(node) else None


def redo_views(graph: fx.Graph) -> None:
    """Give the ops after the forward pass views of their own (see the module docstring). Changes `graph`."""
    again: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.meta["op"].phase == "fwd":
            continue
        with graph.inserting_before(node):
            for used in node.all_input_nodes:
                if _is_view_of_fwd(used):
                    node.replace_input_with(used, _again(graph, used, again))
                    node.meta.pop("tensor_args", None)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _is_view_of_fwd(node: fx.Node) -> bool:
    if node.op != "call_function" or node.meta["op"].phase != "fwd":
        return False
    return aliased_operand(_maker(node)) is not None


def _maker(node: fx.Node) -> fx.Node:
    return node.args[0] if is_getitem(node) else node  # type: ignore[return-value]


def _again(graph: fx.Graph, view: fx.Node, again: dict[fx.Node, fx.Node]) -> fx.Node:
    if view not in again:
        copies = {used: _again(graph, used, again) for used in view.all_input_nodes if is_getitem(view) or _is_view_of_fwd(used)}
        copy = again[view] = graph.node_copy(view, lambda used: copies.get(used, used))
        copy.meta = {key: value for key, value in view.meta.items() if key != "tensor_args"}
        copy.meta["op"] = replace(view.meta["op"], phase="bwd", partner=_maker(view).name)
    return again[view]
