"""Work of ops from shapes, checked against hand counts."""

import timeit

import pytest

from opweave.cost_model.work import NO_WORK, OP_CLASSES, OPS, class_of, is_known, op_work


@pytest.mark.parametrize(
    "target, ins, outs, args, flops, op_class, min_dim",
    [
        ("aten.mm.default", [(8, 16), (16, 32)], [(8, 32)], (), 2 * 8 * 16 * 32, "matmul", 8),
        ("aten.bmm.default", [(4, 8, 16), (4, 16, 32)], [(4, 8, 32)], (), 4 * 2 * 8 * 16 * 32, "matmul", 8),
        ("addmm", [(32,), (8, 16), (16, 32)], [(8, 32)], (), 2 * 8 * 16 * 32, "matmul", 8),
        ("mv", [(8, 16), (16,)], [(8,)], (), 2 * 8 * 16, "matmul", 1),
        ("dot", [(16,), (16,)], [()], (), 2 * 16, "matmul", 1),
        ("aten._grouped_mm.default", [(64, 16), (4, 16, 32), (4,)], [(64, 32)], (), 0, "moe", 1),
        ("aten.convolution.default", [(2, 3, 8, 8), (6, 3, 3, 3), (6,)], [(2, 6, 8, 8)], ([1], [1], [1], False), 2 * 768 * 27, "conv", 6),
        ("aten.convolution.default", [(2, 6, 4, 4), (6, 3, 2, 2)], [(2, 3, 8, 8)], ([2], [0], [1], True), 2 * 192 * 12, "conv", 6),
        ("convolution_backward", [(2, 6, 8, 8), (2, 3, 8, 8), (6, 3, 3, 3)], [(2, 3, 8, 8), (6, 3, 3, 3), (6,)],
         (False,), 4 * 768 * 27, "conv_backward", 6),
        ("convolution_backward", [(2, 6, 8, 8), (2, 3, 8, 8), (6, 3, 3, 3)], [None, (6, 3, 3, 3), None],
         (False,), 2 * 768 * 27, "conv_backward", 6),
        ("opweave::attention", [(2, 4, 8, 16)] * 3, [(2, 4, 8, 16), (2, 4, 8)], (), 512 * (64 + 64), "attention", 8),
        ("opweave.attention.default", [(2, 4, 8, 16)] * 3, [(2, 4, 8, 16), (2, 4, 8)], (None, True), 512 * (64 + 64), "attention", 8),
        ("opweave::attention_backward", [(2, 4, 8, 16)] * 6, [(2, 4, 8, 16)] * 3, (), 2.5 * 512 * 128, "attention_backward", 8),
        ("opweave::moe_mlp", [(10, 16), (10, 2), (10, 2), (4, 48, 16), (4, 16, 24)], [(10, 16)],
         (), 2 * 20 * (48 * 16 + 16 * 24), "moe", 5),
        ("aten.add.Tensor", [(4, 5), (5,)], [(4, 5)], (1,), 20, "pointwise", None),
        ("aten.gelu.default", [(4, 5)], [(4, 5)], (), 400, "transcendental", None),
        ("aten.sum.dim_IntList", [(4, 5)], [(4,)], ([1],), 20, "reduction", None),
        ("aten.view.default", [(4, 5)], [(20,)], (), 0, "view", None),
        ("aten.embedding.default", [(1000, 8), (2, 3)], [(2, 3, 8)], (), 1000 * 8, "embedding", None),
        ("aten.index_add.default", [(100, 8), (6,), (6, 8)], [(100, 8)], (0,), 36 * 48, "scatter", None),
        ("aten.scatter.value", [(4, 5), (4, 1)], [(4, 5)], (), 36 * 4, "scatter", None),
        ("aten.embedding_dense_backward.default", [(6, 8), (6,)], [(100, 8)], (), 36 * 48, "scatter", None),
        ("opweave::update", [(4, 5)] * 4, [(4, 5)] * 3, (), 240, "update", None),
        ("aten.full.default", [], [(4, 5)], (), 0, "copy", None),
        ("mylib::unheard_of", [(4, 5)], [(4, 5)], (), 20, "other", None),
    ],
)  # fmt: skip
def test_counts(target, ins, outs, args, flops, op_class, min_dim):
    work = op_work(target, ins, outs, args)
    assert class_of(work.op_class) == op_class
    if op_class != "moe" or "opweave" in target:
        assert work.flops == flops
        assert min_dim is None or work.min_dim == min_dim


@pytest.mark.parametrize(
    "target, ins, outs, args, expected",
    [
        ("aten.native_layer_norm.default", [(4, 5)], [(4, 5)], (), "norm:native_layer_norm"),
        ("opweave::attention", [(2, 4, 8, 16)] * 3, [(2, 4, 8, 16)], (), "attention"),
        ("aten.sum.dim_IntList", [(4, 5)], [(4,)], ([1],), "reduction:sum"),
        ("aten.sum.dim_IntList", [(4, 5)], [(5,)], ([0], True), "reduction:sum_outer"),
        ("aten.sum.dim_IntList", [(4, 5)], [()], ([0, -1],), "reduction:sum"),
        ("aten.sum.default", [(4, 5)], [()], (), "reduction:sum"),
        ("convolution_backward", [(2, 6, 8, 8), (2, 3, 8, 8), (6, 3, 3, 3)], [None, (6, 3, 3, 3)],
         (), "conv_backward:convolution_backward_weight"),
        ("mylib::unheard_of", [(4, 5)], [(4, 5)], (), "other"),
    ],
)  # fmt: skip
def test_ops_of_a_class_are_told_apart(target, ins, outs, args, expected):
    assert op_work(target, ins, outs, args).op_class == expected


def test_grouped_mm():
    work = op_work("aten._grouped_mm.default", [(64, 16), (4, 16, 32), (4,)], [(64, 32)])
    assert work.flops == 2 * 64 * 16 * 32 and work.min_dim == 16
    work = op_work("aten._grouped_mm.default", [(16, 64), (64, 32), (4,)], [(4, 16, 32)])
    assert work.flops == 2 * 64 * 16 * 32


def test_a_causal_mask_halves_long_sequences_only():
    short, long = ([(1, 1, s, 64)] * 3 for s in (256, 16384))
    assert op_work("opweave::attention", short, short[:1], (True,)).flops == op_work("opweave::attention", short, short[:1]).flops
    assert op_work("opweave::attention", long, long[:1], (True,)).flops < 0.52 * op_work("opweave::attention", long, long[:1]).flops


def test_bytes_follow_shapes_and_itemsizes():
    assert op_work("mm", [(8, 16), (16, 32)], [(8, 32)]).bytes == 4 * (128 + 512 + 256)
    assert op_work("mm", [(8, 16), (16, 32)], [(8, 32)], in_itemsize=2, out_itemsize=2).bytes == 2 * (128 + 512 + 256)
    assert op_work("_to_copy", [(8,)], [(8,)], in_itemsize=(4,), out_itemsize=(2,)).bytes == 48
    assert op_work("embedding", [(1000, 8), (6,)], [(6, 8)]).bytes == 2 * 48 * 4
    assert op_work("full", [], [(8,)]).bytes == 32
    assert op_work("view", [(8,)], [(2, 4)]) == NO_WORK


def test_share_scales_routed_work():
    shapes = [(10, 16), (10, 2), (10, 2), (2, 48, 16), (2, 16, 24)]
    assert op_work("opweave::moe_mlp", shapes, [(10, 16)], share=0.5).flops == 0.5 * op_work("opweave::moe_mlp", shapes, [(10, 16)]).flops


def test_halving_a_shape_never_raises_the_work():
    for rows in (64, 32, 16, 1):
        half, full = (op_work("mm", [(r, 64), (64, 64)], [(r, 64)]) for r in (rows, 2 * rows))
        assert half.flops * 2 == full.flops and half.bytes < full.bytes


def test_table_is_sound():
    assert {op.op_class for op in OPS.values()} <= set(OP_CLASSES)
    assert is_known("aten.add_.Tensor") and is_known("aten::mm.out") and not is_known("mylib::f")


def test_it_is_cheap():
    args = ("aten.addmm.default", [(64,), (64, 64), (64, 64)], [(64, 64)])
    best = min(timeit.repeat(lambda: op_work(*args), number=2000, repeat=5)) / 2000
    assert best < 50e-6, f"{best * 1e6:.1f} us per call"
