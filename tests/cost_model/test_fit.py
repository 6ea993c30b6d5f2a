"""Fits: monotone, right where the samples are, honest about held-out ones."""

import dataclasses
import itertools

import numpy as np
import pytest

from opweave.cost_model import fit
from opweave.cost_model.cluster import Cluster, ClusterError
from opweave.cost_model.fit_cluster import corrected
from opweave.cost_model.kernels import ideal_seconds, origin, work_seconds
from opweave.cost_model.measure import Timing
from opweave.cost_model.work import Work

CPU = Cluster.preset("cpu").device


def _samples(op_class, truth, count=60, noise=0.0):
    rng = np.random.default_rng(0)
    works = [Work(float(f), float(f) / 4, op_class, 256) for f in 10 ** rng.uniform(3, 10, count)]
    ideal = [ideal_seconds(w, CPU, "float32") for w in works]
    return [Timing(work=w, dtype="float32", seconds=truth(x) * np.exp(noise * rng.normal())) for w, x in zip(works, ideal, strict=True)]


def test_isotonic_is_the_nearest_rising_sequence():
    assert fit.isotonic([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    assert fit.isotonic([3, 2, 1]) == [2, 2, 2]
    assert fit.isotonic([]) == []


def test_points_rise_and_pass_through_exact_samples():
    points = fit.fit_points([(x, 2e-6 + 3 * x) for x in np.logspace(-8, -1, 100)])
    assert len(points) <= max(fit.KNOTS)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))
    assert all(y == pytest.approx(2e-6 + 3 * x, rel=0.1) for x, y in points)


def test_samples_at_one_place_do_not_upset_a_fit():
    points = fit.fit_points([(1e-6, 1e-5), (1e-6, 1.1e-5), (1.0001e-6, 1.05e-5), (1e-3, 1e-2), (1.0001e-3, 1.01e-2)])
    assert len(points) == 2 and points[0][1] == pytest.approx(1.05e-5, rel=0.02) and points[1][1] == pytest.approx(1e-2, rel=0.02)


@pytest.mark.parametrize("op_class", ["matmul", "pointwise"])
def test_a_class_is_recovered_from_noisy_samples(op_class):
    def truth(ideal):
        return 5e-6 + 1.4 * ideal

    table, left = fit.fit_class(op_class, "float32", _samples(op_class, truth, noise=0.05), CPU)
    residual = fit.residual(left)
    assert residual.median < 0.1 and residual.num_samples == 20
    fitted = dataclasses.replace(CPU, tables={f"{op_class}/float32": table})
    for sample in _samples(op_class, truth)[::7]:
        assert work_seconds(sample.work, fitted) == pytest.approx(sample.seconds, rel=0.3)


def test_kernels_that_compute_and_move_in_turn_are_recognised():
    rng = np.random.default_rng(0)
    works = [Work(float(f), float(b), "conv", 256) for f, b in 10 ** rng.uniform((6, 4), (9, 7), (60, 2))]
    peak, bandwidth = CPU.flops_per_s("float32"), CPU.memory_bandwidth_bytes_per_s
    samples = [Timing(work=w, dtype="float32", seconds=1e-5 + w.flops / peak + 4 * w.bytes / bandwidth) for w in works]
    table, left = fit.fit_class("conv", "float32", samples, CPU)
    assert table["byte_weight"] == 4 and fit.residual(left).median < 0.05
    fitted = dataclasses.replace(CPU, tables={"conv/float32": table})
    for sample in samples[::7]:
        assert work_seconds(sample.work, fitted) == pytest.approx(sample.seconds, rel=0.25)


def test_too_few_samples_are_not_judged():
    _, left = fit.fit_class("update", "float32", _samples("update", lambda x: x, count=3), CPU)
    residual = fit.residual(left)
    assert residual.median is None and residual.num_samples == 0


@pytest.mark.parametrize("x, y", [(0.0, 1.0), (1.0, -1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_absurd_samples_are_refused(x, y):
    with pytest.raises(ValueError, match="cannot be: both must be finite and above 0"):
        fit.fit_points([(1.0, 1.0), (x, y)])
    with pytest.raises(ValueError, match="nothing to fit"):
        fit.fit_points([])


def test_line():
    fixed, slope = fit.line([[1e3, 1.1e-5], [1e6, 1.01e-3], [1e7, 1.001e-2]])
    assert fixed == pytest.approx(1e-5) and slope == pytest.approx(1e-9)
    fixed, slope = fit.line([[1e3, 2e-3], [1e6, 1e-3]])
    assert fixed >= 0 and slope > 0, "noise must not make a link that is faster with more bytes"


def test_line_behind_a_token_bucket():
    """16 KiB pass at once, the rest at 11 MB/s: measured on a link of 200 Mbit/s that two ranks share."""
    fixed, slope = fit.line([[1 << 10, 3.8e-4], [1 << 14, 4.2e-4], [1 << 18, 2.077e-2], [1 << 22, 0.36674]])
    assert 1 / slope == pytest.approx(11.4e6, rel=0.02) and fixed == pytest.approx(3e-4, rel=0.1)


def test_prices_say_where_they_come_from():
    table, _ = fit.fit_class("pointwise", "float32", _samples("pointwise", lambda x: x), CPU)
    fitted = dataclasses.replace(CPU, tables={"pointwise/float32": table})
    assert origin(Work(1e6, 1e6, "pointwise"), fitted) == "measured"
    assert origin(Work(1e15, 1e15, "pointwise"), fitted) == "extrapolated"
    assert origin(Work(1e6, 1e6, "norm"), fitted) == "formula"


def test_corrections_scale_a_curve():
    table = {"points": [[1e-6, 1e-5], [1e-3, 1e-2]], "half_dim": 0}
    cluster = dataclasses.replace(Cluster.preset("cpu"), device=dataclasses.replace(CPU, tables={"norm/float32": table}))
    work = Work(0, 1e6, "norm")
    assert work_seconds(work, corrected(cluster, {"norm/float32": 1.5}).device) == pytest.approx(1.5 * work_seconds(work, cluster.device))
    with pytest.raises(ClusterError, match="has no measured curve"):
        corrected(cluster, {"matmul/float32": 1.5})
    with pytest.raises(ClusterError, match=r"a factor between 0\.01 and 100"):
        corrected(cluster, {"norm/float32": -1.0})
