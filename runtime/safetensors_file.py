"""Writes a safetensors file tensor by tensor, so that the whole of it never is in memory.

The format: 8 bytes with the length of a JSON header (little-endian), the header (name → dtype, shape, byte range), then the tensors
row-major, without gaps. Tensors are ordered by element size, largest first, which keeps each aligned.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .checkpoint import CheckpointError
from .copies import memory_of

Described = tuple[torch.dtype, tuple[int, ...]]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes the described tensors (name → dtype, shape), each added once in the order of `names`; `close` makes the file appear.

    Methods raise OSError; whatever happens, a file that was there before stays until `close` has replaced it.
    """

    def __init__(self, path: Path, described: Mapping[str, Described]) -> None:
        self.path = path
        self.names = write_order(described)
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._file.write(_header({name: described[name] for name in self.names}))

    def add(self, tensor: torch.Tensor) -> None:
        """The next tensor."""
        host = tensor.detach().to("cpu").contiguous()
        self._file.write(memory_of(host))

    def close(self) -> None:
        """Bring the file to the disk and give it its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def give_up(self) -> None:
        """Remove what was written; nothing where it is closed."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def write_order(described: Mapping[str, Described]) -> list[str]:
    """Names in the order of the file."""
    return sorted(described, key=lambda name: (-described[name][0].itemsize, name))


def _header(described: Mapping[str, Described]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in described.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, described: Mapping[str, Described], tensors: Iterator[torch.Tensor]) -> CheckpointError | None:
    """Write a file of `tensors`, in its order; what went wrong with the file. Errors of the tensors themselves are raised."""
    writer: SafetensorsWriter | None = None
    try:
        try:
            writer = SafetensorsWriter(path, described)
            for tensor in tensors:
                writer.add(tensor)
                del tensor  # before the next one is made
            writer.close()
        finally:
            if writer is not None:
                writer.give_up()
    except OSError as error:
        problem = CheckpointError(f"cannot write {path}: {error}; what was there before is unchanged")
        problem.__cause__ = error
        return problem
    return None
