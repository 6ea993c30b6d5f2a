"""`opweave::moe_mlp`: the gated experts of a mixture-of-experts layer as one op.

x is [t, h], idx and weights are [t, k] (expert of each choice, and its routing weight), gate_up is [e, 2f, h] (gate rows, then up rows),
down is [e, h, f]. The op computes experts first_expert .. first_expert + e - 1 only; choices of other experts add nothing, so that
devices that own different experts hold partial sums of the result [t, h]. num_experts is the number of all experts.

Numerics follow the eager form: experts in order, each adds its rows to the result in x's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

SCHEMA = (
    "(Tensor x, Tensor idx, Tensor weights, Tensor gate_up, Tensor down, str act, int first_expert, int num_experts) -> Tensor"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor idx, Tensor weights, Tensor gate_up, Tensor down, str act, int first_expert, int num_experts)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply an activation by name. Raises ValueError on an unknown one."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r} of moe_mlp; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](x)


def _activation_backward(name: str, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if name == "gelu_tanh" else "none")


def _groups(idx: torch.Tensor, first: int, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(local expert, token numbers, choice numbers) of each local expert that some token chose; choices ordered as in eager."""
    flat = idx.t().reshape(-1)  # choice-major, as eager visits (top_k position, token)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=first + count).tolist()
    num_tokens = idx.shape[0]
    at = sum(counts[:first])
    for expert in range(count):
        rows = order[at : at + counts[first + expert]]
        at += counts[first + expert]
        if rows.numel():
            yield expert, rows % num_tokens, rows // num_tokens


def forward(
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    first_expert: int,
    num_experts: int,
) -> torch.Tensor:
    """[t, h]: the weighted sum of the local experts' outputs."""
    out = x.new_zeros(x.shape[0], down.shape[1])
    for expert, token, choice in _groups(idx, first_expert, gate_up.shape[0]):
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(activation(act, gate) * up, down[expert])
        y = y * weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    first_expert: int,
    num_experts: int,
) -> Grads:
    """(dx [t, h], dweights [t, k], dgate_up, ddown); the hidden values are computed again, not kept."""
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dweights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    dgate_up = torch.zeros_like(gate_up, memory_format=torch.contiguous_format)
    ddown = torch.zeros_like(down, memory_format=torch.contiguous_format)
    # Experts from last to first: the order in which autograd adds up the eager form.
    for expert, token, choice in reversed(list(_groups(idx, first_expert, gate_up.shape[0]))):
        rows = x[token]
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        gated = activation(act, gate)
        hidden = gated * up
        weight = weights[token, choice, None]
        dy = grad[token].to(torch.promote_types(hidden.dtype, weights.dtype))
        dweights[token, choice] = (dy * F.linear(hidden, down[expert])).sum(-1).to(weights.dtype)
        dy = (dy * weight).to(hidden.dtype)
        dhidden = dy @ down[expert]
        ddown[expert] = dy.t() @ hidden
        dgate = _activation_backward(act, dhidden * up, gate)
        dboth = torch.cat((dgate, dhidden * gated), dim=-1)
        dgate_up[expert] = dboth.t() @ rows
        dx.index_add_(0, token, dboth @ gate_up[expert])
    return dx, dweights, dgate_up, ddown


def forward_fake(
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    first_expert: int,
    num_experts: int,
) -> torch.Tensor:
    return torch.empty(x.shape[0], down.shape[1], dtype=x.dtype, device=x.device)


def backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    first_expert: int,
    num_experts: int,
) -> Grads:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, weights, gate_up, down))  # type: ignore[return-value]


class MoeMlp(torch.autograd.Function):
    """The op with its backward op, for the model that is being captured."""

    @staticmethod
    def forward(ctx, x, idx, weights, gate_up, down, act):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, idx, weights, gate_up, down)
        ctx.act = act
        return torch.ops.opweave.moe_mlp(x, idx, weights, gate_up, down, act, 0, gate_up.shape[0])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, idx, weights, gate_up, down = ctx.saved_tensors
        dx, dweights, dgate_up, ddown = torch.ops.opweave.moe_mlp_backward(
            grad, x, idx, weights, gate_up, down, ctx.act, 0, gate_up.shape[0]
        )
        return dx, None, dweights, dgate_up, ddown, None
