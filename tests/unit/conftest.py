"""`make unit`: the tests of this folder that do without vLLM, whose import alone takes longer than
most of them.

A file that cannot be imported without vLLM says ``pytestmark = pytest.mark.vllm``; a test that asks
it, or that takes more than a second or two, is marked ``vllm`` or ``slow``. In `make unit` those
are left out, and an import of vLLM by any other test fails it.
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from throwaway import PARTS, UPSTREAM

if TYPE_CHECKING:
    from refreshes import Pair

_WHOLE_FILE = "\npytestmark = pytest.mark.vllm\n"
_REMEDY = (
    "mark the test `@pytest.mark.vllm` (a file that cannot be imported without: `pytestmark ="
    " pytest.mark.vllm`), or do without"
)


class _Guard:
    """Refuses to run vLLM's code in this process: the test that imports it fails, and no later one.
    Where vLLM lies may be asked."""

    def __init__(self) -> None:
        self.asked = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "vllm" else None
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.asked = True
        raise AssertionError(f"this imports vLLM: {_REMEDY}")


_guard = _Guard()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pure",
        action="store_true",
        help="leave out what is marked vllm or slow, and refuse vLLM's import",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("pure", False):
        sys.meta_path.insert(0, _guard)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _guard in sys.meta_path:
        sys.meta_path.remove(_guard)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    pure = config.getoption("pure", False) and collection_path.suffix == ".py"
    return True if pure and _WHOLE_FILE in collection_path.read_text() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("pure", False):
        left_out = [
            item
            for item in items
            if item.get_closest_marker("vllm") or item.get_closest_marker("slow")
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    if _guard.asked:
        raise pytest.UsageError(f"a test file asked for vLLM and went on without: {_REMEDY}")


@pytest.fixture(autouse=True)
def _without_vllm() -> Iterator[None]:
    """Fails a test that asked for vLLM and went on without."""
    _guard.asked = False
    yield
    assert not _guard.asked, f"this test imports vLLM: {_REMEDY}"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> "Pair":
    """Of `refreshes.Pair`."""
    from refreshes import make_pair

    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of an engine's, in a refresh."""
    from refreshes import without_engine

    without_engine(monkeypatch)


@pytest.fixture(scope="session")
def undisturbed(pair: "Pair", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a refresh that nobody disturbs."""
    from refreshes import run_undisturbed

    return run_undisturbed(pair, tmp_path_factory.mktemp("undisturbed") / "out")


@pytest.fixture(scope="module")
def kinds_of_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The examples of docs/kinds.md are installed."""
    from kinds_of_users import install, on_path

    with on_path(install(tmp_path_factory.mktemp("site"))):
        yield


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two modules on the path, not imported yet; forgotten afterwards."""
    for name, text in (("upstream", UPSTREAM), ("upstream_parts", PARTS)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    hooks = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = hooks
    for name in ("upstream", "upstream_parts"):
        sys.modules.pop(name, None)
