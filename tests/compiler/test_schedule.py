"""What starts early: fetches and gathers of parameters, with what stands between them."""

import torch
from torch import nn

import opweave as ow
from opweave.compiler import api
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.lower import lower
from opweave.runtime import collectives, tiers

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def scheduled(places):
    """The program of a plan that gathers every weight, in bfloat16."""
    with torch.device("meta"):
        model, batch = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))), (torch.empty(4096, 4096),)
    made = {"loss_fn": lambda m, b: m(*b).float().pow(2).mean(), "optimizer": torch.optim.AdamW(model.parameters())}
    made["autocast"] = torch.bfloat16
    plan = api.plan(model, ow.Cluster.preset("dgx-a100-640", devices=2), batch, mesh=(2,), force="zero3", places=places, **made)
    analysis = analyse(capture(model, batch, **made))
    assignment = plan.assignment(analysis.step, analysis.factors)
    assignment.moves = plan.moves
    return lower(analysis.step, analysis.factors, assignment, device="meta"), plan


def hidden_products(program):
    """Per gather of a weight: how many matrix products stand between its start and its wait."""
    nodes = list(program.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    out = []
    for node in nodes:
        if node.target is collectives.all_gather:
            (wait,) = node.users
            out.append(sum(n.target in PRODUCTS for n in nodes[place[node] : place[wait]]))
    return out


def test_gathers_of_parameters_that_are_fetched_start_before_they_are_needed():
    """Copied from the host, perhaps cast, gathered: all of it one product ahead of its reader, but for the first layer."""
    program, plan = scheduled("offload-all")
    assert any(row for row in plan.state if row.startswith("param host")), plan.state
    fetched = [n for n in program.graph.nodes if n.target in (tiers.fetch, tiers.fetch_cast)]
    hidden = hidden_products(program)
    assert len(fetched) >= 8 and len(hidden) >= 8
    assert sum(n > 0 for n in hidden) >= len(hidden) - 3, hidden
    program.graph.lint()


def test_gathers_move_with_the_casts_before_them():
    program, _ = scheduled("checkpoint")
    gathers = [n for n in program.graph.nodes if n.target is collectives.all_gather]
    assert any(n.args[0].target is torch.ops.aten._to_copy.default for n in gathers)
    hidden = hidden_products(program)
    assert len(hidden) >= 15
    assert sum(n > 0 for n in hidden) >= len(hidden) - 3, hidden
