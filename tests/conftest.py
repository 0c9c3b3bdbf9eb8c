"""Fixtures shared by all tests: random pairs on disk, made once a session."""

import os
from pathlib import Path

import pytest

# Before torch is imported: the models are tiny, so a second thread gains nothing, and beside another process it makes both wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


_EMBEDDED = {"test_draft_parity", "test_lossless", "test_serve"}
"""Files that share the session's engines on the embedded pair."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist a file stays in one process, for its engines are shared by its tests; the longest go first, to fill both."""
    for item in items:
        name = item.path.stem
        group = "unit" if item.path.parent.name != "engine" else "embedded" if name in _EMBEDDED else name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (item.path.stem not in _EMBEDDED, item.path.parent.name != "engine"))


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_target

    return make_random_target(tmp_path_factory.mktemp("random") / "target")


@pytest.fixture(scope="session")
def random_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_drafter

    return make_random_drafter(tmp_path_factory.mktemp("random") / "drafter")
