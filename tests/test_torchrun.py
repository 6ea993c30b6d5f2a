"""Real processes: `ow.compile` under torchrun on two and four ranks, against one process of plain PyTorch, in float32 to 1e-5.

Two ranks train and save; four ranks load that under another plan, train on and save; one process loads that. The same job covers what only
several processes can get wrong: another world size than the plan's, a rank with another model, plan or seed, a NaN on one rank.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import opweave as ow

from .workers.step_worker import adamw, load, plain, values, worst

WORKER = Path(__file__).parent / "workers" / "step_worker.py"


def torchrun(job: str, folder: Path, num_ranks: int) -> str:
    """Output of all ranks of a job of the worker; fails unless all end well in time."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [*command, str(WORKER), job, str(folder)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count(f"{job} ok") == num_ranks, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return torchrun("two", folder, 2)


@pytest.fixture(scope="module")
def four_ranks(folder, two_ranks):
    return torchrun("four", folder, 4)


@pytest.mark.slow
def test_two_ranks_train_like_one_process(two_ranks):
    for line in ("opt-tiny zero3: losses", "opt-tiny None: losses", "resnet-tiny ddp: losses", "mixtral-tiny megatron: losses"):
        assert two_ranks.count(line) == 1, two_ranks


@pytest.mark.slow
def test_jobs_that_do_not_fit_are_refused_on_all_ranks(two_ranks):
    for text in (
        "the mesh 4 needs 4 ranks, but this job has 2",
        "the ranks of this job do not run the same program",
        "plan differs (rank 0:",
        "options differs (rank 0:",
        "parameters and optimizer state are as before this step",
    ):
        assert two_ranks.count(f"refused: {text}") == 2, two_ranks


@pytest.mark.slow
def test_four_ranks_go_on_from_two(four_ranks):
    for line in ("opt-tiny zero3+megatron: losses", "resnet-tiny zero3: losses", "mixtral-tiny megatron_sp: losses"):
        assert four_ranks.count(line) == 1, four_ranks


@pytest.mark.slow
def test_one_process_goes_on_from_four(folder, four_ranks):
    """Optimizer state and step counts came along: two steps of two ranks, two of four, one here, as five of one process."""
    model, batch = load("opt-tiny")
    reference, _ = load("opt-tiny")
    step = ow.compile(model, ow.Cluster.preset("cpu", devices=1), optimizer=adamw(model))
    step.load(folder / "four")
    loss = float(step(batch))
    assert step.num_steps == 5
    expected = plain(reference, batch, 5)
    assert abs(loss - expected[-1]) <= 1e-5 * expected[-1]
    assert worst(values(step.to_model()), values(reference)) <= 1e-5
    again, _ = load("opt-tiny")
    again.load_state_dict(load_file(folder / "four.safetensors"))
