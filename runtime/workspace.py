"""Memory that an op takes for itself while it runs, beside its operands and results.

Convolutions on a CPU. oneDNN computes on tensors whose channels lie in blocks of 16: operands are copied into that form and results out of
it. Where torch does without oneDNN it writes out the patches under the filter ("im2col"). Which of these copies are there at once was
found by measuring the memory of the process around single convolutions (torch 2.13, AVX-512; `tests/runtime/test_workspace.py` does
that again). On a GPU an op's workspace is the library's own choice within what is free: none is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_BLOCK = 16
_FEW_CHANNELS = 3  # an image of up to so many is read as it is
_SMALL = 20480  # elements of a single sample up to which torch does without oneDNN

Numbers = Sequence[int]


class _Side(NamedTuple):
    """Input or result of a convolution: bytes as torch has it, and in blocks of channels."""

    plain: int
    blocked: int

    @classmethod
    def of(cls, x: torch.Tensor) -> _Side:
        channels = x.shape[1]
        return cls(x.nbytes, x.nbytes * (-(-channels // _BLOCK) * _BLOCK) // channels)


class _Convolution:
    """x → y, forwards or backwards. For a transposed one x is what the filter yields and y what it reads."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, stride: Numbers, dilation: Numbers, groups: int) -> None:
        self.x, self.y = _Side.of(x), _Side.of(y)
        self.x_read = 0 if x.shape[1] <= _FEW_CHANNELS else self.x.blocked
        self.spreads = groups == 1 and max(stride) > 1  # its gradient is spread over more places than it has
        self.blocks = _uses_onednn(x, weight, stride, dilation, groups)
        self.filter_size = math.prod(weight.shape[2:])
        self.patches = y.shape[0] * math.prod(y.shape[2:]) * x.shape[1] * self.filter_size * x.element_size()
        self.samples, self.groups = x.shape[0], groups

    def make_y(self) -> int:
        if not self.blocks:
            return self._of_groups(self.patches if self.filter_size > 1 else 0, self.y)
        return max(self.x_read + self.y.blocked, self.y.blocked + self.y.plain) - self.y.plain

    def make_x(self) -> int:
        if not self.blocks:
            return self._of_groups(self.patches // max(1, self.samples), self.x)
        if self.spreads and not self.x_read:
            return max(self.y.blocked, 2 * self.x.plain)
        spread = self.x.blocked if self.spreads else 0
        return max(self.y.blocked + self.x.blocked, self.x.blocked + self.x.plain) - self.x.plain + spread

    def make_weight(self) -> int:
        if not self.blocks:
            return self.patches // self.groups if self.filter_size > 1 else 0
        return self.x_read + self.y.blocked

    def _of_groups(self, patches: int, made: _Side) -> int:
        """Groups are computed one by one, and put together."""
        return patches if self.groups == 1 else patches // self.groups + made.plain


def _uses_onednn(x: torch.Tensor, weight: torch.Tensor, stride: Numbers, dilation: Numbers, groups: int) -> bool:
    """As torch decides (`use_mkldnn` in aten/src/ATen/native/Convolution.cpp), with one thread."""
    if not torch.backends.mkldnn.is_available() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    kernel = weight.shape[2:]
    if x.dtype == torch.bfloat16:
        return True
    pays = max(stride) > 1 or max(dilation) > 1 or x.shape[0] >= 16 or max(kernel[-2:]) > 1
    return pays and (groups > 1 or min(kernel[-2:]) > 3 or x.shape[0] > 1 or x.numel() > _SMALL)


def _between(read: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, conv: Sequence[Any]) -> _Convolution | None:
    """None where nothing is copied: channels that lie innermost already."""
    stride, _, dilation, transposed, _, groups = conv
    if read.dim() == 4 and not read.is_contiguous() and read.is_contiguous(memory_format=torch.channels_last):
        return None
    x, y = (made, read) if transposed else (read, made)
    return _Convolution(x, weight, y, stride, dilation, groups)


def _forward(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any, *conv: Any) -> int:
    found = _between(x, weight, y, conv)
    if found is None:
        return 0
    return found.make_x() if conv[3] else found.make_y()


def _backward(results: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, *conv_and_mask: Any) -> int:
    *conv, (of_x, of_weight, _) = conv_and_mask
    found = _between(x, weight, grad, conv)
    if found is None:
        return 0
    return max((found.make_y() if conv[3] else found.make_x()) if of_x else 0, found.make_weight() if of_weight else 0)


def _none(result: Any, *args: Any) -> int:
    return 0


WORKSPACE_BYTES: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution.default: _forward,
    torch.ops.aten.convolution_backward.default: _backward,
}
"""Op → bytes that it takes on a CPU, with one thread, beyond operands and results: a function of its result and arguments, with data or
without."""

NOT_COUNTED = dict.fromkeys(WORKSPACE_BYTES.values(), _none)
"""What programs for other devices are bound to instead."""
