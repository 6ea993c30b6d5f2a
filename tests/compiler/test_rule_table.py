"""Every rule of every op of every model family: printed, and proved by splitting, running and putting together."""

from __future__ import annotations

import os
import pathlib

import brute_force as bf
import pytest
import torch

import opweave as ow
from opweave import zoo
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.capture_tree import batch_tensors, map_tensors
from opweave.compiler.factors import is_getitem
from opweave.compiler.rule import RuleError, parse
from opweave.compiler.rule_table import TABLE, op_name, rule_of
from opweave.compiler.strategies import enumerate_strategies
from opweave.compiler.trainings import computing_in

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "rules.txt"
FAMILIES = [name for name in zoo.names() if name.endswith("-tiny")]


def captured(name):
    """(analysis, every value of the graph on real float64 tensors)."""
    torch.manual_seed(0)
    model, batch = zoo.load(name)
    model = model.double()
    batch = map_tensors(batch, lambda _, t: t.double() if t.is_floating_point() else t)
    with computing_in(torch.float64):
        step = capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0)
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    given = batch_tensors(batch)
    inputs = {}
    for info in step.inputs:
        if info.kind in ("param", "buffer"):
            inputs[info.name] = values[info.fqn].detach()
        elif info.kind == "batch":
            inputs[info.name] = given[info.fqn]
        elif info.kind == "state":
            inputs[info.name] = torch.rand_like(values[info.fqn])
        else:
            inputs[info.name] = torch.tensor(3)
    with torch.no_grad():
        env = bf.interpret(step, inputs)
    return analyse(step), env


def distinct_ops(analysis, seen):
    """One op per name and bound rule."""
    for node in analysis.step.ops:
        if is_getitem(node) or "update" in op_name(node):
            continue
        key = (op_name(node), analysis.factors.bind(node))
        if key not in seen:
            seen.add(key)
            yield node


@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=["2", "2x2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_of_every_op_computes_the_op(name, mesh):
    analysis, env = captured(name)
    checked = 0
    for node in distinct_ops(analysis, set()):
        options = enumerate_strategies(analysis.factors.bind(node), mesh)
        # On two axes a sample keeps the time down; single axes are all proved.
        for chosen in options if len(mesh) == 1 else options[1 :: max(1, len(options) // 6)]:
            for value, got, expected in bf.split_run_join(analysis.step, analysis.factors, node, chosen, mesh, env):
                gap = bf.difference(got, expected)
                assert gap < 1e-10, f"{op_name(node)} split as {chosen} differs by {gap:.3g} in {value.name}; rule {rule_of(node)}"
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("name", FAMILIES)
def test_no_op_of_the_zoo_is_left_replicated(name):
    model, batch = zoo.load(name)
    analysis = analyse(capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0))
    assert analysis.replicated == {}


def test_printed_rules():
    """One line per op and kind of use, alphabetical. On a change look at the diff, then write the file anew with OPWEAVE_GOLDEN=1."""
    lines = set()
    for name in FAMILIES:
        model, batch = zoo.load(name)
        step = capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()))
        for node in step.ops:
            if not is_getitem(node):
                rule = rule_of(node)
                text = "view" if rule is not None and rule.view else str(rule)
                lines.add(f"{op_name(node):45} {text}")
    text = "\n".join(sorted(lines)) + "\n"
    if os.environ.get("OPWEAVE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_every_row_of_the_table_names_an_op_of_torch():
    for name in TABLE:
        space, _, op = name.rpartition("::")
        assert hasattr(getattr(torch.ops, space or "aten"), op), name


def test_the_grammar():
    rule = parse("b (g r) s!, b g t! -> b (g r), b")
    assert rule.operands == ((("b",), ("g", "r"), ("s",)), (("b",), ("g",), ("t",)))
    assert rule.flags == {"s": "!", "t": "!"}
    assert str(parse("m k, k n -> m n")) == "m k, k n -> m n"
    assert str(parse("1 (q n) h! -> h! n*")) == "1 (q n*) h! -> h! n*"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("m k, k n", "has no '->'"),
        ("m (k -> m", "'(' is not closed"),
        ("m ) -> m", "closes nothing"),
        ("! m -> m", "follows no letter"),
        ("m?, n -> m", "cannot read '?'"),
        ("m! , m* -> m", "two flags"),
        ("((a b) -> a", "nested '('"),
    ],
)
def test_a_rule_that_does_not_parse_says_where(text, says):
    with pytest.raises(RuleError, match=says.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        parse(text)


def test_pattern_refuses_bad_arguments():
    with pytest.raises(ValueError, match="has no namespace"):
        ow.pattern("scale", "m n, m -> m n")
    with pytest.raises(ValueError, match="not one of 'sum', 'max', 'min'"):
        ow.pattern("mylib::scale", "m n, m -> m n", reduce="prod")
    with pytest.raises(ValueError, match="needs local="):
        ow.pattern("mylib::scale", "m* n, m -> m n")
    with pytest.raises(RuleError, match="does not have"):
        ow.pattern("mylib::scale", "m n, m -> m n", linear=((2,),))
