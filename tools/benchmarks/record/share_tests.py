"""A plugin of pytest: with SHARE_OF_TESTS = "2/4", a process runs the second quarter of the tests.

`benchmark.py record` starts several such processes, because compiling takes most of the time.
"""

import os
from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keeps this process's share of the collected tests."""
    part, number = map(int, os.environ["SHARE_OF_TESTS"].split("/"))
    # Tests that compile take minutes, so they come last.
    items.sort(key=lambda item: "compile" in item.nodeid)
    items[:] = items[part - 1 :: number]
