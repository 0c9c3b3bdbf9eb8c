"""Replaces named parts of another package: checked against its source first, then all or none.

A patch says what it replaces, which source it was written against and why no official hook serves. A target whose
module is not imported yet is replaced right after that module's first import, so applying imports nothing.
Limits: a target is a class or a function; code that copied the name before (``from x import y``) keeps the original,
so name the place where the name is looked up.

    pytest tests/unit/test_patching.py tests/patches
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vllm_dflash.supported import is_supported
from vllm_dflash.upstream import SourceNotFoundError, Sources


class PatchError(RuntimeError):
    """Patches do not fit what is installed; the message lists every problem, and nothing was replaced."""


@dataclass(frozen=True)
class Patch:
    """One replacement. Dotted names are ``module:Qual.name``."""

    target: str
    """The name that is replaced, in the module where it is looked up."""
    versions: str
    """The range of vLLM releases it was written for, such as ``>=0.32,<0.33``."""
    fingerprints: Mapping[str, str]
    """Dotted upstream name to the fingerprint of the source that the replacement relies on."""
    why: str
    """Why it is needed, and why no official hook serves."""
    until: str
    """When it can be dropped."""
    replace: Callable[[Any], Any]
    """Receives the original, returns the replacement; heavy imports belong inside."""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]


@dataclass(frozen=True)
class Row:
    """One line of a report; ``state`` is ``applied``, ``pending`` (its module is not imported yet) or ``off``."""

    target: str
    state: str
    why: str
    until: str


@dataclass
class _Applied:
    owner: Any
    name: str
    original: Any
    replacement: Any

    @property
    def is_in_place(self) -> bool:
        return vars(self.owner).get(self.name) is self.replacement


@dataclass
class PatchSet:
    """Patches that stand or fall together. All methods may be called from any thread, any number of times."""

    patches: Sequence[Patch]
    _applied: dict[str, _Applied] = field(default_factory=dict)
    _pending: dict[str, Patch] = field(default_factory=dict)
    _defined_as: dict[str, tuple[str, str]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _hook: "_AfterImport | None" = None

    def check(self, version: str | None) -> list[str]:
        """Phase one: what keeps the patches from being applied to this version, a line each; imports nothing."""
        sources, problems = Sources(), []
        targets = [patch.target for patch in self.patches]
        problems += [f"{target}: two patches have this target" for target in sorted(set(targets)) if targets.count(target) > 1]
        for patch in self.patches:
            if not is_supported(version, patch.versions):
                problems.append(f"{patch.target}: the patch is for vLLM {patch.versions}, found {version}")
                continue
            problems += self._check_source(sources, patch)
        return problems

    def apply(self, version: str | None) -> None:
        """Phase two, after a check: replaces every target, or none.

        Raises:
            PatchError: the check failed, or something else has replaced a target; the message lists all of it.
        """
        with self._lock:
            todo = [patch for patch in self.patches if patch.target not in self._pending]
            new = [patch for patch in todo if patch.target not in self._applied]
            problems = self.check(version) if new else []
            problems += [
                f"{patch.target}: {_describe(self._applied[patch.target])}"
                for patch in todo
                if patch.target in self._applied and not self._applied[patch.target].is_in_place
            ]
            self._raise(problems)
            self._apply_loaded([patch for patch in new if patch.module in sys.modules])
            self._pending.update({patch.target: patch for patch in new if patch.module not in sys.modules})
            if self._pending and self._hook is None:
                self._hook = _AfterImport(self)
                sys.meta_path.insert(0, self._hook)

    def revert(self) -> list[str]:
        """Puts the originals back where our replacements still stand, and drops what is pending.

        Returns the targets left as they are, because something else has replaced our replacement since.
        """
        with self._lock:
            self._pending.clear()
            if self._hook is not None:
                sys.meta_path.remove(self._hook)
                self._hook = None
            left = [target for target, applied in self._applied.items() if not applied.is_in_place]
            for applied in self._applied.values():
                if applied.is_in_place:
                    setattr(applied.owner, applied.name, applied.original)
            self._applied.clear()
            return left

    def report(self) -> list[Row]:
        """Every patch with its state, in the order of the list."""
        with self._lock:
            return [Row(patch.target, self._state(patch.target), patch.why, patch.until) for patch in self.patches]

    def _state(self, target: str) -> str:
        if target in self._pending:
            return "pending"
        applied = self._applied.get(target)
        return "applied" if applied is not None and applied.is_in_place else "off"

    def _check_source(self, sources: Sources, patch: Patch) -> list[str]:
        problems = []
        try:
            definition = sources.locate(patch.target)
            self._defined_as[patch.target] = (definition.module, definition.qualname)
        except SourceNotFoundError as error:
            problems.append(f"{patch.target}: {error}")
        for name, expected in patch.fingerprints.items():
            try:
                found = sources.locate(name).fingerprint
            except SourceNotFoundError as error:
                problems.append(f"{patch.target}: relies on {name}, but {error}")
                continue
            if found != expected:
                problems.append(
                    f"{patch.target}: relies on {name}, whose source has changed (fingerprint {found}, written against {expected})"
                )
        return problems

    def _apply_loaded(self, patches: Sequence[Patch]) -> None:
        """Resolves and builds everything before the first replacement, so that a failure leaves nothing behind."""
        resolved, problems = [], []
        for patch in patches:
            owner, problem = self._resolve(patch)
            problems += [problem] if problem else []
            resolved.append((patch, owner))
        self._raise(problems)
        ready = {}
        for patch, owner in resolved:
            name = patch.qualname.rpartition(".")[2]
            original = vars(owner)[name]
            ready[patch.target] = _Applied(owner, name, original, patch.replace(original))
        for target, applied in ready.items():
            setattr(applied.owner, applied.name, applied.replacement)
            self._applied[target] = applied

    def _resolve(self, patch: Patch) -> tuple[Any, str | None]:
        """The object that holds the target, or a problem: the name is gone, or it is not what the source defines."""
        owner: Any = sys.modules[patch.module]
        *path, name = patch.qualname.split(".")
        for part in path:
            owner = vars(owner).get(part)
            if owner is None:
                return None, f"{patch.target}: no {part} in the imported module"
        if name not in vars(owner):
            return None, f"{patch.target}: no {name} in the imported module"
        value, expected = vars(owner)[name], self._defined_as[patch.target]
        found = _name_of(value)
        if found != expected:
            return (
                None,
                f"{patch.target}: expected {':'.join(expected)}, but it is {':'.join(found)}: another plug-in replaced it; load one of the two",
            )
        return owner, None

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise PatchError("vllm-dflash cannot patch vLLM, and has changed nothing:\n  " + "\n  ".join(problems))

    def _is_awaited(self, module: str) -> bool:
        return any(patch.module == module for patch in self._pending.values())

    def _after_import(self, module: str) -> None:
        with self._lock:
            patches = [patch for patch in self._pending.values() if patch.module == module]
            for patch in patches:
                del self._pending[patch.target]
            try:
                self._apply_loaded(patches)
            except Exception:
                self.revert()  # all or none, also when the last of them comes late
                raise


class _AfterImport(MetaPathFinder):
    """Finds nothing itself: adds a step after the execution of the modules that a patch set waits for."""

    def __init__(self, patch_set: PatchSet) -> None:
        self._patch_set = patch_set
        self._busy = threading.local()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if getattr(self._busy, "on", False) or not self._patch_set._is_awaited(fullname):
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
            self._patch_set._after_import(fullname)

        # On the instance, so that the loader keeps its type: inspect and importlib.resources look at it.
        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


def _name_of(value: Any) -> tuple[str, str]:
    value = getattr(value, "fget", None) or value
    return getattr(value, "__module__", "?"), getattr(value, "__qualname__", repr(value))


def _describe(applied: _Applied) -> str:
    ours, current = ":".join(_name_of(applied.replacement)), vars(applied.owner).get(applied.name)
    return f"our {ours} was replaced by {':'.join(_name_of(current))}: load one of the two plug-ins"
