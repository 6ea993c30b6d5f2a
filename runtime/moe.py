"""`opweave::moe_mlp`: the gated experts of a mixture-of-experts layer as one op.

x is [t, h], idx and weights are [t, k] (expert of each choice, and its routing weight), gate_up is [e, 2f, h] (gate rows, then up rows),
down is [e, h, f]. The op computes experts first_expert .. first_expert + e - 1 only; choices of other experts add nothing, so that
devices that own different experts hold partial sums of the result [t, h]. num_experts is the number of all experts.

Numerics follow the eager form: experts in order, each adds its rows to the result in x's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    if _grouped_kernels(x, gate_up, down):
        return _forward_grouped(x, idx, weights, gate_up, down, act, first_expert)
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
    if _grouped_kernels(x, gate_up, down):
        return _backward_grouped(grad, x, idx, weights, gate_up, down, act, first_expert)
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


# The same for GPUs: all experts in one grouped matrix product, and no wait for the host


def _grouped_kernels(*tensors: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these: bf16 on a recent GPU, rows a multiple of 16 bytes."""
    x = tensors[0]
    if x.device.type != "cuda" or any(t.dtype != torch.bfloat16 or t.shape[-1] % 8 for t in tensors):
        return False
    return hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device) >= (8, 0)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The choices [s = t k] sorted by expert, those of other devices' experts last. token: token of each. ends [e]: where each local
    expert's end. mine [s, 1]: whether the expert is local; grouped products leave the other rows undefined. order: choice of each."""

    order: torch.Tensor
    token: torch.Tensor
    ends: torch.Tensor
    mine: torch.Tensor

    def unsort(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [s, ...] in the order of the choices, zero where not local."""
        mine = self.mine.view(-1, *(1,) * (rows.dim() - 1))
        return torch.empty_like(rows).index_copy_(0, self.order, torch.where(mine, rows, 0))


def _sort(idx: torch.Tensor, first: int, count: int) -> _Sorted:
    local = idx.reshape(-1) - first
    local = torch.where((local < 0) | (local >= count), count, local)
    local, order = torch.sort(local, stable=True)
    ends = torch.searchsorted(local, torch.arange(count, device=idx.device), right=True, out_int32=True)
    return _Sorted(order, order // idx.shape[1], ends, (local < count).unsqueeze(-1))


def _forward_grouped(
    x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, act: str, first: int
) -> torch.Tensor:
    by = _sort(idx, first, gate_up.shape[0])
    gate, up = F.grouped_mm(x[by.token], gate_up.transpose(1, 2), offs=by.ends).chunk(2, dim=-1)
    y = F.grouped_mm(activation(act, gate) * up, down.transpose(1, 2), offs=by.ends)
    y = by.unsort(y * weights.reshape(-1)[by.order, None])
    return y.view(*idx.shape, -1).sum(1).to(x.dtype)


def _backward_grouped(
    grad: torch.Tensor,
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    first: int,
) -> Grads:
    by = _sort(idx, first, gate_up.shape[0])
    rows = x[by.token]
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=by.ends).chunk(2, dim=-1)
    gated = activation(act, gate)
    hidden = gated * up
    dy = grad[by.token]
    dweights = (dy * F.grouped_mm(hidden, down.transpose(1, 2), offs=by.ends)).sum(-1, dtype=torch.float32)
    dy = (dy * weights.reshape(-1)[by.order, None]).to(x.dtype)
    dhidden = F.grouped_mm(dy, down, offs=by.ends)
    dgate = _activation_backward(act, dhidden * up, gate.contiguous())
    dboth = torch.cat((dgate, dhidden * gated), dim=-1)
    dx = by.unsort(F.grouped_mm(dboth, gate_up, offs=by.ends)).view(*idx.shape, -1).sum(1).to(x.dtype)
    dgate_up = F.grouped_mm(dboth.t(), rows, offs=by.ends)
    ddown = F.grouped_mm(dy.t(), hidden, offs=by.ends)
    return dx, by.unsort(dweights).view_as(weights).to(weights.dtype), dgate_up, ddown


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
