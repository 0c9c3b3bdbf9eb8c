"""`make unit`: the tests of this folder that do without vLLM, whose import alone takes longer than most of them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDS_VLLM = {"test_adaptive_scheduler.py", "test_checks.py", "test_conditioning.py", "test_verification.py"}
SLOW: set[str] = set()
"""Without vLLM, but not in a few seconds."""
_REMEDY = f"name the file in NEEDS_VLLM of {Path(__file__).name}, or do without"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pure", action="store_true", help="leave out what needs vLLM or takes long, and see that nothing imports vLLM")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("pure", False) and collection_path.name in NEEDS_VLLM | SLOW else None


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("pure", False) and "vllm" in sys.modules:
        raise pytest.UsageError(f"a test file imports vLLM: {_REMEDY}")


@pytest.fixture(autouse=True)
def _without_vllm(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.getoption("pure", False):
        assert "vllm" not in sys.modules, f"this test imports vLLM: {_REMEDY}"
