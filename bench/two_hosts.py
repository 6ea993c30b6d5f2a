"""Two hosts of two ranks each with a slow link between them: does calibration find the link, and does the plan pay?

    python -m bench.two_hosts [--rate 200mbit] [--model mlp] [--small] [--json] [-o bench/results/two-hosts.json]

The hosts are network namespaces joined by a veth pair whose ends send at --rate (tc's token bucket filter). In each runs a torchrun; the
two find each other by torchrun's own rendezvous across the link. The job

1. calibrates: the cluster file then has one link inside the hosts and one between them;
2. plans the model twice, with that file and with one in which the link between the hosts is as fast as the one inside ("uniform");
3. trains both plans in turns on the same hosts.

Where the system allows it, it all runs under the real-time scheduler, ahead of what else the machine does: four ranks, two rendezvous and a
link on one machine are slow enough without that.

It takes root and Linux. Where namespaces are not allowed the script says why and ends with status 77. Nothing is sent outside of the
namespaces. Exit status 1 where the link was not found, the plans do not differ, or the plan for the real network is not the faster one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import opweave as ow
from opweave import calibration
from opweave.compiler.training_step import TrainingStep, plan_text
from opweave.cost_model.calibrate import Options
from opweave.cost_model.cluster import Cluster
from opweave.host_memory import keep_freed_memory

from . import prediction, prediction_models

SKIPPED = 77  # the exit status by which test harnesses know a skipped test
RANKS_PER_HOST = 2
_SUBNET, _PORT = "10.77.0", 29533
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class UnavailableError(RuntimeError):
    """This machine does not let us make network namespaces."""


def bytes_per_s(rate: str) -> float:
    """"200mbit" as bytes per second. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if match is None:
        raise ValueError(f"the rate {rate!r} is none; write for example 200mbit or 1gbit")
    return float(match[1]) * _BITS[match[2]] / 8


# -- hosts --------------------------------------------------------------------------------------------------------------------------


def _ip(*command: str) -> None:
    """Raises UnavailableError with what the tool said."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not installed (package iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from None


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[list[str]]:
    """Names of two namespaces, 10.77.0.1 and .2 on their devices "veth0", each sending at `rate`. Removed at the end."""
    if sys.platform != "linux":
        raise UnavailableError(f"network namespaces are a thing of Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise UnavailableError("making network namespaces takes root")
    names = [f"opweave-{os.getpid()}-{host}" for host in range(2)]
    made: list[str] = []
    try:
        for name in names:
            _ip("ip", "netns", "add", name)
            made.append(name)
        _ip("ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for host, name in enumerate(names):
            inside = ("ip", "netns", "exec", name)
            _ip(*inside, "ip", "link", "set", "lo", "up")
            _ip(*inside, "ip", "address", "add", f"{_SUBNET}.{host + 1}/24", "dev", "veth0")
            _ip(*inside, "ip", "link", "set", "veth0", "up")
            _ip(*inside, "tc", "qdisc", "add", "dev", "veth0", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "200ms")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run_on(hosts: Sequence[str], arguments: Sequence[str], timeout_s: float) -> None:
    """One torchrun per host, as a user would start them by hand. Raises RuntimeError with the output of the one that failed."""
    started, logs = [], []
    with contextlib.ExitStack() as stack:
        for number, host in enumerate(hosts):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [
                "ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)),
                "--nproc-per-node", str(RANKS_PER_HOST), "--node-rank", str(number), "--rdzv-backend", "c10d", "--rdzv-id", "two-hosts",
                "--rdzv-endpoint", f"{_SUBNET}.1:{_PORT}", "--rdzv-conf", f"is_host={int(number == 0)}",
                "--local-addr", f"{_SUBNET}.{number + 1}", "-m", "bench.two_hosts", *arguments,
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "veth0"}
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            logs.append(log)
        _finish(started, logs, timeout_s)


def _finish(started: Sequence[subprocess.Popen[bytes]], logs: Sequence[Any], timeout_s: float) -> None:
    """Wait for all; where one fails or time is up, end the others too."""
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        codes = [process.wait() for process in started]
    if any(codes):
        texts = []
        for log in logs:
            log.seek(0)
            texts.append(log.read()[-3000:])
        raise RuntimeError(f"the job on two hosts ended with {codes}:\n" + "\n--- the other host ---\n".join(texts))


# -- in the job's processes ---------------------------------------------------------------------------------------------------------


def uniform(cluster: Cluster) -> Cluster:
    """The same cluster as if the link between the nodes were the one inside them."""
    return replace(cluster, inter_node=cluster.intra_node, name=f"{cluster.name}, uniform")


def model_and_batch(name: str, small: bool) -> tuple[torch.nn.Module, Any]:
    """Of `prediction_models`; small: an MLP of 768 features."""
    if not small:
        return prediction_models.load(name)
    torch.manual_seed(0)
    from opweave.zoo_modules import Mlp

    model = Mlp(width=768, depth=3, num_classes=64)
    return model, model.make_batch(256, 768)


def work(folder: Path, model: str, small: bool) -> None:
    """Calibrate, plan twice, train in turns; rank 0 writes report.json."""
    torch.set_num_threads(1)
    keep_freed_memory()
    leads = calibration.join_job() == 0
    cluster = calibration.calibrate_here(folder / "cluster.json", Options(quick=small, dtypes=(torch.float32,)))
    steps: dict[str, tuple[TrainingStep, Any]] = {}
    for name, where in (("measured", cluster), ("uniform", uniform(cluster))):
        made, batch = model_and_batch(model, small)
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
        steps[name] = (ow.compile(made, where, optimizer=optimizer).prepare(batch), batch)
    [times] = prediction.take_turns([list(steps.values())], rounds=3 if small else 6, steps_per_round=1)
    if leads:
        (folder / "report.json").write_text(json.dumps(report(cluster, {n: s for n, (s, _) in steps.items()}, times)))
    dist.destroy_process_group()


def report(cluster: Cluster, steps: dict[str, TrainingStep], times: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Links, both plans, and their measured times. gain: median over rounds of uniform / measured."""
    plans = {}
    for (name, step), found in zip(steps.items(), times, strict=True):
        assert step.plan is not None
        plans[name] = {
            "mesh": "x".join(map(str, step.plan.mesh)),
            "patterns": step.plan.patterns,
            "predicted_s": step.plan.predicted["step_time_s"],
            "measured_s": sorted(found)[len(found) // 2],
        }
    a, b = (plan_text(step.plan) for step in steps.values() if step.plan is not None)
    ratios = sorted(u / m for m, u in zip(*times, strict=True))
    return {
        "intra_node_bytes_per_s": cluster.intra_node.bandwidth_bytes_per_s,
        "inter_node_bytes_per_s": cluster.inter_node.bandwidth_bytes_per_s,
        "plans": plans,
        "plans_differ": a != b,
        "gain": ratios[len(ratios) // 2],
    }


# -- the runner ---------------------------------------------------------------------------------------------------------------------


def measure(rate: str, model: str, small: bool, timeout_s: float = 900.0) -> dict[str, Any]:
    """The report of a run. Raises UnavailableError where there can be no hosts, RuntimeError where the job fails."""
    link = bytes_per_s(rate)
    with two_hosts(rate) as hosts, tempfile.TemporaryDirectory() as folder:
        run_on(hosts, ["--work", folder, "--model", model, *(["--small"] if small else [])], timeout_s)
        found: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    # Both ranks of a host share the link, so each has half of it; messages within the bucket's burst pass faster, hence the factor of two.
    found_rate = RANKS_PER_HOST * found["inter_node_bytes_per_s"]
    found["link_found"] = 0.5 * link < found_rate < 2 * link and 4 * found["inter_node_bytes_per_s"] < found["intra_node_bytes_per_s"]
    return {"rate": rate, "rate_bytes_per_s": link, "model": "mlp-768" if small else model, **found}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", default="200mbit", help="of the link between the hosts, as tc writes it")
    parser.add_argument("--model", default="mlp", help=f"one of {', '.join(prediction_models.NAMES)}")
    parser.add_argument("--small", action="store_true", help="a quick calibration and a small model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.work, args.model, args.small)
        return 0
    if shutil.which("tc") is None:
        print("skipped: tc is not installed (package iproute2)", file=sys.stderr)
        return SKIPPED
    with contextlib.suppress(AttributeError, PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        found = measure(args.rate, args.model, args.small)
    except UnavailableError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return SKIPPED
    result = {"environment": prediction.environment(), **found}
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))
    return 0 if found["link_found"] and found["plans_differ"] and found["gain"] > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
