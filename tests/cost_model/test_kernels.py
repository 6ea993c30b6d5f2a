"""Kernel prices: roofline, efficiency by size, measured curves, arrays."""

import dataclasses

import numpy as np
import pytest

from opweave.cost_model.cluster import Cluster
from opweave.cost_model.kernels import ideal_seconds, is_measured, kernel_seconds, work_seconds
from opweave.cost_model.work import OP_CLASSES, Work, op_work

A100 = Cluster.preset("dgx-a100-640").device


def _square(n, dtype_bytes=2):
    return op_work("mm", [(n, n), (n, n)], [(n, n)], in_itemsize=dtype_bytes, out_itemsize=dtype_bytes)


def test_large_products_come_near_the_peak_and_small_ones_do_not():
    rates = [_square(n).flops / work_seconds(_square(n), A100, "bfloat16") / 312e12 for n in (128, 512, 2048, 8192)]
    assert rates == sorted(rates)
    assert rates[0] < 0.01 and 0.75 < rates[-1] < 0.9


def test_streaming_is_bound_by_memory():
    work = op_work("add", [(1 << 28,), (1 << 28,)], [(1 << 28,)])
    assert work_seconds(work, A100) == pytest.approx(work.bytes / (0.85 * 2.039e12), rel=0.01)


def test_nothing_is_free_but_views():
    assert work_seconds(Work(0, 0, "view"), A100) == 0
    for op_class in OP_CLASSES:
        if op_class != "view":
            assert work_seconds(Work(0, 0, op_class), A100) >= A100.launch_s


def test_dtype_matters_for_matrix_work_only():
    assert work_seconds(_square(4096), A100, "bfloat16") < work_seconds(_square(4096), A100, "float32")
    work = Work(1e9, 1e3, "pointwise")
    assert work_seconds(work, A100, "bfloat16") == work_seconds(work, A100, "float64")


def test_time_grows_with_work():
    times = [work_seconds(Work(f, f / 10, "matmul", 64), A100) for f in np.logspace(0, 15, 60)]
    assert times == sorted(times)


def test_unknown_class():
    with pytest.raises(ValueError, match="unknown op class 'fft'"):
        work_seconds(Work(1, 1, "fft"), A100)


@pytest.mark.parametrize("op_class", OP_CLASSES)
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("byte_weight", [0.0, 2.0])
def test_arrays_agree_with_scalars(op_class, measured, byte_weight):
    points = [[1e-6, 1e-5], [1e-4, 2e-4], [1e-3, 1.5e-3]]
    tables = {f"{op_class}/float32": {"points": points, "byte_weight": byte_weight}} if measured else {}
    device = dataclasses.replace(A100, tables=tables)
    assert is_measured(op_class, device) == measured
    rng = np.random.default_rng(0)
    flops, num_bytes, dims = 10 ** rng.uniform(3, 13, 50), 10 ** rng.uniform(2, 10, 50), rng.integers(1, 4096, 50).astype(float)
    works = [Work(f, b, op_class, d) for f, b, d in zip(flops, num_bytes, dims, strict=True)]
    one_by_one = [work_seconds(work, device) for work in works]
    np.testing.assert_allclose(kernel_seconds(flops, num_bytes, op_class, device, "float32", dims), one_by_one, rtol=1e-12)


def test_an_op_has_its_own_curve_else_that_of_its_class_else_that_of_float32():
    def flat(seconds):
        return {"points": [[1e-9, seconds], [1.0, seconds]]}

    tables = {"norm/float32": flat(1e-3), "norm:batch/float32": flat(2e-3), "norm/bfloat16": flat(3e-3), "matmul/float32": flat(4e-3)}
    device = dataclasses.replace(A100, tables=tables)
    work = Work(0, 1e6, "norm:batch")
    assert work_seconds(work, device, "float32") == pytest.approx(2e-3)
    assert work_seconds(work._replace(op_class="norm:layer"), device, "float32") == pytest.approx(1e-3)
    assert work_seconds(work, device, "bfloat16") == pytest.approx(3e-3)
    assert work_seconds(work, device, "int64") == pytest.approx(2e-3)
    assert not is_measured("matmul:mm", device, "bfloat16"), "products in another precision run other kernels"


def test_measured_curve_goes_through_its_points_and_on():
    device = dataclasses.replace(A100, tables={"pointwise/float32": {"points": [[1e-6, 1e-5], [1e-4, 2e-4]]}})

    def at(ideal):
        work = Work(0, ideal * A100.memory_bandwidth_bytes_per_s, "pointwise")
        assert ideal_seconds(work, device, "float32") == pytest.approx(ideal)
        return work_seconds(work, device)

    assert at(1e-6) == pytest.approx(1e-5) and at(1e-4) == pytest.approx(2e-4)
    assert at(1e-9) == pytest.approx(1e-5), "never below the smallest measured time"
    assert at(1e-2) == pytest.approx(2e-2), "in proportion above the largest"
