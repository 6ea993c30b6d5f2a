"""A checkpoint folder: `torch.distributed.checkpoint` data behind one small file that says which data is current.

    path/manifest.json     version, names with shapes and types, checksums of the files, the caller's extras
    path/data-000012/      what torch.distributed.checkpoint wrote

Saving writes a new data folder, brings it to the disk and then replaces the manifest, which is one atomic rename. Whatever
interrupts it, the manifest names whole data: the old or the new. Left-over data folders are removed by the next save.

Tensors that are not in memory (`Elsewhere`) are read when they are written to the checkpoint, and written back as they are loaded: one is
in memory, and the one before it (torch's loops still hold it).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from .groups import AxisGroups

MANIFEST = "manifest.json"
VERSION = 1
_CHUNK_BYTES = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or does not belong to this model."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The local tensor of an entry that is not in memory; the entry itself only has its shape. read() gives a copy, write(x) replaces it,
    empty() is new memory for it."""

    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]
    empty: Callable[[], torch.Tensor]


class _SavePlanner(dcp.DefaultSavePlanner):
    """Reads entries that are elsewhere when their turn comes."""

    def __init__(self, elsewhere: Mapping[str, Elsewhere]) -> None:
        super().__init__()
        self.elsewhere = elsewhere

    def lookup_object(self, index: Any) -> Any:
        found = self.elsewhere.get(index.fqn)
        return super().lookup_object(index) if found is None else found.read()


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Writes entries that are elsewhere as soon as they are read. One that was saved in several pieces is written once for each."""

    def __init__(self, elsewhere: Mapping[str, Elsewhere]) -> None:
        super().__init__()
        self.elsewhere = elsewhere
        self._begun: set[str] = set()
        self._whole: torch.Tensor | None = None

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        found = self.elsewhere.get(index.fqn)
        if found is None:
            return super().lookup_tensor(index)
        self._whole = found.read() if index.fqn in self._begun else found.empty()
        return self._whole

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        fqn = read_item.dest_index.fqn
        if fqn in self.elsewhere:
            assert self._whole is not None, "a tensor is committed right after it was looked up"
            self.elsewhere[fqn].write(self._whole)
            self._begun.add(fqn)
            self._whole = None


def save(
    path: Path,
    entries: Mapping[str, Any],
    groups: AxisGroups,
    extra: dict[str, Any],
    elsewhere: Mapping[str, Elsewhere] | None = None,
) -> None:
    """Write entries (name → tensor or DTensor) as the new content of a checkpoint folder. All ranks call it.

    elsewhere: for some names what stands in for the entry's local tensor.
    """
    elsewhere = elsewhere or {}
    name = groups.together(lambda: _make_data_folder(path, extra) if groups.rank == 0 else "")[0]
    folder = path / name
    try:
        with _alone_is_fine():
            # Of one file torch's writer keeps all tensors until it is complete: then each gets its own.
            writer = dcp.FileSystemWriter(folder, sync_files=True, single_file_per_rank=not elsewhere)
            dcp.save(dict(entries), storage_writer=writer, planner=_SavePlanner(elsewhere), no_dist=groups.size == 1)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}. {_old(path)}") from error
    sums: dict[str, list[int]] = {}
    for part in groups.together(lambda: _checksums(folder, groups)):
        sums |= part
    groups.together(lambda: _commit(path, name, entries, sums, extra) if groups.rank == 0 else None)


def load(
    path: Path,
    entries: dict[str, Any],
    groups: AxisGroups,
    *,
    ignore_prefix: str | None = None,
    elsewhere: Mapping[str, Elsewhere] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into the tensors of `entries`; returns its extras. All ranks call it, and all raise where one does.

    ignore_prefix: entries of the checkpoint that need not be asked for. elsewhere: as in `save`.
    """
    manifest: dict[str, Any] = {}

    def check() -> None:
        manifest.update(_read_manifest(path))
        _check_entries(path, manifest["entries"], entries, ignore_prefix)
        _check_files(path, manifest, groups)

    groups.together(check)
    wanted = {name: value for name, value in entries.items() if name in manifest["entries"]}
    with _alone_is_fine():
        reader = dcp.FileSystemReader(path / manifest["data"])
        dcp.load(wanted, storage_reader=reader, planner=_LoadPlanner(elsewhere or {}), no_dist=groups.size == 1)
    for name, value in entries.items():
        if name not in wanted:
            value.zero_()  # step counts of a checkpoint from before the first update
    return manifest["extra"]


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without torch's warning that a process without a group reads and writes by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def check_names(missing: set[str], unexpected: set[str], where: str) -> None:
    """Raise CheckpointError where names differ."""
    problems = [f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it has unexpected", unexpected)) if names]
    if problems:
        raise CheckpointError(f"{where} does not fit this model: {'; '.join(problems)}. It belongs to another model or optimizer.")


def sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _some(names: set[str]) -> str:
    listed = ", ".join(repr(name) for name in sorted(names)[:5])
    return f"{len(names)} ({listed}{', ...' if len(names) > 5 else ''})"


def _make_data_folder(path: Path, extra: dict[str, Any]) -> str:
    try:
        json.dumps(extra)
    except TypeError as error:
        raise CheckpointError(f"extra values must be JSON (numbers, text, lists, dicts): {error}") from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = {p.name for p in path.iterdir() if not p.name.startswith((MANIFEST, "data-"))}
        if strangers:
            raise CheckpointError(f"{path} is no checkpoint folder, it holds {_some(strangers)}; give an empty or new folder")
        used = {p.name for p in path.iterdir()}
        number = next(n for n in range(1 << 20) if f"data-{n:06d}" not in used)
        (path / f"data-{number:06d}").mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}. {_old(path)}") from error
    return f"data-{number:06d}"


def _old(path: Path) -> str:
    return "The checkpoint that was there is unchanged." if (path / MANIFEST).exists() else "There was none before."


def _checksums(folder: Path, groups: AxisGroups) -> dict[str, list[int]]:
    """File → [bytes, CRC-32] of this rank's share of the files."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {p.name: [p.stat().st_size, _crc(p)] for p in files[groups.rank :: groups.size]}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _commit(path: Path, name: str, entries: Mapping[str, Any], sums: dict[str, list[int]], extra: dict[str, Any]) -> None:
    described = {entry: {"shape": list(value.shape), "dtype": str(value.dtype)} for entry, value in entries.items()}
    body = {"version": VERSION, "data": name, "entries": described, "files": sums, "extra": extra}
    manifest = body | {"checksum": _body_crc(body)}
    partial = path / (MANIFEST + ".partial")
    try:
        partial.write_text(json.dumps(manifest, indent=1))
        sync(partial)
        sync(path / name)
        partial.replace(path / MANIFEST)
        sync(path)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}. {_old(path)}") from error
    for folder in path.glob("data-*"):
        if folder.name != name:
            shutil.rmtree(folder, ignore_errors=True)


def _body_crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        what = "its save was interrupted before it was complete" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"{path} holds no complete checkpoint: {what}")
    try:
        manifest = json.loads(file.read_text())
        checksum = manifest.pop("checksum")
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"{path} is a checkpoint of version {manifest['version']}; this opweave reads version {VERSION}. Use the opweave "
                "that wrote it."
            )
        if checksum != _body_crc(manifest):
            raise ValueError("its checksum is wrong")
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); use another checkpoint") from error
    return manifest


def _check_entries(path: Path, have: Mapping[str, Any], entries: Mapping[str, Any], ignore_prefix: str | None) -> None:
    # A checkpoint from before the first update has no step counts.
    missing = {name for name in entries.keys() - have.keys() if not name.endswith("/step")}
    unexpected = {name for name in have.keys() - entries.keys() if ignore_prefix is None or not name.startswith(ignore_prefix)}
    check_names(missing, unexpected, f"the checkpoint {path}")
    for name in sorted(entries.keys() & have.keys()):
        shape, dtype = tuple(have[name]["shape"]), have[name]["dtype"]
        value: torch.Tensor = entries[name]
        if shape != tuple(value.shape) or dtype != str(value.dtype):
            raise CheckpointError(
                f"{name!r} is {dtype} of shape {shape} in the checkpoint {path}, {value.dtype} of shape {tuple(value.shape)} here: it "
                "belongs to a model of another size or type"
            )


def _check_files(path: Path, manifest: Mapping[str, Any], groups: AxisGroups) -> None:
    """Each rank checks its share."""
    for name in sorted(manifest["files"])[groups.rank :: groups.size]:
        num_bytes, crc = manifest["files"][name]
        file = path / manifest["data"] / name
        if not file.exists():
            raise CheckpointError(f"the checkpoint {path} is damaged: {file.name} is missing")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(
                f"the checkpoint {path} is damaged: {file.name} has {file.stat().st_size} bytes, {num_bytes} were written"
            )
        if _crc(file) != crc:
            raise CheckpointError(f"the checkpoint {path} is damaged: the content of {file.name} has changed since it was written")
