"""Links from measurements on a machine that may be busy."""

import pytest

from opweave.cost_model.detect import all_reduce_link


@pytest.mark.parametrize("seconds", [(1e-4, 3e-3), (2.5e-3, 3e-3), (3e-3, 2e-3)])
def test_a_busy_machine_gives_a_sensible_link(seconds):
    link = all_reduce_link(2, (1024, 1 << 22), seconds)
    assert 0.9 * (1 << 22) / seconds[1] <= link["bandwidth_bytes_per_s"] <= 2 * (1 << 22) / seconds[1]
    assert 0 < link["start_s"] <= seconds[1] / 4
