"""Small hand-written local programs for the runtime's tests."""

import operator
from dataclasses import replace

import torch
from torch import fx

from opweave.runtime import collectives as co
from opweave.runtime import update
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import ShardSpec, replicated
from opweave.runtime.state import ProgramState

aten = torch.ops.aten


def sharded(shape, mesh, axes, factors=None) -> ShardSpec:
    return ShardSpec(shape=tuple(shape), factors=factors or tuple((s,) for s in shape), axes=tuple(axes), mesh=mesh)


def linear_program(mesh=(2,), kind="AdamW", batch=8, width=4, dtype=torch.float32, zero=0, zero_dim=0) -> LocalProgram:
    """One training step of loss = mean((x w)^2) under data parallelism over axis 0.

    zero=2: the update and its state are split over axis 0, in dim `zero_dim`; the new weight is gathered. zero=3: so is the weight itself,
    gathered for use.
    """
    graph = fx.Graph()
    add, call = graph.placeholder, graph.call_function
    coords = add("coords")
    x, w = add("x"), add("w")
    slots = update.STATE_SLOTS[kind][:2]
    states = [add(name) for name in slots]
    full = w
    if zero == 3:
        full = call(co.wait, (call(co.all_gather, (w, (0,), 0, 1)),))
    y = call(aten.mm.default, (x, full))
    square = call(aten.mul.Tensor, (y, y))
    partial = call(aten.sum.default, (square,))
    scaled = call(aten.div.Tensor, (partial, batch * width))
    loss = call(co.all_reduce, (scaled, (0,), "sum"))
    dy = call(aten.mul.Tensor, (y, 2 / (batch * width)))
    dw = call(aten.mm.default, (call(aten.t.default, (x,)), dy))
    dw = call(co.reduce_scatter, (dw, (0,), zero_dim, 1)) if zero else call(co.all_reduce, (dw, (0,)))
    dw = call(co.wait, (dw,))
    piece = call(co.take_shard, (w, coords, (0,), mesh[:1], zero_dim, 1)) if zero == 2 else w
    new = call(update.fused_update, ([piece], [dw], [states], kind, 0, ["w"]))
    values = [call(operator.getitem, (new, i)) for i in range(1 + len(states))]
    if zero == 2:
        values[0] = call(co.wait, (call(co.all_gather, (values[0], (0,), zero_dim, 1)),))
    loss = call(co.wait, (loss,))
    graph.output((loss, *values))

    split, whole = sharded((width, width), mesh, [(zero_dim, 0)]), replicated((width, width), mesh)
    weight, moments = {0: (whole, whole), 2: (whole, split), 3: (split, split)}[zero]
    ports = [Port(name="w", kind="param", fqn="w", group=0, dtype=dtype, spec=weight)]
    ports += [Port(name=slot, kind="state", fqn="w", slot=slot, group=0, dtype=dtype, spec=moments) for slot in slots]
    data = Port(name="x", kind="batch", fqn="x", dtype=dtype, spec=sharded((batch, width), mesh, [(0, 0)]))
    loss_port = Port(name="loss", kind="loss", fqn="", dtype=dtype, spec=replicated((), mesh))
    return LocalProgram(mesh=mesh, graph=graph, inputs=(data, *ports), outputs=(loss_port, *ports), optimizer=kind)


def stored_on(program: LocalProgram, *tiers: str) -> LocalProgram:
    """A program whose parameters and state are stored on these tiers in turn; to hold state, not to run."""
    kinds = ("param", "state")
    stored = [port.name for port in program.inputs if port.kind in kinds]
    tier_of = {name: tiers[i % len(tiers)] for i, name in enumerate(stored)}
    ports = tuple(replace(port, tier=tier_of.get(port.name, "device")) for port in program.inputs)
    return replace(program, inputs=ports)


class Linear(torch.nn.Module):
    """What `linear_program` trains."""

    def __init__(self, width=4, dtype=torch.float32):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))

    def forward(self, x):
        return (x @ self.w).square().mean()


def batches(num=3, batch=8, width=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(num)]


def optimizer_of(kind, params, fused=True, **options):
    options = {"lr": 0.1, "fused": fused} | ({"momentum": 0.9} if kind == "SGD" else {}) | options
    return getattr(torch.optim, kind)(params, **options)


def trained(num_steps, kind="AdamW"):
    """An executor of `linear_program` on one device after some steps."""
    program, model = linear_program(mesh=(1,), kind=kind), Linear()
    optimizer = optimizer_of(kind, model.parameters())
    executor = Executor(program, AxisGroups((1,)), optimizer=optimizer, state=ProgramState.from_model(program, model, (0,)))
    for x in batches()[:num_steps]:
        executor.run({"x": x})
    return executor
