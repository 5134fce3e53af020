"""A plugin of pytest: with SHARE_OF_TESTS = "2/4", the second quarter of the chosen tests is run.

`benchmark.py record` starts several processes of pytest so, as compiling takes most of the time.
"""

import os
from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    place, number = map(int, os.environ["SHARE_OF_TESTS"].split("/"))
    # What compiles takes minutes, and comes after what tells more in less.
    items.sort(key=lambda item: "compile" in item.nodeid)
    items[:] = items[place - 1 :: number]
