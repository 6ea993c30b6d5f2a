"""Starts a worker script of this folder on several ranks: through torchrun, or by forking, which imports torch only once."""

import os
import subprocess
import sys
from pathlib import Path

WORKERS = Path(__file__).parent / "workers"


def launch(script: str, *args: str, num_ranks: int, timeout_s: float = 150, torchrun: bool = False) -> str:
    """Output of all ranks. Fails on a non-zero exit and on a timeout."""
    command = [sys.executable, "-W", "ignore"]
    command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"] if torchrun else [str(WORKERS / "fork_ranks.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(num_ranks), str(WORKERS / script), *args],
        capture_output=True, text=True, timeout=timeout_s, env=environment, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{script} ended with {done.returncode}:\n{output}"
    return output
