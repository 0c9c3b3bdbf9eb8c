"""Fixtures shared by all tests: random pairs on disk, made once a session."""

import os
from pathlib import Path

import pytest

# Before torch is imported: the models are tiny, so a second thread gains nothing, and beside another process it makes both wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_target

    return make_random_target(tmp_path_factory.mktemp("random") / "target")


@pytest.fixture(scope="session")
def random_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_drafter

    return make_random_drafter(tmp_path_factory.mktemp("random") / "drafter")
