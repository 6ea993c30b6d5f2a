"""Clusters: presets with sources, meshes and links, files and their errors."""

import dataclasses
import json
import math

import pytest

from opweave.cost_model.cluster import Cluster, ClusterError, Device, constants, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_preset_constants_have_sources(name):
    rows = constants(Cluster.preset(name))
    assert len(rows) > 25
    for constant, _, source in rows:
        assert source.split(":")[0] in ("datasheet", "measured", "reported", "assumption"), f"{name}: {constant} has source {source!r}"


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_a_file(name, tmp_path):
    cluster = Cluster.preset(name, nodes=2)
    cluster.save(tmp_path / "c.json")
    assert Cluster.load(tmp_path / "c.json") == cluster
    assert Cluster.load(tmp_path / "c.json").fingerprint() == cluster.fingerprint()


def test_preset_names_say_nodes_and_devices():
    assert Cluster.preset("dgx-a100-640x4").num_devices == 32
    assert Cluster.preset("dgx-a100-640", nodes=4) == Cluster.preset("dgx-a100-640x4")
    assert Cluster.preset("cpu:8").mesh_candidates() == [(8,), (2, 4), (4, 2)]
    assert Cluster.preset("dgx-h100:4x2").devices_per_node == 4
    assert Cluster.preset("a100-40gb").num_devices == 1
    assert Cluster.preset("a100-40gb").mesh_candidates() == [(1,)]


def test_unknown_preset_lists_the_known():
    with pytest.raises(ClusterError, match=r"unknown cluster 'dgx-b300'; shipped are a100-40gb, .*h200"):
        Cluster.preset("dgx-b300")


def test_vendor_units():
    device = Cluster.preset("dgx-a100-640").device
    assert device.memory_bandwidth_bytes_per_s == 2.039e12
    assert device.flops_per_s("bfloat16") == 312e12
    assert device.flops_per_s("int64") == device.flops_per_s("float32")
    assert 70 * 2**30 < device.usable_bytes < 80 * 2**30


def test_fingerprint_sees_what_a_plan_needs_and_no_prices():
    one = Cluster.preset("dgx-a100-640")
    faster = dataclasses.replace(one, overlap=0.1, intra_node=dataclasses.replace(one.intra_node, latency_s=1e-3))
    assert one.fingerprint() == faster.fingerprint()
    others = [Cluster.preset("dgx-a100-640x2"), Cluster.preset("dgx-a100-320"), Cluster.preset("dgx-h100"), Cluster.preset("cpu:8")]
    assert len({c.fingerprint() for c in [one, *others]}) == 5


def test_mesh_candidates_fit_the_nodes():
    cluster = Cluster.preset("dgx-a100-640x4")
    meshes = cluster.mesh_candidates()
    assert meshes[:2] == [(32,), (4, 8)]
    assert set(meshes[2:]) == {(2, 16), (8, 4), (16, 2)}
    assert Cluster.preset("cpu", nodes=2, devices=6).mesh_candidates() == [(12,), (2, 6), (4, 3), (6, 2)]


def test_links_of_axes():
    cluster = Cluster.preset("dgx-a100-640x4")
    nic, nvlink = cluster.inter_node.rate_bytes_per_s, cluster.intra_node.rate_bytes_per_s
    assert cluster.axis_link((4, 8), 1) is cluster.intra_node
    assert cluster.axis_link((4, 8), 0) is cluster.inter_node
    assert cluster.axis_link((8, 4), 0).rate_bytes_per_s == pytest.approx(2 * nic)
    assert cluster.axis_link((32,), 0).rate_bytes_per_s == pytest.approx(min(8 * nic, nvlink))
    assert cluster.group_link((4, 8), (0, 1)).rate_bytes_per_s == cluster.axis_link((32,), 0).rate_bytes_per_s
    assert cluster.axis_link((2, 16), 1).latency_s == cluster.inter_node.latency_s


def test_mesh_of_another_size_is_refused():
    with pytest.raises(ClusterError, match=r"mesh 2x2 has 4 devices, cluster 'dgx-a100-640' has 8; meshes that fit: 8, 2x4, 4x2"):
        Cluster.preset("dgx-a100-640").axis_link((2, 2), 0)


def _broken(change):
    data = json.loads(json.dumps(Cluster.preset("dgx-a100-640").to_dict()))
    change(data)
    return data


BAD = [
    (lambda d: d["intra_node"].update(bandwidth_bytes_per_s=600),
     r"intra_node\.bandwidth_bytes_per_s is 600 .* if 600 GB/s was meant, write 6e\+11"),
    (lambda d: d["intra_node"].update(latency_s=5), r"if 5 microseconds was meant, write 5e-06"),
    (lambda d: d["device"].update(memory_bytes=80), r"device\.memory_bytes is 80 bytes.* if 80 GB was meant"),
    (lambda d: d["device"]["peak_flops"].update(bfloat16=312), r"if 312 TFLOP/s was meant, write 3\.12e\+14"),
    (lambda d: d["device"].update(memory_bandwidth_bytes_per_s=-1), r"memory_bandwidth_bytes_per_s is -1; it must be above 0"),
    (lambda d: d["inter_node"].update(bandwidth_bytes_per_s=0), r"inter_node\.bandwidth_bytes_per_s is 0; it must be above 0"),
    (lambda d: d["inter_node"].update(latency_s=math.nan), r"inter_node\.latency_s is nan; a finite number is needed"),
    (lambda d: d["host"].update(memory_bandwidth_bytes_per_s=math.inf), r"is inf; a finite number"),
    (lambda d: d["host"].pop("cores"), r"host lacks cores; needed there: memory_bytes"),
    (lambda d: d.pop("intra_node"), r"the top level lacks intra_node"),
    (lambda d: d["intra_node"].update(bandwith=1e9), r"intra_node has unknown bandwith; known there: bandwidth_bytes_per_s"),
    (lambda d: d.update(num_nodes=0), r"num_nodes is 0"),
    (lambda d: d.update(num_nodes=1.5), r"num_nodes is 1\.5"),
    (lambda d: d["device"].update(kind="tpu"), r"device\.kind is 'tpu'"),
    (lambda d: d["device"].update(usable_fraction=95), r"device\.usable_fraction is 95"),
    (lambda d: d["device"]["peak_flops"].pop("float32"), r"device\.peak_flops lacks float32"),
    (lambda d: d["device"].update(reserved_bytes=90e9), r"leaves nothing of device\.memory_bytes"),
    (lambda d: d.update(overlap=80), r"overlap is 80"),
    (lambda d: d.update(version=99), r"cluster file version 99 was written by another opweave"),
    (lambda d: d.update(format="x"), r"not a cluster file"),
    (lambda d: d["disk"]["read"].pop("latency_s"), r"disk\.read lacks latency_s"),
    (lambda d: d["device"].update(memory_bytes="80GB"), r"device\.memory_bytes is '80GB'"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_files_are_explained(change, message):
    with pytest.raises(ClusterError, match=message):
        Cluster.from_dict(_broken(change))


def test_unreadable_files_are_explained(tmp_path):
    with pytest.raises(ClusterError, match="no cluster file at"):
        Cluster.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": "opweave-cl')
    with pytest.raises(ClusterError, match=r"half\.json is not JSON"):
        Cluster.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ClusterError, match=r"list\.json: not a cluster file"):
        Cluster.load(tmp_path / "list.json")


def test_resolve_takes_names_and_paths(tmp_path):
    Cluster.preset("h200").save(tmp_path / "mine.json")
    assert Cluster.resolve(str(tmp_path / "mine.json")).name == "h200"
    assert Cluster.resolve("h200x2").num_nodes == 2


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    Cluster.preset("h200").save(path)
    before = path.read_text()
    monkeypatch.setattr(json, "dump", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        Cluster.preset("cpu").save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_direct_construction_checks_too():
    with pytest.raises(ClusterError, match=r"device\.memory_bytes is -1"):
        Device(name="x", kind="cpu", memory_bytes=-1, memory_bandwidth_bytes_per_s=1e9, peak_flops={"float32": 1e9})


def test_detect_describes_this_machine():
    cluster = Cluster.detect()
    assert cluster.num_devices >= 1
    assert cluster.device.flops_per_s("float32") > 1e9
    assert cluster.device.memory_bandwidth_bytes_per_s > 1e9
    assert Cluster.from_dict(cluster.to_dict()) == cluster
    assert all(source for _, _, source in constants(cluster))
