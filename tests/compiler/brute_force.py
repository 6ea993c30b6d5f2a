"""Split an op, run the pieces in lockstep, put the results together, compare with the unsplit op."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from opweave.compiler.analyse import analyse
from opweave.compiler.factors import result_values
from opweave.compiler.lower import Assignment, Lowering
from opweave.compiler.rule import tensor_args
from opweave.runtime.lockstep import LockstepExecutor
from opweave.runtime.program import LocalProgram, Port
from opweave.runtime.sharding import ShardSpec, unravel
from opweave.runtime.state import ProgramState


def interpret(step, inputs):
    """Every value of a step graph on real global tensors: node → tensor (or tuple)."""
    env = {}

    def read(arg):
        return fx.node.map_arg(arg, lambda n: env[n])

    for node in step.graph.nodes:
        if node.op == "placeholder":
            env[node] = inputs[node.name]
        elif node.op == "call_function":
            if str(node.target) == "opweave.update.default":
                param, grad, state = node.args[0], node.args[1], node.args[2]
                env[node] = [env[param] - 0.1 * env[grad], *(env[s] for s in state)]
            elif node.target is operator.getitem:
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = node.target(*read(node.args), **read(node.kwargs))
    return env


def pieces_of(spec: ShardSpec, value: torch.Tensor) -> list[torch.Tensor]:
    """All ranks' pieces of a global tensor; a partial sum is given as different summands that add up to it."""
    num = math.prod(spec.mesh)
    whole = ShardSpec(
        shape=spec.shape, factors=spec.factors, axes=tuple(None if isinstance(a, str) else a for a in spec.axes), mesh=spec.mesh
    )
    out = []
    generator = torch.Generator().manual_seed(0)
    partial_axes = [i for i, a in enumerate(spec.axes) if isinstance(a, str)]
    count = math.prod(spec.mesh[i] for i in partial_axes)
    kinds = {spec.axes[i] for i in partial_axes}
    assert kinds <= {"sum"}, f"operands are only ever partial sums, not {kinds}"
    noise = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) for _ in range(count - 1)]
    summands = [*noise, value - sum(noise)] if count > 1 else [value]
    for rank in range(num):
        coords = unravel(rank, spec.mesh)
        at = 0
        for i in partial_axes:
            at = at * spec.mesh[i] + coords[i]
        out.append(whole.shard(summands[at], coords).clone())
    return out


def one_op_program(lowering: Lowering, node: fx.Node, bound, chosen) -> LocalProgram:
    """A program that runs just this op: operands as inputs, results as outputs."""
    values = tensor_args(node)
    local, ports = {}, []
    for i, (value, layout) in enumerate(zip(values, chosen.operands, strict=True)):
        local[i] = lowering.e.graph.placeholder(f"x{i}")
        ports.append(Port(name=f"x{i}", kind="batch", fqn=f"x{i}", dtype=value.meta["val"].dtype, spec=lowering.spec(value, layout)))
    result = lowering.emit_op(node, bound, chosen, local)
    outputs, out_ports = [], []
    for index, value in enumerate(result_values(node)):
        if value is None:
            continue
        piece = (
            result[index]
            if isinstance(result, (tuple, list))
            else result
            if value is node
            else lowering.e.op(operator.getitem, result, index)
        )
        outputs.append(piece)
        out_ports.append(
            Port(
                name=value.name,
                kind="extra",
                fqn=value.name,
                dtype=value.meta["val"].dtype,
                spec=lowering.spec(value, chosen.results[index]),
            )
        )
    lowering.e.graph.output(tuple(outputs))
    return LocalProgram(mesh=lowering.mesh, graph=lowering.e.graph, inputs=tuple(ports), outputs=tuple(out_ports))


def split_run_join(step, factors, node, chosen, mesh, env):
    """[(value node, joined result, expected)] of one op under one strategy."""
    lowering = Lowering(step, factors, Assignment(mesh=mesh))
    program = one_op_program(lowering, node, factors.bind(node), chosen)
    executor = LockstepExecutor(program)
    size = math.prod(mesh)
    executor.states = [ProgramState(program, unravel(r, mesh)) for r in range(size)]
    cut = [pieces_of(port.spec, env[v]) for port, v in zip(program.inputs, tensor_args(node), strict=True)]
    results = executor.run_local([{f"x{i}": c[rank] for i, c in enumerate(cut)} for rank in range(size)])
    out = []
    for i, port in enumerate(program.outputs):
        value = next(v for v in result_values(node) if v is not None and v.name == port.name)
        out.append((value, port.spec.unshard([r[i] for r in results]), env[value]))
    return out


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    if not b.numel():
        return 0.0
    a, b = a.to(torch.float64), b.to(torch.float64)
    gap = torch.where(a == b, 0.0, (a - b).abs())  # infinities of a mask are equal
    return float(gap.max()) / max(1.0, float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0)


__all__ = ["analyse", "difference", "interpret", "one_op_program", "pieces_of", "split_run_join"]
