"""Collection of the checkout, and what every test has: one thread, the same random numbers, global state as it was.

The checkout is the package `opweave`, whatever its folder is called: pytest must not import it again under the folder's name.
"""

import logging
from pathlib import Path

import pytest
import torch

from opweave.compiler import rule_table

ROOT = Path(__file__).parents[1]

logging.getLogger("transformers").setLevel(logging.ERROR)


class CheckoutIsNoTestPackage:
    """Collect the checkout as a plain folder, though it has an `__init__.py`."""

    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(CheckoutIsNoTestPackage())


@pytest.fixture(autouse=True)
def _same_start():
    """Tests do not see each other: threads, random state, default dtype, user patterns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = dict(rule_table._USER_ROWS)
    yield
    rule_table._USER_ROWS.clear()
    rule_table._USER_ROWS.update(rows)
    assert torch.get_default_dtype() == torch.float32, "a test or the code under test left another default dtype"
