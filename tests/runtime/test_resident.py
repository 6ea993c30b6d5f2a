"""The process is as large as its tensors, where it is told to give back what is freed."""

import subprocess
import sys
from pathlib import Path

import pytest

from opweave.runtime import resident
from opweave.runtime.resident import resident_bytes

WORKER = Path(__file__).parent / "workers" / "resident_worker.py"

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and glibc")


@linux
def test_accounted_and_resident_memory_agree(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0 and "resident ok" in done.stdout, done.stdout + done.stderr


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\n")
    monkeypatch.setattr(resident, "_STATUS", status)
    with pytest.raises(OSError, match="has no VmRSS: the memory of this process cannot be measured"):
        resident_bytes()
    monkeypatch.setattr(resident.sys, "platform", "darwin")
    assert not resident.return_freed_memory()
