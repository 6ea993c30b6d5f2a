"""Sharding rules: how one op may be split, written as a string of dimension letters.

Grammar (blank-separated; one group of dims per tensor operand and per tensor result, in schema order, lists flattened):

    rule    := operands "->" results
    operands, results := tensor ("," tensor)*
    tensor  := dim*                      # an empty tensor group is a 0-dim tensor
    dim     := letter flag? | "(" (letter flag?)+ ")" | "1"
    flag    := "!"  every device needs the whole letter
             | "*"  the letter can be split with help: a local form of the op in `local_ops` takes care of it
             | "#"  the same, and that form exchanges what it must: results without the letter are complete, not partial

- A letter in operands and results can be split: each device owns a slice.
- A letter in operands only is reduced: splitting it leaves a partial result (`reduce` of the rule: sum, max or min).
- A letter in results only is generated: each device makes its own slice.
- "(g r)" is one dim that is a product of letters, major to minor; "1" is a dim of size one that broadcasts.

mm is `m k, k n -> m n`, grouped-query attention `b (g r) s! d!, b g t! d!, b g t! d! -> b (g r) s! d!, b (g r) s!`.

Ops linear in some operands also let partial sums through: `linear=((0,), (1,))` says "operand 0 alone or operand 1 alone may be
a partial sum, the result is one then"; `((0, 1),)` says both together (addition).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx

Dim = tuple[str, ...]  # letters, major to minor; () is a dim of size one
TensorDims = tuple[Dim, ...]


class RuleError(ValueError):
    """A rule does not parse, or does not fit the op it was given for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A parsed rule. `flags` maps a letter to "!", "*" or "#"; letters not in it are free."""

    operands: tuple[TensorDims, ...]
    results: tuple[TensorDims, ...]
    flags: dict[str, str] = field(default_factory=dict)
    linear: tuple[tuple[int, ...], ...] = ()
    reduce: str = "sum"
    # Sizes the rule's author knows and the shapes cannot tell: the "z" of a dim "(z f)".
    sizes: dict[str, int] = field(default_factory=dict)
    # A view: the result has the operand's elements in the same order; dims carry no letters, factors are matched instead.
    view: bool = False

    def __str__(self) -> str:
        def tensor(dims: TensorDims) -> str:
            return " ".join("1" if not d else (letter(d[0]) if len(d) == 1 else "(" + " ".join(map(letter, d)) + ")") for d in dims)

        def letter(name: str) -> str:
            return name + self.flags.get(name, "")

        return ", ".join(map(tensor, self.operands)) + " -> " + ", ".join(map(tensor, self.results))


_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|1|[()!*#])")


def _parse_tensor(text: str, flags: dict[str, str], rule: str) -> TensorDims:
    dims: list[Dim] = []
    group: list[str] | None = None
    last = ""
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise RuleError(f"cannot read {text[at:]!r} in rule {rule!r}: expected a letter, '1', '(', ')', '!', '*' or '#'")
        token, at = match.group(1), match.end()
        if token in "!*#":
            if not last:
                raise RuleError(f"{token!r} follows no letter in rule {rule!r}")
            if flags.setdefault(last, token) != token:
                raise RuleError(f"letter {last!r} has two flags in rule {rule!r}")
        elif token == "(":
            if group is not None:
                raise RuleError(f"nested '(' in rule {rule!r}")
            group = []
        elif token == ")":
            if not group:
                raise RuleError(f"')' closes nothing in rule {rule!r}")
            dims.append(tuple(group))
            group, last = None, ""
        elif token == "1":
            dims.append(())
            last = ""
        else:
            last = token
            if group is None:
                dims.append((token,))
            else:
                group.append(token)
    if group is not None:
        raise RuleError(f"'(' is not closed in rule {rule!r}")
    return tuple(dims)


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[tuple[TensorDims, ...], tuple[TensorDims, ...], tuple[tuple[str, str], ...]]:
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"rule {text!r} has no '->'; write operands -> results, e.g. 'm k, k n -> m n'")
    flags: dict[str, str] = {}
    operands = tuple(_parse_tensor(t, flags, text) for t in left.split(",")) if left.strip() else ()
    results = tuple(_parse_tensor(t, flags, text) for t in right.split(","))
    return operands, results, tuple(flags.items())


def parse(text: str, *, linear: tuple[tuple[int, ...], ...] = (), reduce: str = "sum", **sizes: int) -> Rule:
    """Parse a rule string (grammar in the module docstring). Raises RuleError."""
    operands, results, flags = _parse(text)
    for group in linear:
        if any(i >= len(operands) for i in group):
            raise RuleError(f"linear group {group} names an operand that rule {text!r} does not have")
    return Rule(operands=operands, results=results, flags=dict(flags), linear=linear, reduce=reduce, sizes=sizes)


RuleMaker = Callable[[fx.Node], Rule | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the rule table: the rule of an op (a string, or a function of the node for what depends on arguments), and
    the function that writes its local form where arguments or result depend on the cut (None: the op itself on local tensors)."""

    rule: str | RuleMaker
    linear: tuple[tuple[int, ...], ...] = ()
    reduce: str = "sum"
    local: Callable[..., Any] | None = None

    def bind(self, node: fx.Node) -> Rule | None:
        """The rule of this node; None where the function finds no way to split it."""
        if callable(self.rule):
            return self.rule(node)
        return parse(self.rule, linear=self.linear, reduce=self.reduce)


def argument_names(node: fx.Node) -> list[str]:
    """The names of an op's arguments, from its schema."""
    return [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node, in schema order, lists flattened. Remembered: step graphs do not change."""
    known = node.meta.get("tensor_args")
    if known is None:
        known = node.meta["tensor_args"] = _find_tensor_args(node)
    return known


def _find_tensor_args(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, fx.Node):
            if isinstance(arg.meta.get("val"), torch.Tensor):
                found.append(arg)
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                visit(item)

    for arg in node.args:
        visit(arg)
    for arg in node.kwargs.values():
        visit(arg)
    return found


def results_of(node: fx.Node) -> list[torch.Tensor | None]:
    """The fake results of a node as a list (None where the op returns no tensor there)."""
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return [val]
    if isinstance(val, (list, tuple)):
        return [v if isinstance(v, torch.Tensor) else None for v in val]
    return []
