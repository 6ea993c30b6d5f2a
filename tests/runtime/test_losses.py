import torch

from opweave.runtime.losses import one_per_row


def test_one_per_row():
    index, value = torch.tensor([[2], [0]]), torch.tensor([[5.0], [-1.0]], dtype=torch.float64)
    found = one_per_row((2, 3), 1, index, value)
    assert found.dtype == torch.float64
    assert found.tolist() == [[0, 0, 5], [-1, 0, 0]]
