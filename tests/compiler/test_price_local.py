"""An op that becomes several when it is cut costs what these cost."""

import torch
from torch import nn
from torch.nn import functional as F

from opweave.compiler.analyse import analyse
from opweave.compiler.capture import capture
from opweave.compiler.choices import build_choices
from opweave.compiler.price_local import LocalPrices
from opweave.compiler.rule_table import op_name
from opweave.cost_model.cluster import Cluster
from opweave.cost_model.kernels import work_seconds
from opweave.cost_model.work import op_work


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32768, 8))

    def forward(self, x, target):
        return F.cross_entropy(x @ self.weight.t(), target)


def test_a_softmax_over_split_classes_is_more_than_a_fused_kernel():
    with torch.device("meta"):
        model, batch = Head(), (torch.empty(1024, 8), torch.empty(1024, dtype=torch.int64))
    analysis = analyse(capture(model, batch))
    cluster = Cluster.preset("dgx-a100-640")
    graph = build_choices(analysis.step, analysis.factors, (8,))
    prices = LocalPrices(analysis.factors, cluster, (8,))
    choice = next(c for c in graph.choices if c.kind == "op" and op_name(c.members[0]) == "_log_softmax.default")
    by_code = {s.codes[0]: prices.seconds(choice.members[0], choice.op, s) for s in choice.options}
    rows, classes = (next(c for c in by_code if c >= 0 and (choice.op.flags[c] == "#") == split) for split in (False, True))
    fused = work_seconds(op_work("_log_softmax", [(128, 32768)], [(128, 32768)]), cluster.device)
    assert by_code[rows].kernel_s == fused and by_code[rows].exchange_s == 0
    # Maximum, difference, exponential, sum and difference: eight passes over memory where the fused kernel takes two; two exchanges.
    assert 1.5 * fused < by_code[classes].kernel_s < 5 * fused
    assert by_code[classes].exchange_s > 2 * cluster.intra_node.start_s
