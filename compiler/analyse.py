"""Rules and factors of a captured step: what can be split, and which ops run replicated and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from .collector import collector_paused
from .factors import FactorMap, is_getitem
from .rule import Rule, RuleError
from .rule_table import is_user_row, op_name, row_of
from .step_graph import StepGraph


@dataclass(slots=True)
class Analysis:
    """A step with the rule of every op, the factors of every dim, and the ops without a rule: (op name, reason) → count."""

    step: StepGraph
    factors: FactorMap
    replicated: dict[tuple[str, str], int] = field(default_factory=dict)


@collector_paused()
def analyse(step: StepGraph) -> Analysis:
    """Bind every op to its rule. Raises RuleError where a user's own pattern does not fit its op."""
    rules: dict[fx.Node, Rule | None] = {}
    reasons: Counter[tuple[str, str]] = Counter()
    for node in step.ops:
        if is_getitem(node):
            continue
        row = row_of(node)
        rule = None
        if row is None:
            reasons[op_name(node), "no rule; ow.pattern() adds one"] += 1
        else:
            rule = row.bind(node)
            if rule is None:
                reasons[op_name(node), "its arguments are of a kind the rule does not cover"] += 1
        rules[node] = rule

    def refuse(node: fx.Node, error: RuleError) -> None:
        if is_user_row(node):
            raise error
        reasons[op_name(node), f"its rule does not fit: {error}"] += 1

    factors = FactorMap(step.graph, rules, refuse)
    for node in factors.opaque_ops():
        reasons[op_name(node), "its dims are factored in ways that do not nest"] += 1
    return Analysis(step=step, factors=factors, replicated=dict(reasons))
