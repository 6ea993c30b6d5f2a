"""Factors: every tensor dimension is a product of atomic sizes, found from the graph.

A view or a product dim of a rule puts a *boundary* into a dimension: a 288-row fused QKV weight that is viewed as (3, 6, 16) has
boundaries at suffix sizes 96 and 16. Dimensions that share a letter have equal boundaries (union-find); a view makes the
boundaries of both of its sides equal, seen over the flattened group. This is iterated to a fixpoint. Boundaries that do not nest
(a dim of 12 cut as 2x6 here and as 4x3 there) stay where they are and make the op between them *opaque*: it needs those dims whole.

Result: `FactorMap.dims(value)`, the factors of each dim, and `FactorMap.bind(op)`, the op's rule over *atoms* (letter factors).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from .rule import Rule, RuleError, TensorDims, results_of, tensor_args

Constraint = tuple[tuple[int, ...], tuple[int, ...]]  # two lists of classes with the same elements in the same order


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundOp:
    """An op's rule over atoms.

    sizes: size of each atom. flags: "" free, "!" needed whole, "*" split with help. names: for people ("m.0").
    operands, results: per tensor the atoms of its dims, flattened, dims of size one left out (None: not a tensor).
    """

    sizes: tuple[int, ...]
    flags: tuple[str, ...]
    names: tuple[str, ...]
    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...] | None, ...]
    linear: tuple[tuple[int, ...], ...]
    reduce: str
    opaque: bool = False


def result_values(node: fx.Node) -> list[fx.Node | None]:
    """The graph values an op yields: itself, or its `getitem` users by index (None: that result is unused)."""
    val = node.meta["val"]
    if isinstance(val, torch.Tensor):
        return [node]
    out: list[fx.Node | None] = [None] * (len(val) if isinstance(val, (list, tuple)) else 0)
    for user in node.users:
        if is_getitem(user):
            out[user.args[1]] = user  # type: ignore[index]
    return out


def is_getitem(node: fx.Node) -> bool:
    """Whether a node only picks one result of a multi-result op."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


@dataclass(slots=True)
class _Classes:
    """Union-find over dims and letters, each class with a size and its boundaries (suffix sizes strictly between 1 and size)."""

    parent: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    bounds: list[set[int]] = field(default_factory=list)

    def new(self, size: int) -> int:
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.bounds.append(set())
        return len(self.parent) - 1

    def find(self, x: int) -> int:
        parent = self.parent
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def union(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a

    def add_bound(self, cls: int, bound: int) -> bool:
        """Add a boundary where it nests with those already there. True if something changed."""
        have = self.bounds[cls]
        if bound in have or bound <= 1 or bound >= self.size[cls] or self.size[cls] % bound:
            return False
        if any(max(bound, b) % min(bound, b) for b in have):
            return False
        have.add(bound)
        return True

    def factors(self, cls: int) -> tuple[int, ...]:
        """Factors of a class, major to minor; () for size one."""
        size = self.size[cls]
        out = []
        for bound in sorted(self.bounds[cls], reverse=True):
            out.append(size // bound)
            size = bound
        return (*out, size) if size > 1 else tuple(out)


class FactorMap:
    """Factors of every value and atoms of every op of a graph, given each op's rule (None: the op runs replicated)."""

    def __init__(
        self, graph: fx.Graph, rules: dict[fx.Node, Rule | None], refuse: Callable[[fx.Node, RuleError], None] | None = None
    ) -> None:
        """refuse: told of an op whose rule does not fit it, which then runs replicated; without it the RuleError is raised."""
        self._classes = _Classes()
        self._dims: dict[fx.Node, tuple[int, ...]] = {}
        self._letters: dict[fx.Node, dict[str, int]] = {}
        self._constraints: list[Constraint] = []
        self._rules = rules
        self._cache: dict[int, tuple[int, ...]] = {}
        self._bound: dict[fx.Node, BoundOp] = {}
        for node in graph.nodes:
            if node.op == "placeholder" or (node.op == "call_function" and not is_getitem(node)):
                for value in result_values(node):
                    if value is not None:
                        self._dims[value] = tuple(self._classes.new(int(s)) for s in value.meta["val"].shape)
        for node, rule in rules.items():
            if rule is not None:
                try:
                    self._letters[node] = self._tie(node, rule)
                except RuleError as error:
                    if refuse is None:
                        raise
                    refuse(node, error)
                    rules[node] = None
        self.rounds = self._fixpoint()
        self._atom_parent: dict[int, int] = {}
        self._tie_atoms()

    # -- building ---------------------------------------------------------------------------------------------------

    def _tie(self, node: fx.Node, rule: Rule) -> dict[str, int]:
        letters: dict[str, int] = {}
        known = dict(rule.sizes)
        pending: list[tuple[int, tuple[str, ...]]] = []
        tensors = self._tensors(node, rule)
        for dims, value in tensors:
            for letters_of_dim, cls in zip(dims, self._dims[value], strict=True):
                self._tie_dim(node, rule, letters_of_dim, cls, letters, pending, known)
        self._solve_products(node, rule, pending, known, letters)
        if rule.view:
            sides = _match_view(self._dims[tensors[0][1]], self._dims[tensors[1][1]], self._classes.size)
            for a, b in sides:
                if len(a) == 1 and len(b) == 1:
                    self._classes.union(a[0], b[0])
                else:
                    self._constraints.append((tuple(a), tuple(b)))
        return letters

    def _tensors(self, node: fx.Node, rule: Rule) -> list[tuple[TensorDims, fx.Node]]:
        args = tensor_args(node)
        if len(args) != len(rule.operands):
            raise RuleError(f"{node.target} has {len(args)} tensor operands, its rule '{rule}' describes {len(rule.operands)}")
        out = []
        for dims, value in zip(rule.operands, args, strict=True):
            self._check_rank(node, rule, dims, value.meta["val"])
            out.append((dims, value))
        values = result_values(node)
        if len(rule.results) < len(values):
            raise RuleError(f"{node.target} has {len(values)} results, its rule '{rule}' describes {len(rule.results)}")
        for dims, result in zip(rule.results, values, strict=False):
            if result is not None:
                self._check_rank(node, rule, dims, result.meta["val"])
                out.append((dims, result))
        return out

    def _check_rank(self, node: fx.Node, rule: Rule, dims: TensorDims, val: torch.Tensor) -> None:
        if len(dims) != val.dim():
            raise RuleError(f"rule '{rule}' of {node.target} gives {len(dims)} dims to a tensor of shape {tuple(val.shape)}")

    def _tie_dim(self, node, rule, names, cls, letters, pending, known) -> None:  # type: ignore[no-untyped-def]
        size = self._classes.size[cls]
        if not names:
            if size != 1 and not rule.view:
                raise RuleError(f"rule '{rule}' of {node.target} says size 1 where the tensor has {size}")
        elif len(names) == 1:
            name = names[0]
            if known.setdefault(name, size) != size:
                raise RuleError(f"letter {name!r} of rule '{rule}' is {known[name]} and {size} in one {node.target}")
            if name in letters:
                self._classes.union(letters[name], cls)
            else:
                letters[name] = cls
        else:
            pending.append((cls, names))

    def _solve_products(self, node, rule, pending, known, letters) -> None:  # type: ignore[no-untyped-def]
        for cls, names in pending:
            size = self._classes.size[cls]
            unknown = [n for n in names if n not in known]
            rest = math.prod(known[n] for n in names if n in known)
            if len(unknown) > 1 or size % max(rest, 1):
                raise RuleError(
                    f"the sizes of ({' '.join(names)}) = {size} in rule '{rule}' of {node.target} do not follow from its operands"
                )
            if unknown:
                known[unknown[0]] = size // rest
            if math.prod(known[n] for n in names) != size:
                raise RuleError(f"({' '.join(names)}) of rule '{rule}' is {[known[n] for n in names]}, the tensor has {size}")
            for n in names:
                if n not in letters:
                    letters[n] = self._classes.new(known[n])
            parts = tuple(letters[n] for n in names)
            self._constraints.append(((cls,), parts))

    # -- fixpoint ---------------------------------------------------------------------------------------------------

    def _fixpoint(self) -> int:
        classes = self._classes
        roots = [classes.find(i) for i in range(len(classes.parent))]
        unique = dict.fromkeys(
            (tuple(roots[c] for c in a if classes.size[c] > 1), tuple(roots[c] for c in b if classes.size[c] > 1))
            for a, b in self._constraints
        )
        pending = [c for c in unique if c[0] != c[1]]
        rounds = 0
        changed = True
        while changed:
            changed = False
            rounds += 1
            for a, b in pending:
                marks = _marks(classes, a) | _marks(classes, b)
                changed |= _push(classes, a, marks)
                changed |= _push(classes, b, marks)
            assert rounds < 1000, "factor boundaries do not settle"
        return rounds

    def _tie_atoms(self) -> None:
        """Atoms on the two sides of a view are the same quantity."""
        find = self._classes.find
        for a, b in self._constraints:
            left = [find(c) * 64 + i for c in a for i in range(len(self._factors(c)))]
            right = [find(c) * 64 + i for c in b for i in range(len(self._factors(c)))]
            if [f for c in a for f in self._factors(c)] == [f for c in b for f in self._factors(c)]:
                for x, y in zip(left, right, strict=True):
                    x, y = self.atom_root(x), self.atom_root(y)
                    if x != y:
                        self._atom_parent[y] = x

    def atom_root(self, atom: int) -> int:
        """Representative of an atom's quantity."""
        parent = self._atom_parent
        while atom in parent:
            atom = parent[atom]
        return atom

    # -- results ----------------------------------------------------------------------------------------------------

    def _factors(self, cls: int) -> tuple[int, ...]:
        root = self._classes.find(cls)
        if root not in self._cache:
            self._cache[root] = self._classes.factors(root)
        return self._cache[root]

    def dims(self, value: fx.Node) -> tuple[tuple[int, ...], ...]:
        """Factors of each dim of a value, major to minor; (1,) for a dim of size one."""
        return tuple(self._factors(c) or (self._classes.size[c],) for c in self._dims[value])

    def atoms(self, value: fx.Node) -> tuple[int, ...]:
        """Sizes of the value's atoms: the factors of all dims, flattened, dims of size one left out."""
        return tuple(f for c in self._dims[value] for f in self._factors(c))

    def class_ids(self, value: fx.Node) -> tuple[int, ...]:
        """For each atom of a value the id of its quantity: equal ids are the same thing anywhere in the graph (the batch, say)."""
        return tuple(self.atom_root(self._classes.find(c) * 64 + i) for c in self._dims[value] for i in range(len(self._factors(c))))

    def splits(self, value: fx.Node) -> tuple[tuple[int, int], ...]:
        """For each atom of a value its (dim, factor index), as `ShardSpec` names it."""
        return tuple((d, i) for d, c in enumerate(self._dims[value]) for i in range(len(self._factors(c))))

    def opaque_ops(self) -> list[fx.Node]:
        """Ops that have a rule but whose boundaries do not nest, so that they run replicated."""
        return [node for node, rule in self._rules.items() if rule is not None and self.bind(node).opaque]

    def bind(self, node: fx.Node) -> BoundOp:
        """The op's rule over atoms. An op without a rule binds to one whose atoms are all needed whole."""
        found = self._bound.get(node)
        if found is None:
            found = self._bound[node] = self._bind(node)
        return found

    def _bind(self, node: fx.Node) -> BoundOp:
        rule = self._rules.get(node)
        if rule is None:
            return self._opaque(node)
        if rule.view:
            return self._bind_view(node, rule)
        sizes: list[int] = []
        flags: list[str] = []
        names: list[str] = []
        ids: dict[str, list[int]] = {}
        for letter, cls in self._letters[node].items():
            parts = self._factors(cls)
            ids[letter] = list(range(len(sizes), len(sizes) + len(parts)))
            sizes.extend(parts)
            flag = rule.flags.get(letter, "")
            # With help only the outermost factor can be split: a local piece is then one contiguous range.
            flags.extend([flag] + [flag and "!"] * (len(parts) - 1) if parts else [])
            names.extend([letter] if len(parts) == 1 else [f"{letter}.{i}" for i in range(len(parts))])
        bad: set[int] = set()

        def atoms(dims: TensorDims, value: fx.Node | None) -> tuple[int, ...]:
            out = tuple(a for names_of_dim in dims for n in names_of_dim for a in ids.get(n, ()))
            if value is not None and tuple(sizes[a] for a in out) != self.atoms(value):
                bad.add(1)
            return out

        operands = tuple(atoms(d, v) for d, v in zip(rule.operands, tensor_args(node), strict=True))
        values = result_values(node)
        results = tuple(atoms(d, v) if v is not None else None for d, v in zip(rule.results, values, strict=False))
        if bad:
            return self._opaque(node)
        return BoundOp(
            sizes=tuple(sizes),
            flags=tuple(flags),
            names=tuple(names),
            operands=operands,
            results=results,
            linear=_passes(node, rule),
            reduce=rule.reduce,
        )

    def _bind_view(self, node: fx.Node, rule: Rule) -> BoundOp:
        source = tensor_args(node)[0]
        a, b = self.atoms(source), self.atoms(node)
        if a != b:
            return self._opaque(node)
        every = tuple(range(len(a)))
        return BoundOp(
            sizes=a,
            flags=("",) * len(a),
            names=tuple(f"v{i}" for i in every),
            operands=(every,),
            results=(every,),
            linear=_passes(node, rule),
            reduce="sum",
        )

    def _opaque(self, node: fx.Node) -> BoundOp:
        sizes: list[int] = []

        def fresh(value: fx.Node) -> tuple[int, ...]:
            start = len(sizes)
            sizes.extend(self.atoms(value))
            return tuple(range(start, len(sizes)))

        operands = tuple(fresh(v) for v in tensor_args(node))
        results = tuple(fresh(v) if v is not None else None for v in result_values(node))
        if not results and results_of(node):
            results = (None,) * len(results_of(node))
        return BoundOp(
            sizes=tuple(sizes),
            flags=("!",) * len(sizes),
            names=tuple(f"x{i}" for i in range(len(sizes))),
            operands=operands,
            results=results,
            linear=(),
            reduce="sum",
            opaque=True,
        )


def _passes(node: fx.Node, rule: Rule) -> tuple[tuple[int, ...], ...]:
    """The linear groups whose tensors are floating-point numbers; partial sums of truth values or indices mean nothing."""
    args = tensor_args(node)
    return tuple(g for g in rule.linear if all(args[i].meta["val"].is_floating_point() for i in g))


def _match_view(a: tuple[int, ...], b: tuple[int, ...], size: list[int]) -> list[tuple[list[int], list[int]]]:
    """Cut the dims of a view's two sides into the smallest groups of equal products (dims of size one left out)."""
    left = [c for c in a if size[c] != 1]
    right = [c for c in b if size[c] != 1]
    if math.prod(size[c] for c in left) == 0:
        return []
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        ga, gb = [left[i]], [right[j]]
        pa, pb = size[left[i]], size[right[j]]
        i, j = i + 1, j + 1
        while pa != pb:
            if pa < pb:
                pa *= size[left[i]]
                ga.append(left[i])
                i += 1
            else:
                pb *= size[right[j]]
                gb.append(right[j])
                j += 1
        groups.append((ga, gb))
    return groups


def _marks(classes: _Classes, side: tuple[int, ...]) -> set[int]:
    """Boundaries of a list of classes seen as one flattened dimension: suffix sizes."""
    out: set[int] = set()
    below = 1
    for cls in reversed(side):
        out.update(b * below for b in classes.bounds[cls])
        below *= classes.size[cls]
        out.add(below)
    return out


def _push(classes: _Classes, side: tuple[int, ...], marks: set[int]) -> bool:
    """Give each class of a flattened list the boundaries that fall inside it. True if something changed."""
    changed = False
    below = 1
    for cls in reversed(side):
        top = below * classes.size[cls]
        for mark in sorted(marks):
            if below < mark < top and mark % below == 0:
                changed |= classes.add_bound(cls, mark // below)
        below = top
    return changed
