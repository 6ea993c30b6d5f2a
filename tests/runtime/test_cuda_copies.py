"""Tiers of a CUDA device. What needs one is skipped without; the pool of page-locked memory is tested with a stand-in for the driver."""

import gc
import types

import pytest
import torch

from opweave.runtime import cuda_copies
from opweave.runtime.cuda_copies import PAGE_BYTES, PinnedPool
from opweave.runtime.disk import TierError
from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.parked import HostPlace
from opweave.runtime.state import ProgramState
from opweave.runtime.tiers import TierStore, arrive, settle

from .programs import batches, optimizer_of
from .test_tiers import CHOICES, WIDTH
from .tier_programs import Chain, chain_program

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def locked(monkeypatch):
    """Page-locks nothing, remembers what it was asked to. Addresses that are locked now."""
    now = set()

    def lock(address, size, flags):
        now.add(address)
        return 0 if size < 1 << 30 else 2

    driver = types.SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=now.discard)
    monkeypatch.setattr(cuda_copies.torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(cuda_copies.torch.cuda, "synchronize", lambda: None)
    return now


def place_in(pool, num_bytes, copies=()):
    buffer, before = pool.take(num_bytes)
    place = HostPlace(buffer[:num_bytes], num_bytes, pool.give)
    place.reading = [*before, *copies]
    return place


def test_page_locked_memory_is_used_again_behind_its_copies(locked):
    pool = PinnedPool()
    copying = types.SimpleNamespace(is_done=False)
    place, done = place_in(pool, 5000, [copying]), place_in(pool, 100, [types.SimpleNamespace(is_done=True)])
    assert len(locked) == 2 and {address % PAGE_BYTES for address in locked} == {0}
    address = place.tensor.data_ptr()
    del place, done
    other, again, small = place_in(pool, 9000), place_in(pool, 8000), place_in(pool, 4096)
    assert again.tensor.data_ptr() == address and again.reading == [copying], "8000 and 5000 bytes are two pages"
    assert other.tensor.data_ptr() != address and small.reading == [] and len(locked) == 3
    del other, again, small, pool
    gc.collect()
    assert not locked


def test_memory_that_cannot_be_locked(locked):
    with pytest.raises(TierError, match=r"cannot page-lock 2147483648 bytes of host memory \(CUDA error 2\).*limit for the pool 'host'"):
        PinnedPool().take(2 << 30)


@needs_cuda
@pytest.mark.parametrize(("tier", "state_tier", "update_on"), CHOICES)
def test_the_same_numbers_as_on_the_device(tier, state_tier, update_on):
    results = []
    for program in (chain_program("device"), chain_program(tier, state_tier=state_tier, update_on=update_on)):
        model, store = Chain(WIDTH).cuda(), TierStore()
        optimizer = optimizer_of(program.optimizer, model.parameters())
        state = ProgramState.from_model(program, model, (0,), device="cuda", store=store)
        executor = Executor(program, AxisGroups((1,)), "cuda", optimizer, state=state, tiers=store)
        losses = [executor.run({"x": x})[0] for x in batches(width=WIDTH)]
        results.append([torch.stack(losses), state.value(("param", "w", "")).cuda()])
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*results, strict=True))


@needs_cuda
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_copies_keep_up_with_memory_that_is_used_again(tier):
    """Large copies between kernels that free and reuse device memory at once."""
    store = TierStore()
    for i in range(20):
        parking = store.offload(torch.full((1 << 22,), float(i), device="cuda"), tier)
        parked = settle(parking)
        del parking
        torch.full((1 << 22,), -1.0, device="cuda")
        fetching = store.fetch(parked)
        del parked
        assert bool((arrive(fetching) == i).all())
    store.close()


@needs_cuda
def test_a_fetch_nobody_waits_for_harms_nobody():
    store = TierStore()
    parked = store.park(torch.ones(1 << 24, device="cuda"), "host")
    for _ in range(10):
        store.fetch(parked)  # its memory is free at once
        assert not bool(torch.zeros(1 << 24, device="cuda").any())
