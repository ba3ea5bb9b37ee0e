"""Each file's runs are made once: all of its tests go to the same worker (`--dist loadgroup`)."""

from pathlib import Path

import pytest

BY_ITSELF = {"test_launch.py"}  # each test has a run of its own


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name not in BY_ITSELF:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
