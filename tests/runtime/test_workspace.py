"""What ops take for themselves: as measured, in accounts of memory, and where nothing is counted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opweave.runtime.memory import MemoryAccount, MemoryLimitError
from opweave.runtime.workspace import NOT_COUNTED, WORKSPACE_BYTES

WORKER = Path(__file__).parent / "workers" / "workspace_worker.py"
convolution = WORKSPACE_BYTES[torch.ops.aten.convolution.default]


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="what is known of oneDNN was measured on Linux with AVX-512",
)
def test_as_measured():
    done = subprocess.run([sys.executable, "-W", "ignore", str(WORKER)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "workspaces ok" in done.stdout, done.stdout + done.stderr


def test_channels_that_lie_innermost_are_not_copied():
    x = torch.empty(32, 64, 8, 8, device="meta")
    weight, conv = torch.empty(64, 64, 3, 3, device="meta"), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert convolution(x, x, weight, None, *conv) == x.nbytes
    assert convolution(x, x.to(memory_format=torch.channels_last), weight, None, *conv) == 0
    assert NOT_COUNTED[convolution](x, x, weight, None, *conv) == 0


def test_an_account_adds_it_for_an_instant():
    account = MemoryAccount(["a", "b", "c"], ())
    a, b, c = torch.empty(100), torch.empty(10), torch.empty(20)
    account.track(0, a)
    account.track(1, b, 1000)
    account.track(2, c)
    report = account.report()
    assert report.peak_bytes == 400 + 40 + 1000 and report.at == "b"
    assert report.owners == (("b's workspace", 1000), ("a", 400), ("b", 40)) and account.pools["device"].current_bytes == 520


def test_a_limit_counts_it():
    account = MemoryAccount(["a"], (), limit_bytes=1000)
    told = r"needs at least 1200 bytes on the device at a, 1000 are allowed.*Largest: a's workspace 800"
    with pytest.raises(MemoryLimitError, match=told):
        account.track(0, torch.empty(100), 800)
