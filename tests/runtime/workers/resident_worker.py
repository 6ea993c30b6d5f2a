"""A process of its own for test_resident: how the allocator behaves is set for the whole process."""

import sys
from pathlib import Path

import torch

from opweave.runtime.execute import Executor
from opweave.runtime.groups import AxisGroups
from opweave.runtime.resident import measure_resident_peak, resident_bytes, return_freed_memory
from opweave.runtime.state import ProgramState
from opweave.runtime.tiers import TierOptions, TierStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from programs import batches, optimizer_of
from tier_programs import Chain, chain_program

MB = 1 << 20


def freed_memory_is_returned() -> None:
    for num_bytes in (64 * MB, MB // 4):
        before = resident_bytes()
        kept = [torch.ones(num_bytes, dtype=torch.uint8) for _ in range(64 * MB // num_bytes)]
        grown = resident_bytes() - before
        assert abs(grown - 64 * MB) < 2 * MB, f"64 MB in blocks of {num_bytes} are {grown} bytes"
        del kept
        assert resident_bytes() - before < 2 * MB


def a_peak_is_of_what_happened_inside() -> None:
    torch.ones(100 * MB, dtype=torch.uint8)
    with measure_resident_peak() as peak:
        torch.ones(200 * MB, dtype=torch.uint8)
    assert peak.grown_bytes == peak.peak_bytes - peak.before_bytes and abs(peak.grown_bytes - 200 * MB) < 4 * MB, peak
    with measure_resident_peak() as quiet:
        pass
    assert quiet.grown_bytes < 2 * MB, quiet


def steps_need_what_is_accounted(tier: str, folder: str) -> None:
    program = chain_program(tier, batch=8192, width=256, depth=6, state_tier=tier)
    model = Chain(256, 6)
    store = TierStore(TierOptions(disk_path=folder))
    state = ProgramState.from_model(program, model, (0,), store=store)
    executor = Executor(program, AxisGroups((1,)), optimizer=optimizer_of("AdamW", model.parameters()), state=state, tiers=store)
    (x,) = batches(1, 8192, 256)
    executor.run({"x": x})
    with measure_resident_peak() as peak:
        executor.run({"x": x})
    memory = executor.memory
    there_before = memory.stored_bytes + dict(memory.owners).get("x", 0)
    expected = memory.peak_bytes - there_before
    off = (peak.grown_bytes - expected) / memory.peak_bytes
    print(f"{tier}: {memory.peak_bytes} bytes are accounted, resident {off:+.2%}", flush=True)
    assert -0.02 < off < 0.05
    executor.close()


def main() -> None:
    torch.set_num_threads(1)
    assert return_freed_memory()
    freed_memory_is_returned()
    a_peak_is_of_what_happened_inside()
    for tier in ("device", "disk"):
        steps_need_what_is_accounted(tier, sys.argv[1])
    print("resident ok")


main()
