"""The disk tier's file: space is reused, and everything a disk can do wrong is told."""

import gc
import os
import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.runtime import copies, disk
from opweave.runtime.copies import chunks_of, memory_of
from opweave.runtime.disk import ALIGN_BYTES, DiskFile, Extents, TierError, checksum


def data(num_bytes, seed=0):
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def written(file, values):
    place = file.place(len(values))
    file.write(place, chunks_of(values))
    return place


def read(file, place):
    out = torch.empty(place.num_bytes, dtype=torch.uint8)
    file.read(place, chunks_of(out))
    return out


# ------------------------------------------------------------------------------------------------------------------------- space


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_extents_never_overlap_and_come_together_again(actions):
    extents, used = Extents(), []
    for take, size in actions:
        if take:
            offset = extents.take(size)
            if offset is None:
                start, free = extents.tail()
                assert free < size
                extents.grown(start + size)
                offset = extents.take(size)
            assert all(offset + size <= other or other + length <= offset for other, length in used)
            used.append((offset, size))
        elif used:
            extents.give(*used.pop(size % len(used)))
        assert extents.free_bytes + sum(length for _, length in used) == extents.size_bytes
    while used:
        extents.give(*used.pop())
    assert extents.take(extents.size_bytes) == (0 if extents.size_bytes else None)


def test_space_is_used_again(tmp_path):
    file = DiskFile(tmp_path)
    for step in range(5):
        places = [written(file, data(n, step)) for n in (5000, 300, 70000)]
        for place, n in zip(places, (5000, 300, 70000), strict=True):
            assert torch.equal(read(file, place), data(n, step))
        del places, place
        gc.collect()
    assert os.fstat(file.fd).st_size == (2 + 1 + 18) * ALIGN_BYTES
    file.close()


def test_space_is_reserved_before_it_is_written(tmp_path):
    file = DiskFile(tmp_path)
    place = file.place(10 * ALIGN_BYTES)
    assert os.fstat(file.fd).st_blocks * 512 >= place.num_bytes


def test_the_file_has_no_name_and_ends_with_its_owner(tmp_path):
    file = DiskFile(tmp_path)
    place = written(file, data(10))
    assert list(tmp_path.iterdir()) == []
    fd = file.fd
    del file
    os.fstat(fd)  # the place still needs it
    del place
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_killed_process_leaves_nothing(tmp_path):
    script = (
        "import os, signal, sys, torch\n"
        "from opweave.runtime.tiers import TierOptions, TierStore\n"
        "store = TierStore(TierOptions(disk_path=sys.argv[1]))\n"
        "parked = store.park(torch.ones(100000), 'disk')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -9 and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------------------ failures


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match=r"cannot use the folder .*/file/x: .*Not a directory.*TierOptions\(disk_path=...\)"):
        DiskFile(tmp_path / "file" / "x")
    with pytest.raises(TierError, match=r"cannot use the folder /proc/none"):
        DiskFile("/proc/none")


def test_a_folder_in_memory_is_told(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path}/ram tmpfs rw 0 0\n/dev/vdb {tmp_path}/ram/disk ext4 rw 0 0\n")
    in_memory = disk._is_in_memory
    assert in_memory(tmp_path / "ram" / "x", mounts) and not in_memory(tmp_path, mounts)
    assert not in_memory(tmp_path / "ram" / "disk", mounts) and not in_memory(tmp_path / "ram", tmp_path / "none")
    monkeypatch.setattr(disk, "_is_in_memory", lambda folder: True)
    with pytest.warns(UserWarning, match=r", a file system in memory: .* takes host memory. .*TierOptions\(disk_path=...\)"):
        DiskFile(tmp_path)


def test_a_missing_folder_is_made(tmp_path):
    written(DiskFile(tmp_path / "a" / "b"), data(10))
    assert (tmp_path / "a" / "b").is_dir()


def test_a_full_disk_is_found_when_space_is_asked_for(tmp_path):
    """With a limit on the size of files, as a quota gives."""
    file = DiskFile(tmp_path)
    kept = written(file, data(5000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(TierError, match=r"cannot grow from 8192 to 2011136 bytes: .*smaller limit for the pool 'disk'"):
            file.place(1_999_000)
        assert torch.equal(read(file, written(file, data(9000, 1))), data(9000, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(read(file, kept), data(5000))
    assert torch.equal(read(file, written(file, data(1_999_000, 2))), data(1_999_000, 2))


def test_a_write_that_fails_leaves_nothing_to_read(tmp_path, monkeypatch):
    file = DiskFile(tmp_path)
    place = written(file, data(5000))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(TierError, match=r"cannot write 5000 bytes at 0 of the disk tier in .*No space left.*load the last checkpoint"):
            file.write(place, chunks_of(data(5000, 1)))
    with pytest.raises(TierError, match=r"5000 bytes in the disk tier in .* was never completely written"):
        read(file, place)
    file.write(place, chunks_of(data(5000, 2)))
    assert torch.equal(read(file, place), data(5000, 2))


def test_copies_go_on_after_short_ones(tmp_path, monkeypatch):
    """A system call may copy less than it was asked to; a signal does that."""
    write, fill = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, chunk, at: write(fd, chunk[:700], at))
    monkeypatch.setattr(os, "preadv", lambda fd, chunks, at: fill(fd, [chunks[0][:900]], at))
    monkeypatch.setattr(copies, "CHUNK_BYTES", 4096)
    file = DiskFile(tmp_path)
    assert torch.equal(read(file, written(file, data(9000))), data(9000))


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 4095, 4096, 4097, 8192, 20_001])
def test_the_checksum_is_that_of_the_bytes_however_they_come(num_bytes):
    memory = memory_of(data(num_bytes))
    whole = checksum(memory, 0)
    parts = 0
    for start in range(0, num_bytes, 8192):
        parts = checksum(memory[start : start + 8192], parts)
    assert parts == whole
    changed = [bytes([memory[i] ^ 0x80 if i == at else memory[i] for i in range(num_bytes)]) for at in {0, num_bytes // 2, num_bytes - 1}]
    assert all(checksum(memoryview(content), 0) != whole for content in changed if num_bytes)


def test_the_checksum_knows_lost_stale_and_misplaced_pages():
    content = bytearray(memory_of(data(3 * ALIGN_BYTES)))
    whole = checksum(memoryview(content), 0)
    first, second, third = (bytes(content[i * ALIGN_BYTES : (i + 1) * ALIGN_BYTES]) for i in range(3))
    for other in (second + first + third, first + second + bytes(ALIGN_BYTES), first + first + third):
        assert checksum(memoryview(other), 0) != whole


def test_a_file_that_was_cut_off(tmp_path):
    file = DiskFile(tmp_path)
    place = written(file, data(50_000))
    os.ftruncate(file.fd, 40_000)
    with pytest.raises(TierError, match=r"cannot read 50000 bytes at 0 of .*: the file ends after 40000 of them"):
        read(file, place)


@pytest.mark.parametrize("at", [0, 4999])
def test_changed_content_is_found(tmp_path, at):
    file = DiskFile(tmp_path)
    place = written(file, data(5000))
    os.pwrite(file.fd, bytes([int(data(5000)[at]) ^ 1]), at)
    with pytest.raises(TierError, match=r"returned other bytes than were written: 5000 bytes at 0 .*load the last checkpoint"):
        read(file, place)


def test_a_closed_file_is_not_another_file(tmp_path):
    file = DiskFile(tmp_path)
    place = written(file, data(10))
    file.close()
    with (tmp_path / "other").open("w+b"), pytest.raises(TierError, match="Bad file descriptor"):
        file.write(place, chunks_of(data(10)))
