"""How one tensor is cut over the mesh: the one description both the compiler and the runtime use.

A tensor dimension is a product of *factors*, major to minor: a fused QKV weight of 288 rows may be (3, 6, 16). A mesh axis
either owns slices of one factor, or every device along it holds the whole tensor, or a partial sum/max/min of it.

Several axes may split the same factor; they nest in axis order (the lowest axis is the outermost cut).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Split = tuple[int, int]  # (dim, index of the factor inside that dim)
PARTIALS = ("sum", "max", "min")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """Global shape plus, for each mesh axis, a `Split`, None (replicated) or one of `PARTIALS`.

    shape: global sizes. factors: per dim its factors, major to minor; their product is the size.
    axes: one entry per mesh axis. mesh: number of devices per mesh axis.
    """

    shape: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    axes: tuple[Split | str | None, ...]
    mesh: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.axes) == len(self.mesh), f"{len(self.axes)} axis entries for a mesh of {len(self.mesh)} axes"
        for size, parts in zip(self.shape, self.factors, strict=True):
            assert math.prod(parts) == size, f"factors {parts} do not multiply to {size}"
        for (dim, index), pieces in self._pieces().items():
            assert self.factors[dim][index] % pieces == 0, f"factor {self.factors[dim][index]} of dim {dim} cut in {pieces}"

    def _pieces(self) -> dict[Split, int]:
        out: dict[Split, int] = {}
        for entry, size in zip(self.axes, self.mesh, strict=True):
            if isinstance(entry, tuple):
                out[entry] = out.get(entry, 1) * size
        return out

    @property
    def is_partial(self) -> bool:
        return any(isinstance(entry, str) for entry in self.axes)

    def local_factors(self) -> tuple[tuple[int, ...], ...]:
        """Factors of the local tensor, per dim."""
        pieces = self._pieces()
        return tuple(
            tuple(size // pieces.get((dim, i), 1) for i, size in enumerate(parts)) for dim, parts in enumerate(self.factors)
        )

    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor; the same on every rank."""
        return tuple(math.prod(parts) for parts in self.local_factors())

    def piece_index(self, split: Split, coords: tuple[int, ...]) -> int:
        """Which piece of a factor the device at `coords` (one coordinate per mesh axis) owns."""
        index = 0
        for entry, size, at in zip(self.axes, self.mesh, coords, strict=True):
            if entry == split:
                index = index * size + at
        return index

    def shard(self, tensor: torch.Tensor, coords: tuple[int, ...]) -> torch.Tensor:
        """This device's piece of a global tensor (a view where possible). Raises ValueError on another global shape."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} was given where {self.shape} is expected")
        if self.is_partial:
            raise ValueError("a partial layout has no pieces of a stored tensor")
        pieces = self._pieces()
        if not pieces:
            return tensor
        out = tensor.reshape([f for parts in self.factors for f in parts])
        flat = 0
        for dim, parts in enumerate(self.factors):
            for i in range(len(parts)):
                if (dim, i) in pieces:
                    size = parts[i] // pieces[dim, i]
                    out = out.narrow(flat, self.piece_index((dim, i), coords) * size, size)
                flat += 1
        return out.reshape(self.local_shape())

    def unshard(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """The global tensor from all ranks' pieces (rank = row-major index of the mesh coordinates); partials are combined."""
        out = None
        flat_factors = [f for parts in self.factors for f in parts]
        target = self._target(pieces[0])
        for rank, piece in enumerate(pieces):
            coords = unravel(rank, self.mesh)
            view = target.reshape(flat_factors) if out is None else out
            out = view
            where = view
            flat = 0
            cut = self._pieces()
            for dim, parts in enumerate(self.factors):
                for i in range(len(parts)):
                    if (dim, i) in cut:
                        size = parts[i] // cut[dim, i]
                        where = where.narrow(flat, self.piece_index((dim, i), coords) * size, size)
                    flat += 1
            piece = piece.reshape(where.shape)
            if not self.is_partial:
                where.copy_(piece)
            elif self._leads(coords):
                self._combine(where, piece)
        assert out is not None
        return out.reshape(self.shape)

    def _leads(self, coords: tuple[int, ...]) -> bool:
        """Of the devices that hold equal copies, exactly the first counts when partials are combined."""
        return all(entry is not None or at == 0 for entry, at in zip(self.axes, coords, strict=True))

    def _target(self, like: torch.Tensor) -> torch.Tensor:
        kinds = {entry for entry in self.axes if isinstance(entry, str)}
        assert len(kinds) <= 1, f"mixed partial kinds {kinds}"
        fill = {"max": -math.inf, "min": math.inf}.get(next(iter(kinds), "sum"), 0)
        if fill and not like.dtype.is_floating_point:
            info = torch.iinfo(like.dtype)
            fill = info.min if fill < 0 else info.max
        return torch.full(self.shape, fill, dtype=like.dtype, device=like.device)

    def _combine(self, into: torch.Tensor, piece: torch.Tensor) -> None:
        kind = next(entry for entry in self.axes if isinstance(entry, str))
        if kind == "sum":
            into.add_(piece)
        elif kind == "max":
            into.copy_(torch.maximum(into, piece))
        else:
            into.copy_(torch.minimum(into, piece))


def unravel(rank: int, mesh: tuple[int, ...]) -> tuple[int, ...]:
    """Mesh coordinates of a rank (row-major: the last axis varies fastest)."""
    coords = []
    for size in reversed(mesh):
        coords.append(rank % size)
        rank //= size
    return tuple(reversed(coords))


def replicated(shape: tuple[int, ...], mesh: tuple[int, ...]) -> ShardSpec:
    """Every device holds the whole tensor."""
    return ShardSpec(shape=shape, factors=tuple((s,) for s in shape), axes=(None,) * len(mesh), mesh=mesh)
