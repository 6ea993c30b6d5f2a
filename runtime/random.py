"""Stateless random numbers: a function of (seed, op, global linear index), so that they do not depend on the mesh.

The hash is the 64-bit finalizer of Stafford's "Mix13" (as in SplitMix64) over the element's index, keyed by seed and op, without its last
step, which leaves the high bits as they are: only those are used. Integer arithmetic wraps the same way on every device, so CPU and GPU
agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    return x


def _key(seed: torch.Tensor, op_id: int, stream: int) -> torch.Tensor:
    return _mix(seed * _GOLDEN + (op_id * 4 + stream + 1))


def _hash(key: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """64 bits per element of `index` (int64, any shape; overwritten), the high ones random."""
    return _mix(index.mul_(_GOLDEN).add_(key))


def _bits(key: torch.Tensor, index: torch.Tensor, num_bits: int = _BITS) -> torch.Tensor:
    """`num_bits` random bits per element as a number."""
    return (_hash(key, index) >> (64 - num_bits)).bitwise_and_((1 << num_bits) - 1)


Places = list[torch.Tensor]  # 1-D index vectors; an element's global linear index is the sum of one entry of each, major to minor
# Elements hashed at a time: the index tensor is never whole, and on the CPU it stays in cache.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 24


def _global_places(shape: Sequence[int], device: torch.device) -> Places:
    return [torch.arange(math.prod(shape), device=device)]


def _local_places(spec: ShardSpec, coords: tuple[int, ...], device: torch.device) -> Places:
    """Places of the piece that the device at `coords` owns."""
    local = spec.local_factors()
    places = []
    stride = math.prod(spec.shape)
    for dim, parts in enumerate(spec.factors):
        for i, size in enumerate(parts):
            stride //= max(size, 1)
            count = local[dim][i]
            start = spec.piece_index((dim, i), coords) * count
            places.append(torch.arange(start, start + count, device=device) * stride)
    return places or [torch.zeros(1, dtype=torch.int64, device=device)]


def _sum(places: Places) -> torch.Tensor:
    """All sums of one entry of each, in row-major order."""
    total = places[0]
    for vector in places[1:]:
        total = (total.unsqueeze(-1) + vector).reshape(-1)
    return total


def _rows_and_columns(places: Places, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the places into two vectors whose outer sum is the index, the second of them at most `chunk` long if more than one factor."""
    at, size = len(places) - 1, len(places[-1])
    while at > 0 and size * len(places[at - 1]) <= chunk:
        at -= 1
        size *= len(places[at])
    rows = _sum(places[:at]) if at else places[0].new_zeros(1)
    return rows, _sum(places[at:])


def _generate(places: Places, dtype: torch.dtype, draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`draw(index)` over all elements, in chunks; 1-D. `draw` may overwrite its argument."""
    chunk = _CHUNK.get(places[0].device.type, _CHUNK_ELSEWHERE)
    rows, columns = _rows_and_columns(places, chunk)
    out = torch.empty((len(rows), len(columns)), dtype=dtype, device=rows.device)
    width = max(min(len(columns), chunk), 1)
    height = max(chunk // width, 1)
    for top in range(0, len(rows), height):
        for left in range(0, len(columns), width):
            index = rows[top : top + height, None] + columns[left : left + width]
            out[top : top + height, left : left + width] = draw(index)
    return out.reshape(-1)


def _mask(places: Places, seed: torch.Tensor, op_id: int, p: float) -> torch.Tensor:
    key = _key(seed, op_id, 0)
    limit = (round(p * (1 << _BITS)) << (64 - _BITS)) - (1 << 63)  # hashes are signed
    if limit >= 1 << 63:
        return _generate(places, torch.bool, lambda index: torch.zeros_like(index, dtype=torch.bool))
    return _generate(places, torch.bool, lambda index: _hash(key, index) >= limit)


def _uniform(places: Places, seed: torch.Tensor, op_id: int, dtype: torch.dtype) -> torch.Tensor:
    key = _key(seed, op_id, 0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    digits = 8 if dtype in (torch.bfloat16, torch.float16) else _BITS  # rounding must not reach 1
    return _generate(places, dtype, lambda index: _bits(key, index, digits).to(wide) / (1 << digits))


def _normal(places: Places, seed: torch.Tensor, op_id: int, dtype: torch.dtype) -> torch.Tensor:
    """Box-Muller in float64, so that devices agree to rounding."""
    keys = _key(seed, op_id, 1), _key(seed, op_id, 2)

    def draw(index: torch.Tensor) -> torch.Tensor:
        radius = _bits(keys[0], index.clone()).double().add_(0.5).div_(1 << _BITS)
        angle = _bits(keys[1], index).double().mul_(2 * math.pi / (1 << _BITS))
        return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())

    return _generate(places, dtype, draw)


def dropout_mask(seed: torch.Tensor, op_id: int, p: float, shape: list[int]) -> torch.Tensor:
    """Bool tensor of `shape`, False with probability `p`. seed: int64, 0-dim."""
    return _mask(_global_places(shape, seed.device), seed, op_id, p).reshape(shape)


def dropout_mask_fake(seed: torch.Tensor, op_id: int, p: float, shape: list[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bool, device=seed.device)


def uniform(seed: torch.Tensor, op_id: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Tensor of `shape`, uniform in [0, 1)."""
    return _uniform(_global_places(shape, seed.device), seed, op_id, dtype).reshape(shape)


def normal(seed: torch.Tensor, op_id: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Tensor of `shape`, standard normal."""
    return _normal(_global_places(shape, seed.device), seed, op_id, dtype).reshape(shape)


def random_fake(seed: torch.Tensor, op_id: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


def local_dropout_mask(seed: torch.Tensor, op_id: int, p: float, spec: ShardSpec, coords: tuple[int, ...]) -> torch.Tensor:
    """This device's piece of `dropout_mask(seed, op_id, p, spec.shape)`, made without the rest."""
    return _mask(_local_places(spec, coords, seed.device), seed, op_id, p).reshape(spec.local_shape())


def local_uniform(seed: torch.Tensor, op_id: int, dtype: torch.dtype, spec: ShardSpec, coords: tuple[int, ...]) -> torch.Tensor:
    """This device's piece of `uniform(seed, op_id, spec.shape, dtype)`."""
    return _uniform(_local_places(spec, coords, seed.device), seed, op_id, dtype).reshape(spec.local_shape())


def local_normal(seed: torch.Tensor, op_id: int, dtype: torch.dtype, spec: ShardSpec, coords: tuple[int, ...]) -> torch.Tensor:
    """This device's piece of `normal(seed, op_id, spec.shape, dtype)`."""
    return _normal(_local_places(spec, coords, seed.device), seed, op_id, dtype).reshape(spec.local_shape())
