"""Resident memory around single convolutions against `workspace.WORKSPACE_BYTES`."""

import torch

from opweave.runtime.resident import measure_resident_peak, return_freed_memory
from opweave.runtime.workspace import WORKSPACE_BYTES

aten = torch.ops.aten
# samples, channels in, size, channels out, filter, stride, groups, dims, dtype, transposed
CASES = {
    "dense": (64, 64, 32, 64, 3, 1, 1, 2, torch.float32, False),
    "more channels": (64, 64, 16, 128, 1, 1, 1, 2, torch.float32, False),
    "channels that fill no block": (64, 96, 32, 24, 1, 1, 1, 2, torch.float32, False),
    "strided": (64, 64, 32, 128, 3, 2, 1, 2, torch.float32, False),
    "depthwise": (64, 64, 32, 64, 3, 2, 64, 2, torch.float32, False),
    "image": (64, 3, 64, 64, 7, 2, 1, 2, torch.float32, False),
    "volume": (16, 32, 16, 32, 3, 1, 1, 3, torch.float32, False),
    "line": (64, 64, 1024, 64, 3, 1, 1, 1, torch.float32, False),
    "transposed": (64, 32, 16, 32, 2, 2, 1, 2, torch.float32, True),
    "bfloat16": (64, 64, 32, 64, 3, 1, 1, 2, torch.bfloat16, False),
    "patches": (16, 32, 32, 32, 3, 1, 1, 2, torch.float64, False),
}
MOST_OFF = 0.05  # of the bytes of input and result


def taken(call) -> int:
    """What a call takes beside its results."""
    for _ in range(2):
        result = call()
        del result
    with measure_resident_peak() as peak:
        result = call()
    made = result if isinstance(result, tuple) else (result,)
    return peak.grown_bytes - sum(t.nbytes for t in made if t is not None)


def compare(name: str) -> None:
    n, c_in, size, c_out, k, stride, groups, dims, dtype, transposed = CASES[name]
    x = torch.rand(n, c_in, *[size] * dims, dtype=dtype)
    weight = torch.rand(*((c_in, c_out) if transposed else (c_out, c_in // groups)), *[k] * dims, dtype=dtype)
    padding = 0 if transposed else k // 2
    conv = ([stride] * dims, [padding] * dims, [1] * dims, transposed, [0] * dims, groups)
    y = aten.convolution.default(x, weight, None, *conv)
    grad = torch.rand_like(y)
    room = MOST_OFF * (x.nbytes + y.nbytes)
    calls = {"forward": (aten.convolution.default, (x, weight, None, *conv))}
    for mask in ([True, False, False], [False, True, False], [True, True, False]):
        calls[f"gradients {mask}"] = (aten.convolution_backward.default, (grad, x, weight, None, *conv, mask))
    for what, (op, args) in calls.items():
        measured, known = taken(lambda op=op, args=args: op(*args)), WORKSPACE_BYTES[op](y, *args)
        assert abs(measured - known) <= room, f"{name}, {what}: {measured} bytes measured, {known} known"


torch.set_num_threads(1)
assert return_freed_memory()
for case in CASES:
    compare(case)
print("workspaces ok")
