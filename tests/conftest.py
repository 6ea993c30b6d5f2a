"""The checkout is the package `opweave`, whatever its folder is called: pytest must not import it again under the folder's name."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class CheckoutIsNoTestPackage:
    """Collect the checkout as a plain folder, though it has an `__init__.py`."""

    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(CheckoutIsNoTestPackage())
