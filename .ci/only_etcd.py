"""Selects the tests that touch etcd: they, or fixtures that they use, have a word for it.

PYTHONPATH=.ci python -m pytest -p only_etcd
"""

import inspect
import re

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not touches_etcd(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def touches_etcd(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    functions = [item.function]
    for fixtures in item._fixtureinfo.name2fixturedefs.values():
        functions += [fixture.func for fixture in fixtures]
    source = "".join(map(inspect.getsource, functions))
    return "[memory" not in item.name and bool(re.search(r"\b(etcd|Etcd|Cluster)\b", source))
