"""Hand-written programs that use the tiers of memory, for the runtime's tests."""

import operator

import torch
from torch import fx

from opweave.runtime import collectives as co
from opweave.runtime import tiers, update
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import ShardSpec, replicated

aten = torch.ops.aten


def chain_program(tier, mesh=(1,), depth=4, batch=8, width=16, kind="AdamW", state_tier="device", update_on="device") -> LocalProgram:
    """One training step of loss = mean(h_depth^2), h_i+1 = tanh(h_i w), with one weight; data parallel over axis 0.

    tier: where each h waits for the backward; "device" keeps it. state_tier: where weight and moments are stored. update_on: "device"
    fetches them for the update and writes them back, "host" updates on the CPU.
    """
    graph = fx.Graph()
    call = graph.call_function
    graph.placeholder("coords")
    x, w_in = graph.placeholder("x"), graph.placeholder("w")
    slots = update.STATE_SLOTS[kind][:2]
    states = [graph.placeholder(name) for name in slots]

    def device(value):
        return value if state_tier == "device" else call(tiers.arrive, (call(tiers.fetch, (value,)),))

    w = device(w_in)
    h = x
    saved = []
    for _ in range(depth):
        saved.append(h if tier == "device" else call(tiers.offload, (h, tier)))
        h = call(aten.tanh.default, (call(aten.mm.default, (h, w)),))
        if tier != "device":
            saved[-1] = call(tiers.settle, (saved[-1],))
    loss = call(aten.mean.default, (call(aten.mul.Tensor, (h, h)),))
    loss = call(aten.div.Tensor, (call(co.wait, (call(co.all_reduce, (loss, (0,))),)), mesh[0]))
    grad = call(aten.mul.Tensor, (h, 2 / (batch * width)))
    dw = None
    for value in reversed(saved):
        fetching = None if tier == "device" else call(tiers.fetch, (value,))
        grad = call(aten.tanh_backward.default, (grad, h))
        h = value if fetching is None else call(tiers.arrive, (fetching,))
        part = call(aten.mm.default, (call(aten.t.default, (h,)), grad))
        dw = part if dw is None else call(aten.add.Tensor, (dw, part))
        grad = call(aten.mm.default, (grad, call(aten.t.default, (w,))))
    dw = call(co.wait, (call(co.all_reduce, (dw, (0,))),))
    values = _update(call, update_on, state_tier, w, w_in, dw, states, kind, loss)
    graph.output((loss, *values))

    whole = replicated((width, width), mesh)
    common = {"fqn": "w", "group": 0, "spec": whole, "tier": state_tier}
    ports = [Port(name="w", kind="param", **common), *(Port(name=slot, kind="state", slot=slot, **common) for slot in slots)]
    rows = ShardSpec(shape=(batch, width), factors=((batch,), (width,)), axes=((0, 0),), mesh=mesh)
    data = Port(name="x", kind="batch", fqn="x", spec=rows)
    loss_port = Port(name="loss", kind="loss", fqn="", spec=replicated((), mesh))
    return LocalProgram(mesh=mesh, graph=graph, inputs=(data, *ports), outputs=(loss_port, *ports), optimizer=kind)


def _update(call, update_on, state_tier, w, w_in, dw, states, kind, loss):
    if update_on == "host":
        sent = call(tiers.offload, (dw, "host"))
        updating = call(tiers.host_update, ([w_in], [sent], [states], kind, 0, ["w"], loss))
        new = call(tiers.updated, (updating,))
        return [call(operator.getitem, (new, i)) for i in range(1 + len(states))]
    here = states if state_tier == "device" else [call(tiers.arrive, (call(tiers.fetch, (s,)),)) for s in states]
    new = call(update.fused_update, ([w], [dw], [here], kind, 0, ["w"], loss))
    values = [call(operator.getitem, (new, i)) for i in range(1 + len(states))]
    if state_tier == "device":
        return values
    back = [call(tiers.write_back, (old, value)) for old, value in zip((w_in, *states), values, strict=True)]
    return [call(tiers.settle, (parking,)) for parking in back]


class Chain(torch.nn.Module):
    """What `chain_program` trains."""

    def __init__(self, width=16, depth=4):
        super().__init__()
        self.depth = depth
        self.w = torch.nn.Parameter(torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5)

    def forward(self, h):
        for _ in range(self.depth):
            h = torch.tanh(h @ self.w)
        return (h * h).mean()
