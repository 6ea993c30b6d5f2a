"""The tensors that outlive a step, as one rank holds them: pieces of parameters, buffers and optimizer state, and step counts.

To the outside they have the plain model's names and shapes: as DTensors (`state_dict`), as a checkpoint that any plan and world size
loads (`save`, `load`), as a safetensors file of the plain model (`export_safetensors`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import checkpoint
from .checkpoint import CheckpointError, Elsewhere
from .communicator import Communicator
from .exposure import exposure_of, full_tensor
from .groups import AxisGroups
from .model_state import named_tensors, optimizer_state, piece_of, plain_names, step_counts, words
from .program import Key, LocalProgram
from .safetensors_file import DTYPES, write_order, write_safetensors
from .tiers import Parked, TierStore

__all__ = ["CheckpointError", "ProgramState"]


@dataclass(slots=True)
class ProgramState:
    """This rank's stored tensors.

    tensors: by (kind, fqn, slot); parked where the program keeps them in another tier of memory. steps: fqn of a parameter → updates
    done (float32 scalar). names: entry of the plain model's state dict → its key; several for tied weights. others: entries of the
    state dict the program has no part in. store: where parked tensors are.
    """

    program: LocalProgram
    coords: tuple[int, ...]
    tensors: dict[Key, torch.Tensor | Parked] = field(default_factory=dict)
    steps: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, Key] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: set[Key] = field(default_factory=set)  # tensors that are the model's own
    store: TierStore = field(default_factory=TierStore)

    # -- making -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_model(
        cls,
        program: LocalProgram,
        model: nn.Module,
        coords: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        optimizer: torch.optim.Optimizer | None = None,
        share: bool = False,
        store: TierStore | None = None,
    ) -> ProgramState:
        """Cut a model's parameters and buffers.

        optimizer: where it has state (it has already trained), that is cut too; otherwise state starts at zero. share: pieces that
        are the whole tensor on the same device are the model's own, so that training changes the model and takes no second copy.
        store: for what the program keeps in another tier. One tensor is cut, copied and parked at a time.
        Raises ValueError where the model does not fit the program.
        """
        named = named_tensors(model)
        full = {key: tensor.detach() for key, tensor in named.items()}
        if optimizer is not None:
            full |= optimizer_state(named, optimizer)
        state = cls.from_tensors(program, full, coords, device=device, share=share, store=store)
        if optimizer is not None:
            state.steps = step_counts(program, named, optimizer)
        state.names, state.others = plain_names(model, program, named)
        return state

    @classmethod
    def from_tensors(
        cls,
        program: LocalProgram,
        full: Mapping[Key, torch.Tensor],
        coords: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        share: bool = False,
        store: TierStore | None = None,
    ) -> ProgramState:
        """Cut full tensors; optimizer state that is not given starts at zero. Raises ValueError for missing or misshapen ones."""
        names = {port.fqn: key for key, port in program.stored.items() if port.kind != "state"}
        state = cls(program, coords, names=names, store=store or TierStore())
        target = torch.device(device)
        for key, port in program.stored.items():
            if port.tier != "device":
                # Straight from where the model is: the device need not hold it.
                state.tensors[key] = state.store.park(piece_of(port, full, coords, None, share=True), port.tier, target, port.cast)
                continue
            piece = state.tensors[key] = piece_of(port, full, coords, target, share)
            if key in full and piece.data_ptr() == full[key].data_ptr():
                state.shared.add(key)
        return state

    def put(self, key: Key, value: torch.Tensor | Parked) -> None:
        """Store the new value of a tensor. The model's own memory is kept; other memory is given up for the new."""
        held = self.tensors[key]
        if value is held:
            return
        if key in self.shared:
            assert isinstance(held, torch.Tensor) and isinstance(value, torch.Tensor), f"{key} is shared with the model"
            held.copy_(value)
        else:
            self.tensors[key] = value

    def value(self, key: Key) -> torch.Tensor:
        """A stored tensor: itself on the device, a copy of it from another tier."""
        held = self.tensors[key]
        return held if isinstance(held, torch.Tensor) else self.store.load(held)

    def write(self, key: Key, value: torch.Tensor) -> None:
        """Replace the content of a stored tensor."""
        held = self.tensors[key]
        if isinstance(held, Parked):
            self.store.overwrite(held, value)
        else:
            held.copy_(value)

    def restore_casts(self) -> None:
        """Make the narrow forms of parameters anew: behind a step that failed they may hold gradients."""
        for held in self.tensors.values():
            if isinstance(held, Parked) and held.cast is not None:
                self.store.overwrite(held, self.store.load(held, torch.device("cpu")))

    def check(self, program: LocalProgram) -> None:
        """Raise ValueError where this state does not hold what a program stores."""
        for key, port in program.stored.items():
            held, spec = self.tensors.get(key), port.spec
            assert spec is not None, f"{port.name} is stored without a layout"
            if held is None:
                raise ValueError(f"the state has no {words(key)}, which the program stores; it was made for another program")
            if tuple(held.shape) != spec.local_shape() or held.dtype != port.dtype:
                raise ValueError(
                    f"{words(key)} is {held.dtype} of shape {tuple(held.shape)} in the state; the program stores "
                    f"{port.dtype} of shape {spec.local_shape()}"
                )
            tier = held.tier if isinstance(held, Parked) else "device"
            if tier != port.tier:
                raise ValueError(f"{words(key)} is on the tier {tier!r} in the state; the program keeps it on {port.tier!r}")
            cast = held.cast.dtype if isinstance(held, Parked) and held.cast is not None else None
            if cast != port.cast:
                raise ValueError(f"{words(key)} is stored as {cast} beside its own type in the state; the program reads it as {port.cast}")

    # -- plain tensors ------------------------------------------------------------------------------------------------

    def full(self, key: Key, groups: AxisGroups) -> torch.Tensor:
        """The whole of one stored tensor, on every rank. All ranks call it, for the same keys in the same order."""
        return full_tensor(self.value(key), self._spec(key), self._communicator(groups))

    def to_model(self, model: nn.Module, groups: AxisGroups) -> None:
        """Copy parameters and buffers into a model, whole, on every rank. All ranks call it."""
        for key, tensor in named_tensors(model).items():
            if key in self.tensors:
                full = self.full(key, groups)
                if tensor.shape != full.shape:  # released
                    tensor.data = full.to(tensor.device, copy=True)
                elif tensor.data_ptr() != full.data_ptr():
                    with torch.no_grad():
                        tensor.copy_(full)

    def release_model(self, model: nn.Module) -> None:
        """Free the model's own copies of what this state holds pieces of; `to_model` gives them back. Until then they are empty."""
        for key, tensor in named_tensors(model).items():
            held = self.tensors.get(key)
            if isinstance(held, Parked) or (held is not None and tensor.data_ptr() != held.data_ptr()):
                tensor.data = tensor.data.new_empty(0)

    def load_model(self, source: Mapping[str, torch.Tensor] | str | os.PathLike[str]) -> None:
        """Take parameters and buffers from a plain model's state dict or safetensors file; every rank reads what it needs.

        Optimizer state and step counts stay. Raises CheckpointError for a damaged file and for missing, unexpected or
        misshapen entries; nothing is changed then.
        """
        if isinstance(source, Mapping):
            self._take({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in source.items()}, source.__getitem__, "the state dict")
            return
        try:
            with safe_open(os.fspath(source), framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                described = {name: (DTYPES.get(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
                self._take(described, file.get_tensor, str(source))
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {source}") from None
        except SafetensorError as error:
            raise CheckpointError(f"{source} is no readable safetensors file ({error}); it may be cut off or damaged") from error

    def _take(
        self, described: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], get: Callable[[str], torch.Tensor], where: str
    ) -> None:
        """Check everything (name → dtype, shape), then take one tensor at a time."""
        given, plain = set(described), self.names.keys() | self.others.keys()
        # Of tied names one is enough.
        missing = {name for name in plain - given if not any(self._tied(name, other) for other in given)}
        checkpoint.check_names(missing, given - plain, where)
        for name, found in sorted(described.items()):
            dtype, shape = self._described(name)
            if found != (dtype, shape):
                raise CheckpointError(f"{name!r} is {found[0]} of shape {found[1]} in {where}, {dtype} of shape {shape} in the model")
        for name in sorted(given):
            if name in self.others:
                self.others[name].copy_(get(name))
            else:
                key = self.names[name]
                self.write(key, self._spec(key).shard(get(name), self.coords))

    def _tied(self, name: str, other: str) -> bool:
        return name in self.names and self.names.get(other) == self.names[name]

    def _described(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of an entry of the plain model's state dict."""
        if name in self.others:
            return self.others[name].dtype, tuple(self.others[name].shape)
        port = self.program.stored[self.names[name]]
        return port.dtype, self._spec(port.key).shape

    def export_safetensors(self, path: str | os.PathLike[str], groups: AxisGroups, model: nn.Module | None = None) -> None:
        """Write the plain model's state dict as one safetensors file: same names (tied ones too), shapes and dtypes.

        Rank 0 writes, tensor by tensor, through a temporary file; all ranks call it. model: unused, names are those of the model the
        state came from.
        """
        described = {name: self._described(name) for name in (*self.names, *self.others)}
        tensors = (self.others[n] if n in self.others else self.full(self.names[n], groups) for n in write_order(described))
        problem: CheckpointError | None = None
        if groups.rank == 0:
            problem = write_safetensors(Path(path), described, tensors)
        for _ in tensors:  # what rank 0 gathers needs all ranks, also where it could not write
            pass

        def report() -> None:
            if problem is not None:
                raise problem

        groups.together(report)

    # -- DTensors and checkpoints -------------------------------------------------------------------------------------

    def state_dict(self, groups: AxisGroups) -> dict[str, Any]:
        """{"model": {name: DTensor}, "optimizer": {fqn: {slot: DTensor, "step": scalar}}}. All ranks call it.

        Where a layout is a slice of a dim the DTensor shares this state's memory; others are copies, and so is what is parked: all of it
        comes to the device (`save` does not do that). On one device there is no process group and so no DTensor: plain tensors then.
        """
        self.store.finish_updates()
        return self._by_name({key: self._dtensor(key, self._out(key, self.value(key), groups), groups) for key in self.program.stored})

    def _by_name(self, exposed: Mapping[Key, Any]) -> dict[str, Any]:
        model = {name: exposed[key] for name, key in self.names.items()} | self.others
        optimizer: dict[str, dict[str, Any]] = {}
        for kind, fqn, slot in exposed:
            if kind == "state":
                optimizer.setdefault(fqn, {})[slot] = exposed[kind, fqn, slot]
        for fqn, step in self.steps.items():
            optimizer.setdefault(fqn, {})["step"] = step
        return {"model": model, "optimizer": optimizer}

    def save(self, path: str | os.PathLike[str], groups: AxisGroups, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint folder. All ranks call it. extra: JSON values to keep with it, returned by `load`.

        A save that is interrupted leaves the checkpoint that was there before. Raises CheckpointError.
        """
        self.store.finish_updates()
        entries = self._entries(groups, self.value)
        checkpoint.save(Path(path), entries, groups, dict(extra or {}), self._elsewhere())

    def load(self, path: str | os.PathLike[str], groups: AxisGroups, *, model_only: bool = False) -> dict[str, Any]:
        """Read a checkpoint, whatever plan and number of ranks wrote it; returns its `extra`. All ranks call it.

        model_only: leave optimizer state and step counts as they are. Raises CheckpointError on all ranks where it is damaged or
        of another model or optimizer; nothing is changed then.
        """
        self.store.finish_updates()
        for port in self.program.inputs:
            if port.kind == "param" and port.group >= 0:
                # Counts are part of a checkpoint from the first update on; they are read into places that exist.
                self.steps.setdefault(port.fqn, torch.zeros(()))
        entries = self._entries(groups, self._memory)
        chosen = {name: tensor for name, tensor in entries.items() if name.startswith("model/") or not model_only}
        prefix = "optimizer/" if model_only else None
        extra = checkpoint.load(Path(path), chosen, groups, ignore_prefix=prefix, elsewhere=self._elsewhere())
        self._put_back(chosen, groups)
        return extra

    def _entries(self, groups: AxisGroups, value: Callable[[Key], torch.Tensor]) -> dict[str, Any]:
        """Everything to save, by its name in a checkpoint. A tied weight is there once, under its first name.

        value: the local tensor of a key. What can be written tensor by tensor only has its shape here (see `_elsewhere`).
        """
        apart = self._apart()
        exposed = {
            key: _shape_of(self.tensors[key]) if key in apart else self._out(key, value(key), groups) for key in self.program.stored
        }
        state = self._by_name({key: self._dtensor(key, piece, groups) for key, piece in exposed.items()})
        first = {key: name for name, key in reversed(list(self.names.items()))}
        once = [name for name in state["model"] if name in self.others or first[self.names[name]] == name]
        out = {f"model/{name}": state["model"][name] for name in once}
        for fqn, slots in state["optimizer"].items():
            out |= {f"optimizer/{fqn}/{slot}": value for slot, value in slots.items()}
        return out

    def _apart(self) -> set[Key]:
        """Parked tensors whose exposure is the piece itself. Where it moves between ranks, all of them have to do that together."""
        parked = {key for key, held in self.tensors.items() if isinstance(held, Parked)}
        return {key for key in parked if not exposure_of(self._spec(key)).moves}

    def _elsewhere(self) -> dict[str, Elsewhere]:
        """Access to what is apart, by its name in a checkpoint."""
        names = self._entry_names()
        cpu = torch.device("cpu")

        def access(key: Key) -> Elsewhere:
            held = self.tensors[key]
            assert isinstance(held, Parked), f"{key} is not parked"
            return Elsewhere(
                lambda: self.store.load(held, cpu), functools.partial(self.store.overwrite, held), functools.partial(held.empty, cpu)
            )

        return {names[key]: access(key) for key in self._apart()}

    def _memory(self, key: Key) -> torch.Tensor:
        """Where a stored tensor can be read into: itself, or new memory of its shape."""
        held = self.tensors[key]
        return held if isinstance(held, torch.Tensor) else held.empty().zero_()

    def _put_back(self, entries: Mapping[str, Any], groups: AxisGroups) -> None:
        """Copy what was read for moved layouts; the others are where they belong already."""
        communicator = self._communicator(groups)
        for key, name in self._entry_names().items():
            exposure = exposure_of(self._spec(key))
            if name in entries and exposure.moves:
                self.write(key, exposure.back(_local(entries[name]), communicator, groups.mesh))

    def _entry_names(self) -> dict[Key, str]:
        out = {key: f"model/{name}" for name, key in reversed(list(self.names.items()))}
        return out | {key: f"optimizer/{key[1]}/{key[2]}" for key in self.tensors if key[0] == "state"}

    def _out(self, key: Key, piece: torch.Tensor, groups: AxisGroups) -> torch.Tensor:
        """A piece as it is shown to the outside. All ranks call it."""
        return exposure_of(self._spec(key)).out(piece, self._communicator(groups))

    def _dtensor(self, key: Key, piece: torch.Tensor, groups: AxisGroups) -> torch.Tensor:
        if groups.size == 1:
            return piece
        from torch.distributed.tensor import DTensor, Replicate, Shard

        spec = self._spec(key)
        placements = [Replicate() if dim is None else Shard(dim) for dim in exposure_of(spec).dims]
        stride = torch.empty(spec.shape, device="meta").stride()
        return DTensor.from_local(piece, groups.device_mesh(piece.device.type), placements, shape=torch.Size(spec.shape), stride=stride)

    def _spec(self, key: Key) -> Any:
        spec = self.program.stored[key].spec
        assert spec is not None, f"{key} is stored without a layout"
        return spec

    def _communicator(self, groups: AxisGroups) -> Communicator:
        groups.prepare((axis,) for axis in range(len(groups.mesh)))
        return Communicator(groups)


def _shape_of(held: torch.Tensor | Parked) -> torch.Tensor:
    """A tensor of a shape that takes no memory."""
    return torch.zeros((), dtype=held.dtype, device=held.device).expand(held.shape)


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value
