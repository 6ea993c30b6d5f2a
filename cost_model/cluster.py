"""A cluster as numbers: its devices, hosts, disks and links, each constant with its source.

A cluster is `num_nodes` equal nodes of `devices_per_node` equal devices. Ranks count node by node, so device `d` of node `n` is rank
`n * devices_per_node + d`, and a mesh is the row-major reshape of the ranks (`torch.distributed` does the same).

Units are bytes, seconds, FLOP/s and bytes/s throughout; 1 TB/s is 10^12 bytes/s, as vendors count. A cluster file is the JSON of
`Cluster.to_dict`; `cluster_schema.py` says what is allowed in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

PRESETS = Path(__file__).parent / "presets"
FORMAT = "opweave-cluster"
VERSION = 1

DeviceKind = Literal["cuda", "cpu"]


class ClusterError(ValueError):
    """A cluster description that cannot be used; the message says which value, why, and what is valid."""


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ClusterError(f"{owner}.{name} is {value!r}; it must be a finite number above 0")


def _not_negative(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ClusterError(f"{owner}.{name} is {value!r}; it must be a finite number, 0 or more")


def _fraction(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and 0 < value <= 1):
            raise ClusterError(f"{owner}.{name} is {value!r}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way for data: seconds = start_s + hops * latency_s + bytes / rate.

    latency_s: one hop. start_s: once per operation (launch, rendezvous). bandwidth_bytes_per_s: per device and direction, as the
    vendor states it. efficiency: fraction of it that large messages reach. tables: measured `kind -> {group size as text -> points}`,
    where the points are `[bytes, seconds]` pairs by growing bytes; they take precedence over the formula.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    efficiency: float = 1.0
    start_s: float = 0.0
    tables: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _positive("link", bandwidth_bytes_per_s=self.bandwidth_bytes_per_s)
        _not_negative("link", latency_s=self.latency_s, start_s=self.start_s)
        _fraction("link", efficiency=self.efficiency)

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes per second that a large message gets."""
        return self.bandwidth_bytes_per_s * self.efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one CPU process that computes.

    peak_flops: dense FLOP/s by dtype name ("float32", "tf32", "bfloat16", "float16", "float64"). efficiency: per op class
    (`work.OP_CLASSES`) the fraction of the binding peak that large ops reach; a class that is not named has the default of
    `kernels.py`. reserved_bytes: what context, libraries and communication buffers take before any tensor. launch_s: of one kernel.
    view_s: of an op that only makes a view (0 on a GPU, whose host runs ahead). tables: measured curves,
    `"class/dtype" -> ...`, see `kernels.py`.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    peak_flops: Mapping[str, float] = field(hash=False)
    usable_fraction: float = 1.0
    reserved_bytes: int = 0
    launch_s: float = 0.0
    view_s: float = 0.0
    efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)
    update_elements_per_s: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None
    tables: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in ("cuda", "cpu"):
            raise ClusterError(f'device.kind is {self.kind!r}; known kinds are "cuda" and "cpu"')
        _positive("device", memory_bytes=self.memory_bytes, memory_bandwidth_bytes_per_s=self.memory_bandwidth_bytes_per_s)
        _positive("device.peak_flops", **self.peak_flops)
        if "float32" not in self.peak_flops:
            raise ClusterError(f"device.peak_flops names {sorted(self.peak_flops)}; float32 is needed, others fall back to it")
        _fraction("device", usable_fraction=self.usable_fraction)
        _fraction("device.efficiency", **self.efficiency)
        _not_negative("device", reserved_bytes=self.reserved_bytes, launch_s=self.launch_s, view_s=self.view_s)
        _not_negative("device", power_w=self.power_w, idle_power_w=self.idle_power_w)
        if self.usable_bytes <= 0:
            raise ClusterError(
                f"device.reserved_bytes ({self.reserved_bytes}) leaves nothing of device.memory_bytes ({self.memory_bytes}) "
                f"x usable_fraction ({self.usable_fraction})"
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes that tensors may take."""
        return int(self.memory_bytes * self.usable_fraction) - self.reserved_bytes

    def flops_per_s(self, dtype: str) -> float:
        """Peak FLOP/s of a dtype name; an unlisted dtype runs at the float32 rate."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The CPU side of one node, shared by its devices. update_elements_per_s: parameters per second of the fused CPU AdamW, whole node."""

    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    cores: int
    update_elements_per_s: float
    usable_fraction: float = 0.9
    power_w: float | None = None

    def __post_init__(self) -> None:
        _positive("host", memory_bytes=self.memory_bytes, memory_bandwidth_bytes_per_s=self.memory_bandwidth_bytes_per_s)
        _positive("host", cores=self.cores, update_elements_per_s=self.update_elements_per_s)
        _fraction("host", usable_fraction=self.usable_fraction)
        _not_negative("host", power_w=self.power_w)

    @property
    def usable_bytes(self) -> int:
        """Bytes of one node that offloaded tensors may take."""
        return int(self.memory_bytes * self.usable_fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Local storage of one node, shared by its devices."""

    capacity_bytes: int
    read: Link
    write: Link

    def __post_init__(self) -> None:
        _positive("disk", capacity_bytes=self.capacity_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes, devices and links.

    intra_node, inter_node: links of one device to its peers (inter_node: this device's share of the node's network cards).
    device_to_host, host_to_device: per device with all devices of the node copying. overlap: fraction of compute time that can hide
    communication (0 where the same cores do both). sources: "device.memory_bytes" -> "datasheet: ...", "measured: ...",
    "reported: ..." or "assumption: ...". calibration: where and when measured tables came from; None for presets.
    """

    name: str
    num_nodes: int
    devices_per_node: int
    device: Device
    host: Host
    intra_node: Link
    inter_node: Link
    device_to_host: Link
    host_to_device: Link
    disk: Disk | None = None
    overlap: float = 0.0
    price_per_node_hour: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    calibration: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        _positive("cluster", num_nodes=self.num_nodes, devices_per_node=self.devices_per_node)
        _not_negative("cluster", overlap=self.overlap, price_per_node_hour=self.price_per_node_hour)
        if self.overlap > 1:
            raise ClusterError(f"cluster.overlap is {self.overlap}; it is a fraction of compute time, 0 to 1")

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def host_bytes_per_device(self) -> int:
        """One device's share of its host's usable memory."""
        return self.host.usable_bytes // self.devices_per_node

    def fingerprint(self) -> str:
        """16 hex digits of what a plan needs to be *run* as made: nodes, devices per node, device kind, name and memory.

        Prices (bandwidths, measured tables) are left out: measuring anew must not make a plan useless.
        """
        device = self.device
        text = f"{self.num_nodes}/{self.devices_per_node}/{device.kind}/{device.name}/{device.memory_bytes}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # --- meshes -----------------------------------------------------------------------------------------------------------------

    def mesh_candidates(self) -> list[tuple[int, ...]]:
        """Meshes of all devices: 1-D, then nodes x devices, then the other 2-D ones whose inner axis fits the topology.

        The inner axis fits when it divides a node or is a number of whole nodes. The outer axis may then be a mix (several devices of
        each of several nodes); `group_link` prices it by the slower link.
        """
        total, per_node = self.num_devices, self.devices_per_node
        inner = [size for size in range(2, total) if total % size == 0 and (per_node % size == 0 or size % per_node == 0)]
        inner.sort(key=lambda size: (size != per_node, -size))
        return [(total,), *((total // size, size) for size in inner)]

    def axis_link(self, mesh: tuple[int, ...], axis: int) -> Link:
        """The link that binds a collective along one mesh axis, see `group_link`."""
        return self.group_link(mesh, (axis,))

    def group_link(self, mesh: tuple[int, ...], axes: tuple[int, ...]) -> Link:
        """The link that binds a ring over the devices that differ in `axes` only, all such groups at work at once.

        A group inside a node has `intra_node`. A group with k devices on each of several nodes leaves a node over k devices' share of
        the network, so its rate is min(intra_node, k x inter_node): with k = 1 the groups share the cards equally, with k = all one
        ring uses all of them. Raises ClusterError where the mesh is not of this cluster's size.
        """
        if math.prod(mesh) != self.num_devices:
            raise ClusterError(
                f"mesh {'x'.join(map(str, mesh))} has {math.prod(mesh)} devices, cluster {self.name!r} has {self.num_devices}; "
                f"meshes that fit: {', '.join('x'.join(map(str, m)) for m in self.mesh_candidates())}"
            )
        per_node = self.devices_of_group_on_a_node(mesh, axes)
        size = math.prod(mesh[axis] for axis in axes)
        if per_node >= size:
            return self.intra_node
        shared = self.inter_node.rate_bytes_per_s * per_node
        if per_node > 1 and self.intra_node.rate_bytes_per_s < shared:
            shared = self.intra_node.rate_bytes_per_s
        rate = shared / self.inter_node.efficiency
        if per_node == 1:
            return self.inter_node
        # Groups with several devices on a node were measured under "size/devices per node".
        mixed = {
            kind: {n.removesuffix(f"/{per_node}"): points for n, points in sizes.items() if n.endswith(f"/{per_node}")}
            for kind, sizes in self.inter_node.tables.items()
        }
        return replace(self.inter_node, bandwidth_bytes_per_s=rate, tables={k: v for k, v in mixed.items() if v})

    def devices_of_group_on_a_node(self, mesh: tuple[int, ...], axes: tuple[int, ...]) -> int:
        """Most devices that the first group of `axes` has on one node."""
        ranks = [0]
        for axis in axes:
            stride = math.prod(mesh[axis + 1 :])
            ranks = [rank + i * stride for rank in ranks for i in range(mesh[axis])]
        nodes = [rank // self.devices_per_node for rank in ranks]
        return max(nodes.count(node) for node in set(nodes))

    # --- making one -------------------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, nodes: int | None = None, devices: int | None = None) -> Cluster:
        """A shipped cluster: "dgx-a100-640", 4 nodes of it "dgx-a100-640x4" (or nodes=4), only 2 devices of a node "cpu:2" (or devices=2).

        Raises ClusterError for an unknown name.
        """
        match = re.fullmatch(r"(?P<base>.*?)(:(?P<devices>\d+))?(x(?P<nodes>\d+))?", name)
        assert match is not None
        base = name if name in preset_names() else match["base"]
        if base not in preset_names():
            raise ClusterError(
                f"unknown cluster {name!r}; shipped are {', '.join(preset_names())}, each also as NAMExNODES or NAME:DEVICES; "
                f"or give the path of a cluster file (see Cluster.save)"
            )
        data = json.loads((PRESETS / f"{base}.json").read_text())
        if base != name:
            nodes = nodes if nodes is not None else int(match["nodes"]) if match["nodes"] else None
            devices = devices if devices is not None else int(match["devices"]) if match["devices"] else None
        data["num_nodes"] = nodes if nodes is not None else data["num_nodes"]
        data["devices_per_node"] = devices if devices is not None else data["devices_per_node"]
        suffix = (f":{devices}" if devices is not None else "") + (f"x{nodes}" if nodes is not None and nodes != 1 else "")
        return cls.from_dict({**data, "name": base + suffix})

    @classmethod
    def detect(cls, quick: bool = True) -> Cluster:
        """This machine, or this job where torch.distributed is initialised; measured in under 2 s, equal on every rank."""
        from .detect import detect_cluster

        return detect_cluster(quick=quick)

    @classmethod
    def resolve(cls, text: str) -> Cluster:
        """What a user names: "detect", a preset, or the path of a cluster file."""
        if text == "detect":
            return cls.detect()
        is_path = text.endswith(".json") or os.sep in text or Path(text).is_file()
        return cls.load(text) if is_path else cls.preset(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cluster:
        """Read a cluster file. Raises ClusterError when it is missing, damaged or has absurd values; warns when measured elsewhere."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ClusterError(f"no cluster file at {path}; shipped clusters are {', '.join(preset_names())}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError(f"cluster file {path} cannot be read: {error}") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ClusterError(f"cluster file {path} is not JSON: {error}") from error
        try:
            cluster = cls.from_dict(data)
        except ClusterError as error:
            raise ClusterError(f"cluster file {path}: {error}") from None
        if cluster.calibration:
            from .journal import elsewhere

            reason = elsewhere(cluster)
            if reason:
                warnings.warn(f"{path}: {reason}; plans are for that machine", stacklevel=2)
        return cluster

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """The cluster of a parsed cluster file. Raises ClusterError naming the value that is missing, unknown or absurd."""
        from .cluster_schema import check

        check(data)
        given: dict[str, Any] = {k: v for k, v in data.items() if k not in ("format", "version")}
        given["device"] = Device(**given["device"])
        given["host"] = Host(**given["host"])
        for name in ("intra_node", "inter_node", "device_to_host", "host_to_device"):
            given[name] = Link(**given[name])
        disk = given.get("disk")
        if disk is not None:
            given["disk"] = Disk(capacity_bytes=disk["capacity_bytes"], read=Link(**disk["read"]), write=Link(**disk["write"]))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The cluster file's content."""
        return {"format": FORMAT, "version": VERSION, **_pruned(asdict(self))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cluster file; an interrupted write leaves an existing file as it was."""
        target = Path(path)
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(self.to_dict(), out, indent=2)
                out.write("\n")
            os.replace(part, target)
        except BaseException:
            os.unlink(part)
            raise


def _pruned(value: Any) -> Any:
    """Without empty tables and Nones: a file has what is known."""
    if isinstance(value, Mapping):
        return {k: _pruned(v) for k, v in value.items() if v is not None and not (k in ("tables", "efficiency") and v == {})}
    return value


def preset_names() -> list[str]:
    """Names of the shipped clusters, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def constants(cluster: Cluster) -> list[tuple[str, float, str]]:
    """(name, value, source) of every number of a cluster, for tables and for the test that each has a source."""
    rows: list[tuple[str, float, str]] = []

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(f"{prefix}.{key}", inner)
        elif hasattr(value, "__dataclass_fields__"):
            for item in fields(value):
                if item.name != "tables":
                    visit(f"{prefix}.{item.name}", getattr(value, item.name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((prefix, value, source_of(cluster, prefix)))

    links = ("intra_node", "inter_node", "device_to_host", "host_to_device")
    for name in ("device", "host", *links, "disk", "overlap", "price_per_node_hour"):
        visit(name, getattr(cluster, name))
    return rows


def source_of(cluster: Cluster, constant: str) -> str:
    """The source of "device.peak_flops.float32": its own, else that of the nearest enclosing name, else ""."""
    while constant:
        if constant in cluster.sources:
            return cluster.sources[constant]
        constant = constant.rpartition(".")[0]
    return ""
