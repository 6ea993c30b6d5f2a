"""Memory limits as users write them."""

import pytest

from opweave.compiler.limits import limits_text, memory_limits, size_text
from opweave.cost_model.cluster import Cluster

CPU, DGX = Cluster.preset("cpu"), Cluster.preset("dgx-a100-640")


@pytest.mark.parametrize(
    "given, device",
    [
        ("40GiB", 40 * 2**30), ("40 GiB", 40 * 2**30), ("1.5GB", 1.5e9), ("512", 512), ("2Ki", 2048),
        (10e9, 10e9), ({"device": "1MiB"}, 2**20),
        ("device=4GiB", 4 * 2**30), (".5T", 5e11), ("1e3M", 1e9), ("4gib", 4 * 2**30), ("10gb", 1e10),
    ],
)  # fmt: skip
def test_sizes(given, device):
    assert memory_limits(given, CPU) == {"device": device}


def test_what_is_not_given():
    assert memory_limits(None, CPU) == {"device": CPU.device.usable_bytes}, "no disk is filled unasked"
    assert memory_limits("1GiB", DGX) == {"device": 2**30, "host": DGX.host_bytes_per_device}
    assert memory_limits("host=1GiB,disk=2GiB", DGX) == {"device": DGX.device.usable_bytes, "host": 2**30, "disk": 2**31}


@pytest.mark.parametrize("given", ["lots", "-3", 0, -1, float("nan"), float("inf"), True, "device=", "device=4GiB,disk", [1], "4GiBs"])
def test_nonsense_is_refused(given):
    with pytest.raises(ValueError, match=r"memory_limit is .*give bytes per device, a number above 0"):
        memory_limits(given, CPU)


def test_a_pool_given_twice():
    with pytest.raises(ValueError, match="'device=4GiB, device=5GiB' gives the pool 'device' twice"):
        memory_limits("device=4GiB, device=5GiB", CPU)


def test_a_refusal_shows_what_was_written():
    with pytest.raises(ValueError, match=r"memory_limit is 'device=5GiB;disk=1GB'; .*Ki, Mi, Gi, Ti of 1024"):
        memory_limits("device=5GiB;disk=1GB", CPU)


def test_unknown_pool():
    with pytest.raises(ValueError, match="names the pool 'gpu'; the pools are device, host, disk"):
        memory_limits({"gpu": 1}, CPU)


@pytest.mark.parametrize("num_bytes", [1, 1023, 1024, 1_566_612, 2**30 - 1, 4.3e9, 1.1e12, 86_517])
def test_text_is_read_back_as_no_less(num_bytes):
    back = memory_limits(limits_text({"device": num_bytes, "disk": num_bytes}), CPU)
    assert num_bytes <= back["device"] <= num_bytes * 1.001 + 1 and back["disk"] == back["device"]
    assert size_text(2**30) == "1GiB" and size_text(86_517) == "84.49KiB"
