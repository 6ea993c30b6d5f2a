"""`opweave::attention`: scaled dot-product attention as one op, with the kernel the device's eager PyTorch would pick.

q is [b, hq, s, d], k and v are [b, hkv, t, d] with hq a multiple of hkv (query head i attends to key head i // (hq // hkv)), mask is added
to the scores and broadcasts to [b, hq, s, t]. The results are out [b, hq, s, d] and lse [b, hq, s], the log-sum-exp of each row of scores
(float32 for half types). Dropout is never inside: capture decomposes attention with dropout.
"""

from __future__ import annotations

import math

import torch

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, bool is_causal, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The kernels want the head dim contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float) -> Pair:
    """(out, lse)."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    if _flash_on_gpu(q, mask):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    return _math_forward(q, k, v, mask, is_causal, scale)


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> Triple:
    """(dq, dk, dv)."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    if _flash_on_gpu(q, mask):
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # random state: there is no dropout
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, unused, unused, scale=scale
        )
    return _math_backward(grad, q, k, v, mask, out, lse, is_causal, scale)


def _flash_on_gpu(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.device.type == "cuda" and half and mask is None and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float) -> torch.Tensor:
    """[b, hq, s, t] in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    if is_causal:
        upper = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(upper, -math.inf)
    return scores if mask is None else scores + mask


def _math_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float) -> Pair:
    scores = _scores(q, k, mask, is_causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    weights = _weights(scores, lse).to(v.dtype)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), lse


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), zero in rows where everything is masked."""
    return (scores - lse.unsqueeze(-1)).exp().nan_to_num(nan=0.0)


def _math_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> Triple:
    groups = q.shape[1] // k.shape[1]
    weights = _weights(_scores(q, k, mask, is_causal, scale), lse)
    dv = weights.to(grad.dtype).transpose(-1, -2) @ grad
    dweights = (grad @ v.repeat_interleave(groups, dim=1).transpose(-1, -2)).to(weights.dtype)
    row = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1, keepdim=True)
    dscores = (weights * (dweights - row) * scale).to(q.dtype)
    dq = dscores @ k.repeat_interleave(groups, dim=1)
    dk = dscores.transpose(-1, -2) @ q
    return dq, _sum_groups(dk, groups), _sum_groups(dv, groups)


def _sum_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def _heads_last(x: torch.Tensor) -> torch.Tensor:
    """Empty, shaped like x [b, h, s, d], laid out as [b, s, h, d] as the CPU kernel does."""
    b, h, s, d = x.shape
    return x.new_empty((b, s, h, d)).transpose(1, 2)


def forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float) -> Pair:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    return torch.empty_like(_dense(q)), lse


def backward_fake(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> Triple:
    return _heads_last(q), _heads_last(k), _heads_last(v)
