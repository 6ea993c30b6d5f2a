"""Experts of transformers' mixture-of-experts models as one op, during capture only.

transformers keeps its experts as `gate_up_proj` [e, 2f, h] and `down_proj` [e, h, f] and looks up the function that computes them in a
registry by `config._experts_implementation`. Capture registers its own and sets that name, and takes both back afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..runtime.moe import MoeMlp

NAME = "opweave"
# Class name of transformers' activation module -> our name. `torch.nn.functional` ones go by their class too.
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "ReLU": "relu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu", "GELU": "gelu"}


@contextmanager
def experts_as_one_op(model: nn.Module) -> Iterator[None]:
    """Within, expert layers of transformers run `opweave::moe_mlp`."""
    moe = sys.modules.get("transformers.integrations.moe")  # nothing to do for models of other origin
    experts = [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "config")] if moe is not None else []
    if not experts:
        yield
        return
    registry = moe.ALL_EXPERTS_FUNCTIONS  # type: ignore[union-attr]
    configs = {id(m.config): m.config for m in experts}
    before = {key: config._experts_implementation for key, config in configs.items()}  # type: ignore[union-attr]
    registry[NAME] = _experts_forward
    try:
        for config in configs.values():
            config._experts_implementation = NAME  # type: ignore[union-attr]
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]  # type: ignore[union-attr]
        del registry[NAME]


def _experts_forward(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """hidden_states [t, h], top_k_index and top_k_weights [t, k] -> [t, h]."""
    act = _ACTIVATIONS.get(type(getattr(self, "act_fn", None)).__name__)
    if act is None or not _is_plain(self):
        fallback = sys.modules["transformers.integrations.moe"].batched_mm_experts_forward
        return fallback(self, hidden_states, top_k_index, top_k_weights)
    x, gate_up, down = hidden_states, self.gate_up_proj, self.down_proj
    if torch.is_autocast_enabled("cpu"):  # as the linear layers inside would; autocast does not know our op
        x, gate_up, down = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, gate_up, down))
    return MoeMlp.apply(x, top_k_index, top_k_weights, gate_up, down, act).to(hidden_states.dtype)


def _is_plain(self: Any) -> bool:
    """Gated, without bias, [gate; up] stacked, weights as (out, in): what the op computes."""
    moe = sys.modules["transformers.integrations.moe"]
    own_gate = type(self)._apply_gate is not moe._default_apply_gate
    odd = self.has_bias or self.is_transposed or self.has_post_expert_norm or self._is_expert_parallel or own_gate
    return self.has_gate and self.is_concatenated and not odd
