"""`fork_ranks.py N SCRIPT ARGS...`: runs SCRIPT as N ranks with torchrun's environment, forked from one process."""

import os
import runpy
import signal
import socket
import sys

import opweave.runtime.state  # noqa: F401  (imported once, before the ranks part)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> int:
    num_ranks, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= common
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            runpy.run_path(script, run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status != 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


sys.exit(main())
