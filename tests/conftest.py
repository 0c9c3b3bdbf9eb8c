"""Fixtures shared by all tests: random pairs on disk, made once a session."""

import os
import signal
from pathlib import Path, PurePath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: the models are tiny, so a second thread gains nothing, and beside
# another process it makes both wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell has Ctrl-C ignored by what it runs in the background, and by all that this starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# For every process that a test starts: vLLM's plug-ins are loaded once its imports are done, and
# this one freezes them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "quick_start"), os.environ.get("PYTHONPATH")])
)


_SHARING = {
    "embedded": {"test_draft_parity", "test_lossless", "test_serve", "test_cluster_batch"},
    "refresh": {"test_follow_refresh", "test_follow_kills"},
}
"""Files that share what a session makes: engines on the embedded pair, a refresh's pair."""
_ORDER = {"embedded": 0, "engine": 1}


def _group(nodeid: str) -> str:
    file = PurePath(nodeid.partition("::")[0])
    shared = (group for group, files in _SHARING.items() if file.stem in files)
    return next(shared, f"{file.parent.name}/{file.stem}")


class ByEngine(LoadScopeScheduling):
    """A file stays in one process, as its tests share engines. xdist's groups by mark do nothing
    under pytest 9.2, which fixes node ids."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine:
    return ByEngine(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest go first, so that no process ends long after the other."""
    items.sort(key=lambda item: _ORDER.get(_group(item.nodeid).partition("/")[0], 2))


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_target

    return make_random_target(tmp_path_factory.mktemp("random") / "target")


@pytest.fixture(scope="session")
def random_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pairs import make_random_drafter

    return make_random_drafter(tmp_path_factory.mktemp("random") / "drafter")
