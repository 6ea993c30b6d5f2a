"""Starts a worker script of this folder on several ranks through torchrun."""

import os
import subprocess
import sys
from pathlib import Path

WORKERS = Path(__file__).parent / "workers"


def launch(script: str, *args: str, num_ranks: int, timeout_s: float = 120, expect_failure: bool = False) -> str:
    """Output of all ranks. Fails on a non-zero exit (or, with `expect_failure`, on a zero one) and on a timeout."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(WORKERS / script), *args], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == expect_failure, f"{script} ended with {done.returncode}:\n{output}"
    return output
