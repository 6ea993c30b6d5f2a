"""What starts early: fetches and gathers of parameters, with what stands between them."""

import numpy as np
import torch
from torch import fx, nn

import opweave as ow
from opweave.compiler import api
from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.lower import lower, move
from opweave.compiler.schedule import _Scheduler
from opweave.cost_model.simulate import COMPUTE, Buffer, Instruction
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


# -- where they start, by hand ----------------------------------------------------------------------------------------------


class ByHand:
    """A program of named products and copies of one unit of memory each."""

    def __init__(self, *fetched):
        self.graph, self.price, self.seconds = fx.Graph(), {}, {}
        self.stored = {name: self.graph.placeholder(f"stored_{name}") for name in fetched}

    def _add(self, target, args, name, stream, seconds, allocs=()):
        node = self.graph.call_function(target, args)
        node.name = name
        self.price[node] = Instruction(node.name, stream, seconds, (), tuple(Buffer(f"{name}.{i}", "device", 1, "x") for i in allocs))
        self.seconds[node] = seconds if stream == COMPUTE else 0.0
        return node

    def product(self, name, seconds, *read):
        return self._add(torch.ops.aten.mm.default, (*read,), name, COMPUTE, seconds)

    def fetched(self, name, seconds):
        start = self._add(tiers.fetch, (self.stored[name],), name, "host_to_device", seconds, (0,))
        return self._add(tiers.arrive, (start,), f"arrive_{name}", COMPUTE, 0.0)

    def gathered(self, name, seconds, piece):
        start = self._add(collectives.all_gather, (piece, (0,)), name, "collectives", seconds, (0,))
        return self._add(collectives.wait, (start,), f"wait_{name}", COMPUTE, 0.0)

    def scheduled(self, room, *, gathers=False):
        """Names in order, where so many units of memory are free."""
        nodes = [node for node in self.graph.nodes if node.op != "placeholder"]
        clock = np.concatenate([[0.0], np.cumsum([self.seconds[node] for node in nodes])])[:-1].tolist()
        used = np.zeros(len(nodes), dtype=np.int64)
        moves = _Scheduler(nodes, self.price, clock, used, room, {}).run(gathers=gathers)
        move(self.graph, moves)
        return [node.name for node in self.graph.nodes if node.op != "placeholder"]


def test_too_little_memory_goes_to_what_is_needed_first():
    """Both would have to start at once, and there is room for one."""
    for room, early in ((2, ["first", "second"]), (1, ["first"])):
        program = ByHand("first", "second")
        program.product("a", 1.0)
        program.product("b", 1.0, program.fetched("first", 1.0))
        program.product("c", 1.0, program.fetched("second", 2.0))
        order = program.scheduled(room)
        assert order[: order.index("a")] == early


def test_what_feeds_a_gather_is_there_when_it_starts():
    """The gather starts before a long product, sooner than it has to; its operand, which the computation waits for, sooner still."""
    program = ByHand("piece")
    program.product("short", 0.5)
    program.product("long", 10.0)
    program.product("last", 1.0, program.gathered("gather", 1.0, program.fetched("piece", 0.2)))
    order = program.scheduled(2, gathers=True)
    assert order.index("piece") < order.index("short") < order.index("arrive_piece") < order.index("gather") < order.index("long")
