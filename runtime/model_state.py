"""What a `ProgramState` takes from a plain model and a torch optimizer: tensors and names, and the pieces a rank keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .program import Key, LocalProgram, Port


def named_tensors(model: nn.Module) -> dict[Key, torch.Tensor]:
    """A model's parameters and buffers under all their names."""
    named: dict[Key, torch.Tensor] = {("param", name, ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    return named | {("buffer", name, ""): b for name, b in model.named_buffers(remove_duplicate=False)}


def plain_names(
    model: nn.Module, program: LocalProgram, named: Mapping[Key, torch.Tensor]
) -> tuple[dict[str, Key], dict[str, torch.Tensor]]:
    """Entries of the model's state dict: those the program stores, and the others."""
    key_of = {id(named[key]): key for key in program.stored if key in named}
    entries = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    names = {name: key_of[id(value)] for name, value in entries.items() if id(value) in key_of}
    return names, {name: value.detach() for name, value in entries.items() if id(value) not in key_of}


def optimizer_state(named: Mapping[Key, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[Key, torch.Tensor]:
    """What a torch optimizer has gathered so far, by key."""
    out: dict[Key, torch.Tensor] = {}
    for (kind, fqn, _), param in named.items():
        slots = optimizer.state.get(param, {}) if kind == "param" else {}
        out |= {("state", fqn, slot): value for slot, value in slots.items() if isinstance(value, torch.Tensor) and slot != "step"}
    return out


def step_counts(
    program: LocalProgram, named: Mapping[Key, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Updates a torch optimizer has done so far, by parameter (float32 scalars); only of those it has updated."""
    out: dict[str, torch.Tensor] = {}
    for key in program.stored:
        slots = optimizer.state.get(named[key], {}) if key[0] == "param" else {}
        if "step" in slots:
            out[key[1]] = torch.as_tensor(slots["step"], dtype=torch.float32).clone()
        elif slots.get("momentum_buffer") is not None:
            out[key[1]] = torch.ones(())  # SGD counts nothing; all that matters is that it is not the first step
    return out


def piece_of(
    port: Port, full: Mapping[Key, torch.Tensor], coords: tuple[int, ...], device: torch.device | None, share: bool
) -> torch.Tensor:
    """The piece of a stored tensor that the device at `coords` keeps. Raises ValueError where the model does not fit the port.

    full: what there is; state that is not in it starts at zero. device: where to copy it to; None: left where the full tensor is.
    share: the piece may be (a view of) the full tensor where it is there already."""
    assert port.spec is not None, f"{port.name} is stored without a layout"
    tensor = full.get(port.key)
    if tensor is None and port.kind == "state":
        return torch.zeros(port.spec.local_shape(), dtype=port.dtype, device=device)
    if tensor is None:
        raise ValueError(f"the model has no {port.kind} {port.fqn!r}, which the program needs; it was made for another model")
    if tuple(tensor.shape) != port.spec.shape or tensor.dtype != port.dtype:
        raise ValueError(
            f"{words(port.key)} is {tensor.dtype} of shape {tuple(tensor.shape)} in the model; the program was made for "
            f"{port.dtype} of shape {port.spec.shape}"
        )
    piece = port.spec.shard(tensor, coords)
    if device is None:
        return piece
    # A copy, since updates work in place, unless the model may change with us.
    return piece.to(device, copy=not (share and piece.numel() == tensor.numel()))


def words(key: Key) -> str:
    kind, fqn, slot = key
    return f"{slot} of {fqn!r}" if kind == "state" else f"{kind} {fqn!r}"
