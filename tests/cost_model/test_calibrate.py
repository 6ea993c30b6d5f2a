"""Calibration on a handful of rows: what is written, resumed, refused and checked."""

import collections
import dataclasses
import json
import time
import warnings

import pytest
import torch

from opweave.cost_model import calibrate as calibration
from opweave.cost_model import journal, measure
from opweave.cost_model.calibrate import Options
from opweave.cost_model.calibrate_check import check
from opweave.cost_model.cluster import Cluster, ClusterError
from opweave.cost_model.collectives import SPACING, many
from opweave.cost_model.fit_cluster import _medians, _spaced
from opweave.cost_model.kernels import is_measured


@pytest.fixture
def few_rows(monkeypatch):
    """Only small rows of a few ops, so that a calibration takes a second."""
    keep = ("aten.mm", "aten.add.Tensor", "aten.native_layer_norm.default", "opweave.update", "aten.clone", "aten.gelu.default")
    all_rows = measure.rows

    def rows(dtypes, **kwargs):
        return [r for r in all_rows(dtypes, **kwargs) if r.op.startswith(keep) and r.num_bytes < 1 << 17 and r.dtype == torch.float32]

    monkeypatch.setattr(measure, "rows", rows)
    monkeypatch.setattr(measure, "ROTATE_BYTES", 1 << 18)


@pytest.fixture
def quick(tmp_path):
    return Options(quick=True, folder=tmp_path, dtypes=(torch.float32,))


def test_calibration_writes_a_cluster_file(few_rows, quick, tmp_path):
    seen = []
    made = calibration.calibrate(tmp_path / "c.json", options=quick, progress=lambda done, total, name: seen.append((done, total)))
    loaded = Cluster.load(tmp_path / "c.json")
    assert loaded == made
    assert {"fitted_at", "machine", "versions", "residuals"} <= set(loaded.calibration)
    assert is_measured("matmul", loaded.device) and is_measured("pointwise", loaded.device) and not is_measured("attention", loaded.device)
    assert loaded.sources["device.peak_flops"] == "measured: opweave calibrate"
    assert loaded.disk.read.tables["copy"]["1"]
    assert seen[0] == (0, len(seen)) and len(seen) > 5
    assert not (tmp_path / "c.json.partial").exists()


def test_an_interrupted_calibration_goes_on_and_keeps_the_old_file(few_rows, quick, tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    Cluster.preset("cpu").save(path)
    measured = []
    real = measure.measure

    def interrupted(row, device, **options):
        if len(measured) == 12:
            raise KeyboardInterrupt
        measured.append(row.name)
        return real(row, device, **options)

    monkeypatch.setattr(measure, "measure", interrupted)
    many = measure.rows((torch.float32,))[:16]
    monkeypatch.setattr(measure, "rows", lambda dtypes, **kwargs: many)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(path, options=quick)
    assert Cluster.load(path).name == "cpu"
    before = len(measured)
    monkeypatch.setattr(measure, "measure", lambda row, *args, **kwargs: (measured.append(row.name), real(row, *args, **kwargs))[1])
    assert calibration.calibrate(path, options=quick).name == "calibrated"
    assert len(many) == 16 and before == 12
    assert measured == 2 * [row.name for row in many], "finished samples are not measured again"


def test_a_journal_of_another_setting_starts_anew(tmp_path):
    first = journal.Journal(tmp_path / "j", {"ranks": 1})
    first.take("a", lambda: 1)
    first.save()
    assert journal.Journal(tmp_path / "j", {"ranks": 1}).samples == {"a": 1}
    assert journal.Journal(tmp_path / "j", {"ranks": 2}).samples == {}
    (tmp_path / "j").write_text("{half")
    assert journal.Journal(tmp_path / "j", {"ranks": 1}).samples == {}


def test_absurd_measurements_are_refused(few_rows, quick, tmp_path, monkeypatch):
    real = measure.measure

    def broken(row, device, **options):
        return dataclasses.replace(real(row, device, **options), seconds=-1.0)

    monkeypatch.setattr(measure, "measure", broken)
    with pytest.raises(ValueError, match=r"must be .*above 0"):
        calibration.calibrate(tmp_path / "c.json", options=quick)
    assert not (tmp_path / "c.json").exists()


def test_every_row_has_a_kernel_here_and_a_name_of_its_own():
    from opweave.calibration import runtime_functions  # which also defines opweave::attention

    rows = measure.rows((torch.float32,))
    assert len({row.name for row in rows}) == len(rows)
    smallest = {}
    for row in sorted(rows, key=lambda r: r.num_bytes):
        smallest.setdefault(row.op, row)
    for row in smallest.values():
        timing = measure.measure(row, torch.device("cpu"), budget_s=0.0, functions=runtime_functions())
        assert timing is not None and timing.seconds > 0, row.name
        assert timing.work.op_class not in ("other", "view"), row.name


def test_the_runtimes_own_ops_are_left_out_where_they_are_not_handed_in():
    row = next(row for row in measure.rows((torch.float32,)) if row.op == "opweave.channel_moments")
    assert measure.measure(row, torch.device("cpu"), budget_s=0.0) is None


def test_memory_share_bounds_the_samples(quick):
    start = Cluster.preset("cpu")
    small = dataclasses.replace(start, device=dataclasses.replace(start.device, memory_bytes=10**8, reserved_bytes=0))
    few = calibration._steps(small, torch.device("cpu"), dataclasses.replace(quick, memory_share=0.001), None, {}, {})
    many = calibration._steps(small, torch.device("cpu"), dataclasses.replace(quick, memory_share=0.5), None, {}, {})
    assert len(few) < len(many)
    with pytest.raises(ClusterError, match=r"memory share is 2"):
        Options(memory_share=2)


def test_check_compares_with_fresh_measurements(few_rows, quick, tmp_path):
    made = calibration.calibrate(None, options=quick)
    report = check(made, tolerance=5.0)
    assert report["holds"] and report["warning"] == "" and len(report["rows"]) >= 4
    slow = {k: {**t, "points": [[x, 1000 * y] for x, y in t["points"]]} for k, t in made.device.tables.items()}
    wrong = dataclasses.replace(made, device=dataclasses.replace(made.device, tables=slow))
    assert not check(wrong, tolerance=5.0)["holds"]
    with pytest.raises(ClusterError, match="was not calibrated"):
        check(Cluster.preset("cpu"))


def test_a_file_measured_elsewhere_warns(few_rows, quick, tmp_path):
    path = tmp_path / "c.json"
    calibration.calibrate(path, options=quick)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cluster.load(path)
    data = json.loads(path.read_text())
    data["calibration"]["machine"]["processor"] = "another"
    path.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="was measured on another machine"):
        Cluster.load(path)


def test_several_ranks_need_their_collectives(monkeypatch, quick):
    monkeypatch.setattr(calibration, "world", lambda: 2)
    with pytest.raises(ClusterError, match="2 ranks calibrate together only with `connect`"):
        calibration.calibrate(None, options=quick)


class Wires:
    """What is sent comes back four times."""

    sent = 0

    def __init__(self, mesh, axes):
        self.size = mesh[axes[0]]

    def start(self, kind, tensor):
        Wires.sent += tensor.numel() * tensor.element_size()
        return torch.cat([tensor] * 4)

    def wait(self, pending):
        return pending


def test_collectives_become_tables(few_rows, quick, monkeypatch):
    """Two pretended nodes of two ranks: groups inside a node, across nodes, and of all ranks get tables of their own."""
    ran = []

    def added(compute, communicate, device, series):
        """Without a clock: both run, and what was sent takes a nanosecond a byte."""
        Wires.sent = 0
        compute()
        communicate()
        ran.append(series)
        return 1e-4 * len(ran), 1e-4 + 1e-9 * Wires.sent

    monkeypatch.setattr(calibration, "_added", added)
    start = dataclasses.replace(Cluster.preset("cpu"), num_nodes=2, devices_per_node=2)
    monkeypatch.setattr(calibration.detect, "detect_cluster", lambda: start)
    made = calibration.calibrate(None, connect=Wires, options=quick)
    assert set(made.intra_node.tables["all_reduce"]) == {"2"}
    assert set(made.inter_node.tables["all_gather"]) == {"2", "4/2"}
    assert set(made.axis_link((4,), 0).tables["all_gather"]) == {"4"}
    assert set(made.axis_link((2, 2), 0).tables["all_gather"]) == {"2", "4/2"}
    assert set(made.intra_node.tables[many("all_reduce", 4)]) == set(made.intra_node.tables[many("all_reduce", 16)]) == {"2"}
    spacing = made.inter_node.tables[SPACING]["4/2"]
    assert [y for _, y in spacing] == sorted(y for _, y in spacing), "the more lies between two collectives, the more they take"
    assert 0 <= made.overlap <= 1


def test_spacing_is_against_what_prices_were_measured_with():
    points = [[0.0, 1e-4], [1e-4, 3e-4], [1e-3, 5e-4], [4e-3, 4e-4]]
    slow = [[x, 2 * y] for x, y in points]
    for passes, price_s in (([points], 5e-4), ([points, slow, slow], 5e-4), ([slow], 1e-3)):
        made = _spaced(passes, price_s)
        assert [x for x, _ in made] == [0.0, 1e-4, 1e-3, 4e-3]
        assert [y / price_s for _, y in made] == pytest.approx([-0.7, -0.3, 0.0, 0.0]), "never less with more between"
    made = _spaced([points], 1e-3)
    assert made[0][1] == pytest.approx(-3.5e-4), "it does not grow where messages were faster than their price"


def test_a_price_is_the_median_of_its_passes():
    assert _medians([[[1.0, 0.01], [2.0, 0.1]], [[1.0, 0.5], [2.0, 0.1]], [[1.0, 0.012], [2.0, 0.1]]]) == [[1.0, 0.012], [2.0, 0.1]]


def test_the_mean_of_the_middle_half():
    assert measure.midmean([5.0]) == 5.0
    assert measure.midmean([9.0, 1.0, 2.0, 4.0]) == 3.0
    assert measure.midmean([1.0, 2.0, 2.0, 3.0, 100.0]) == pytest.approx(7 / 3)


def test_ranks_that_share_cores_take_turns_by_their_mean_share(monkeypatch):
    """One rank of two gets three quarters of a core: it is the share of both that counts."""
    monkeypatch.setattr(measure, "crowded", lambda: True)
    monkeypatch.setattr(measure, "local_ranks", lambda: 2)
    monkeypatch.setattr(measure, "cores", lambda: 1)
    monkeypatch.setattr(measure, "turns", lambda: 4 / 3)
    monkeypatch.setattr(calibration, "mean", lambda share: (share + 0.25) / 2)
    assert calibration._turns_sample(torch.device("cpu")) == pytest.approx(2.0)


def test_a_collective_is_what_the_slowest_rank_sees(monkeypatch):
    """Another rank, on which every run takes a tenth of a second longer with a collective in it."""
    seen = []
    monkeypatch.setattr(calibration, "slowest", lambda times: [t + 0.1 * (i % 2 == 0) for i, t in enumerate(times)])
    _, added = calibration._added(lambda: None, lambda: seen.append(1), torch.device("cpu"), 2)
    assert added == pytest.approx(0.1, abs=0.01) and seen


def test_a_slow_collective_runs_once(monkeypatch):
    seen = []
    monkeypatch.setattr(calibration, "SLOW_S", 0.02)
    _, added = calibration._added(lambda: None, lambda: (seen.append(1), time.sleep(0.05)), torch.device("cpu"), 2)
    assert len(seen) == 1 and added == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(("seconds", "times"), [(0.1, 2), (1.0, 1)])
def test_what_takes_long_is_measured_in_one_pass_only(seconds, times, few_rows, quick, monkeypatch):
    measured = collections.Counter()

    def sample(wires, kind, num_bytes, group, device, at_once=1):
        measured[kind, num_bytes, group, at_once] += 1
        return seconds + 1e-9 * num_bytes

    monkeypatch.setattr(calibration, "collective_sample", sample)
    monkeypatch.setattr(calibration, "_added", lambda *_: (1e-4, 1e-4))
    monkeypatch.setattr(calibration.detect, "detect_cluster", lambda: Cluster.preset("cpu", devices=4))
    calibration.calibrate(None, connect=Wires, options=quick)
    assert set(measured.values()) == {times}
