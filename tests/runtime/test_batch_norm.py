"""The moments of a piece of a batch, against torch's own."""

import pytest
import torch

from opweave.runtime.batch_norm import channel_moments


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 5, 7, 9), (1, 3, 300, 300), (700, 8, 13, 13)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_var_mean(shape, layout):
    x = torch.randn(shape, dtype=torch.float64) + 3
    x = x.to(memory_format=layout) if x.dim() == 4 else x
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    torch.testing.assert_close(channel_moments(x, torch.float64), torch.stack([mean, var]), rtol=1e-12, atol=0)


def test_a_large_mean_does_not_swallow_the_variance():
    """The mean of squares minus the square of the mean would have no digit left."""
    x = torch.randn(8, 4, 16, 16) + 1e4
    exact = torch.var_mean(x.double(), [0, 2, 3], correction=0)
    torch.testing.assert_close(channel_moments(x, torch.float32)[1].double(), exact[0], rtol=1e-4, atol=0)


def test_half_precision_is_computed_in_the_type_asked_for():
    x = (torch.randn(8, 4, 16, 16) + 2).bfloat16()
    expected = channel_moments(x.float(), torch.float32)
    found = channel_moments(x, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_shapes_are_known_without_data():
    """The dry run of a program is on the meta device."""
    assert channel_moments(torch.empty(8, 4, 16, 16, device="meta"), torch.float32).shape == (2, 4)
