"""`make unit`: the tests of this folder that do without vLLM, whose import alone takes longer than most of them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDS_VLLM = {
    "test_adaptive_scheduler.py", "test_checks.py", "test_config_keys.py", "test_kinds.py", "test_rows.py",
    "test_train_recorder.py", "test_verification.py",
}  # fmt: skip
SLOW = (
    "test_broken_weights.py::test_through_vllms_configuration",
    "test_adaptive.py::test_close_to_the_best_fixed_choice", "test_adaptive.py::test_the_drafters_confidence_is_used",
    "test_matched_budget.py", "test_sampling.py::test_a_row_is_drawn_by_its_softmax", "test_train_features.py", "test_train_resume.py",
    "test_train_walk.py", "test_train_workers.py",
)  # fmt: skip
"""Need vLLM in a file that else does not; or do without, but not in a second or two: simulated servers, training runs."""
_REMEDY = f"name the file in NEEDS_VLLM of {Path(__file__).name}, or do without"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pure", action="store_true", help="leave out what needs vLLM or takes long, and see that nothing imports vLLM")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("pure", False) and collection_path.name in NEEDS_VLLM | set(SLOW) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("pure", False):
        slow = [item for item in items if any(name in item.nodeid for name in SLOW)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("pure", False) and "vllm" in sys.modules:
        raise pytest.UsageError(f"a test file imports vLLM: {_REMEDY}")


@pytest.fixture(autouse=True)
def _without_vllm(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.getoption("pure", False):
        assert "vllm" not in sys.modules, f"this test imports vLLM: {_REMEDY}"
