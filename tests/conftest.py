"""How the tests are divided among processes (`pytest -n`)."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, and all that look at the one run of the quickstart."""
    for item in items:
        group = "e2e" if item.path.parent.name == "e2e" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
