"""Does something right after the first import of a module, and imports nothing for it.

pytest tests/unit/test_patching.py
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport(MetaPathFinder):
    """Finds nothing itself: adds a step after the execution of the modules that are awaited."""

    def __init__(self, is_awaited: Callable[[str], bool], then: Callable[[str], None]) -> None:
        """Puts itself in front of ``sys.meta_path``. ``then`` gets the module's name, and must not
        raise."""
        self._is_awaited, self._then = is_awaited, then
        self._busy = threading.local()
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """From ``sys.meta_path``, if it is still there."""
        with suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if getattr(self._busy, "on", False) or not self._is_awaited(fullname):
            return None
        self._busy.on = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.on = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(fullname)

        # On the instance, so that the loader keeps its type: inspect and importlib.resources look
        # at it.
        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec
