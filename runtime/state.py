"""The tensors that outlive a step, as one rank holds them: pieces of parameters, buffers and optimizer state, and step counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .program import Key, LocalProgram, Port


@dataclass(slots=True)
class ProgramState:
    """tensors: this rank's piece of every stored tensor. steps: fqn of a parameter → updates done (float32 scalar)."""

    program: LocalProgram
    coords: tuple[int, ...]
    tensors: dict[Key, torch.Tensor] = field(default_factory=dict)
    steps: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_model(
        cls,
        program: LocalProgram,
        model: nn.Module,
        coords: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> ProgramState:
        """Cut a model's parameters and buffers; optimizer state starts at zero."""
        full: dict[Key, torch.Tensor] = {("param", name, ""): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        full |= {("buffer", name, ""): b.detach() for name, b in model.named_buffers(remove_duplicate=False)}
        return cls.from_tensors(program, full, coords, device=device)

    @classmethod
    def from_tensors(
        cls, program: LocalProgram, full: Mapping[Key, torch.Tensor], coords: tuple[int, ...], *, device: torch.device | str = "cpu"
    ) -> ProgramState:
        """Cut full tensors; optimizer state that is not given starts at zero. Raises ValueError for missing or misshapen ones."""
        state = cls(program, coords)
        for key, port in program.stored.items():
            state.tensors[key] = _piece(port, full, coords, torch.device(device))
        return state

    def check(self, program: LocalProgram) -> None:
        """Raise ValueError where this state does not hold what a program stores."""
        for key, port in program.stored.items():
            held = self.tensors.get(key)
            assert port.spec is not None, f"{port.name} is stored without a layout"
            if held is None:
                raise ValueError(f"the state has no {port.kind} {port.fqn} {port.slot}".rstrip())
            if tuple(held.shape) != port.spec.local_shape() or held.dtype != port.dtype:
                raise ValueError(
                    f"{port.kind} {port.fqn} {port.slot} is {held.dtype} of shape {tuple(held.shape)} in the state; the program stores "
                    f"{port.dtype} of shape {port.spec.local_shape()}"
                )


def _piece(port: Port, full: Mapping[Key, torch.Tensor], coords: tuple[int, ...], device: torch.device) -> torch.Tensor:
    assert port.spec is not None, f"{port.name} is stored without a layout"
    tensor = full.get(port.key)
    if tensor is None and port.kind == "state":
        return torch.zeros(port.spec.local_shape(), dtype=port.dtype, device=device)
    if tensor is None:
        raise ValueError(f"the model has no {port.kind} {port.fqn!r}, which the program needs; it was made for another model")
    if tuple(tensor.shape) != port.spec.shape or tensor.dtype != port.dtype:
        raise ValueError(
            f"{port.kind} {port.fqn!r} is {tensor.dtype} of shape {tuple(tensor.shape)} in the model; the program was made for "
            f"{port.dtype} of shape {port.spec.shape}"
        )
    # A copy: updates work in place, and the model keeps its own values.
    return port.spec.shard(tensor, coords).to(device, copy=True)
