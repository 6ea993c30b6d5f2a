"""Stateless random numbers: a function of (seed, op, global linear index), so that they do not depend on the mesh.

The hash is two rounds of the 64-bit finalizer of Stafford's "Mix13" (as in SplitMix64) over the element's index, keyed by seed and
op; integer arithmetic wraps the same way on every device, so CPU and GPU agree bit for bit.
"""

from __future__ import annotations

import math

import torch

from .sharding import ShardSpec

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_BITS = 24  # of the hash that are used: exact in float32


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix an int64 tensor in place; shifts are made logical by masking the sign's copies away."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)
        x *= factor
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def _hash(seed: torch.Tensor, op_id: int, index: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """`_BITS` random bits per element of `index` (int64, any shape; overwritten)."""
    key = _mix(seed.to(index.device) * _GOLDEN + (op_id * 4 + stream + 1))
    index = index.mul_(_GOLDEN).add_(key)
    return (_mix(index) >> (64 - _BITS)) & ((1 << _BITS) - 1)


def _index(shape: list[int] | tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.arange(math.prod(shape), device=device).reshape(shape)


def _keep(bits: torch.Tensor, p: float) -> torch.Tensor:
    return bits >= round(p * (1 << _BITS))


def dropout_mask(seed: torch.Tensor, op_id: int, p: float, shape: list[int]) -> torch.Tensor:
    """Bool tensor of `shape`, False with probability `p`. seed: int64, 0-dim."""
    return _keep(_hash(seed, op_id, _index(shape, seed.device)), p)


def dropout_mask_fake(seed: torch.Tensor, op_id: int, p: float, shape: list[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bool, device=seed.device)


def uniform(seed: torch.Tensor, op_id: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Tensor of `shape`, uniform in [0, 1)."""
    return _to_unit(_hash(seed, op_id, _index(shape, seed.device)), dtype)


def normal(seed: torch.Tensor, op_id: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Tensor of `shape`, standard normal (Box-Muller in float64, so that devices agree to rounding)."""
    return _to_normal(seed, op_id, _index(shape, seed.device), dtype)


def random_fake(seed: torch.Tensor, op_id: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


def _to_unit(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    digits = 8 if dtype in (torch.bfloat16, torch.float16) else _BITS  # rounding must not reach 1
    return ((bits >> (_BITS - digits)).to(wide) / (1 << digits)).to(dtype)


def _to_normal(seed: torch.Tensor, op_id: int, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    radius = _hash(seed, op_id, index.clone(), stream=1).double().add_(0.5).div_(1 << _BITS)
    angle = _hash(seed, op_id, index, stream=2).double().mul_(2 * math.pi / (1 << _BITS))
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_()).to(dtype)


def local_index(spec: ShardSpec, coords: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Global linear index of each element of the piece that the device at `coords` owns; shape `spec.local_shape()`."""
    pieces = spec._pieces()
    total = torch.zeros((), dtype=torch.int64, device=device)
    stride = math.prod(spec.shape)
    for dim, parts in enumerate(spec.factors):
        for i, size in enumerate(parts):
            stride //= max(size, 1)
            count = size // pieces.get((dim, i), 1)
            start = spec.piece_index((dim, i), coords) * count
            places = torch.arange(start, start + count, device=device) * stride
            total = total.unsqueeze(-1) + places
    return total.reshape(spec.local_shape())


def local_dropout_mask(seed: torch.Tensor, op_id: int, p: float, spec: ShardSpec, coords: tuple[int, ...]) -> torch.Tensor:
    """This device's piece of `dropout_mask(seed, op_id, p, spec.shape)`, made without the rest."""
    return _keep(_hash(seed, op_id, local_index(spec, coords, seed.device)), p)


def local_uniform(seed: torch.Tensor, op_id: int, dtype: torch.dtype, spec: ShardSpec, coords: tuple[int, ...]) -> torch.Tensor:
    """This device's piece of `uniform(seed, op_id, spec.shape, dtype)`."""
    return _to_unit(_hash(seed, op_id, local_index(spec, coords, seed.device)), dtype)


def local_normal(seed: torch.Tensor, op_id: int, dtype: torch.dtype, spec: ShardSpec, coords: tuple[int, ...]) -> torch.Tensor:
    """This device's piece of `normal(seed, op_id, spec.shape, dtype)`."""
    return _to_normal(seed, op_id, local_index(spec, coords, seed.device), dtype)
