"""Fixtures shared by all tests: random pairs on disk, made once a session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_target

    return make_random_target(tmp_path_factory.mktemp("random") / "target")


@pytest.fixture(scope="session")
def random_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_drafter

    return make_random_drafter(tmp_path_factory.mktemp("random") / "drafter")
