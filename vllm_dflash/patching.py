"""Replaces named parts of another package: checked against its source first, then all or none.

A record says what it replaces, which source it was written against and why no official hook serves.
A target whose module is not imported yet is replaced right after that module's first import, so
applying imports nothing. Attributes of single objects are replaced by ``attach``, once the object
is there. What is optional drops out singly where it does not fit, and leaves upstream's own in
place.
Limits: a target is a class, a function or an attribute of a class's objects; code that copied a
name before (``from x import y``) keeps the original, so name the place where the name is looked up.

    pytest tests/unit/test_patching.py tests/patches
"""

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vllm_dflash.examined import Finding, examine, findings
from vllm_dflash.log import logger
from vllm_dflash.patch import Patch, PatchError, is_switched_off
from vllm_dflash.patches.on_import import AfterImport
from vllm_dflash.patches.place import Replaced, kept_with
from vllm_dflash.supported import SUPPORTED_VLLM, is_supported
from vllm_dflash.upstream import Sources

Built = TypeVar("Built")
TOLD = "_VLLM_DFLASH_LEFT_OUT"
"""Inherited by the processes that vLLM starts, so that a user reads once what was left out."""
LEFT_OUT = "vllm-dflash leaves a part out, and vLLM's own stays: %s"


@dataclass(frozen=True)
class Row:
    """One line of a report."""

    target: str
    state: str
    """``applied``, ``pending`` (its module or object is not there yet), ``off``; ``not needed``,
    ``switched off`` or ``left out``."""
    note: str
    """Of the last three, the reason."""
    scope: str
    needs: str
    why: str
    until: str


@dataclass
class PatchSet:
    """Patches that stand or fall together. All methods may be called from any thread, any number of
    times."""

    patches: Sequence[Patch]
    on_failure: Callable[[str], None] = lambda problem: None
    """Called where a module's late import showed that the set does not fit; by then all is as it
    was."""
    versions: str = SUPPORTED_VLLM
    cache: Path | None = None
    """A folder in which ``apply`` keeps what the source says, and finds it (``examined.py``)."""
    _checked: dict[Patch, list[str]] = field(default_factory=dict)
    """Problems of each that was looked at."""
    _out: dict[Patch, tuple[str, str]] = field(default_factory=dict)
    """Which are not applied, their state and the reason."""
    _applied: dict[Patch, Replaced] = field(default_factory=dict)
    _pending: list[Patch] = field(default_factory=list)
    _owners: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)
    _defined_as: dict[str, tuple[str, str]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _hook: AfterImport | None = None
    _on: bool = False

    def check(self, version: str | None, cache: Path | None = None) -> list[str]:
        """Phase one: what keeps the patches from being applied to this version, a line each;
        imports nothing. By the source, or by what is kept of it in ``cache``."""
        with self._lock:
            if not is_supported(version, self.versions):
                return [f"the patches are for vLLM {self.versions}, found {version}"]
            targets = [patch.target for patch in self.patches if patch.scope == "class"]
            problems = [
                f"{target}: two patches have this target"
                for target in sorted(set(targets))
                if targets.count(target) > 1
            ]
            for patch, finding in zip(self.patches, findings(self.patches, cache), strict=True):
                problems += self._judge(patch, finding)
            return problems

    def apply(self, version: str | None) -> None:
        """Phase two, after a check: replaces every target, or none but for the optional.

        Raises:
            PatchError: the check failed, or something else has replaced a target; the message lists
                all of it.
        """
        with self._lock:
            replaced = [
                p for p in self.patches if p in self._applied and not self._applied[p].is_in_place
            ]
            problems = [f"{patch.target}: {self._applied[patch].describe()}" for patch in replaced]
            if not self._on:
                problems += self.check(version, self.cache)
            self._raise(problems)
            if self._on:
                return
            new = [
                patch
                for patch in self.patches
                if patch.scope == "class" and patch not in self._out and patch not in self._applied
            ]
            self._apply_loaded([patch for patch in new if patch.module in sys.modules])
            self._pending = [patch for patch in new if patch.module not in sys.modules]
            self._on = True
            if self._pending:
                self._hook = AfterImport(self._is_awaited, self._after_import)
            self._tell()

    def attach(self, owner: Any, patches: Sequence[Patch], *context: Any) -> bool:
        """Replaces attributes of one object by records of scope ``instance``, all of them or none.

        Args:
            context: what the records' ``replace`` gets after the original.

        Returns:
            Whether it was done; not where an optional one does not fit, which is logged and in the
            report.

        Raises:
            PatchError: a required one does not fit, or something else has replaced its target.
        """
        with self._lock:
            if not all(self.fits(patch) for patch in patches):
                return False
            ready = []
            for patch in patches:
                try:
                    ready.append(Replaced.of_object(owner, patch, context))
                except Exception as error:
                    if not self._leave_out(patch, str(error)):
                        raise
                    return False
            for applied in ready:
                applied.put()
            kept_with(owner).extend(zip(patches, ready, strict=True))
            self._owners.add(owner)
            return True

    def attempt(self, patch: Patch, build: Callable[[], Built]) -> Built | None:
        """What an optional part of ours builds, its imports included; None where its record does
        not fit, or ``build`` fails, which leaves the part out and is said."""
        with self._lock:
            if not self.fits(patch):
                return None
            try:
                return build()
            except Exception as error:
                problem = f"{patch.target}: {type(error).__name__}: {error}"
                if not self._leave_out(patch, problem):
                    raise
                return None

    def fits(self, patch: Patch) -> bool:
        """Whether a record is in force, by the source and by what has been imported of it. One that
        is needed raises ``PatchError`` where it does not fit."""
        with self._lock:
            if patch not in self._checked:
                self._judge(patch, examine(Sources(), patch))
            self._raise(self._checked[patch])
            problem = None if patch in self._out else patch.replaced()
            if problem and not self._leave_out(patch, problem + patch.remedy):
                raise PatchError(problem)
            return patch not in self._out

    def check_in_place(self) -> None:
        """Raises ``PatchError`` where something else has replaced what this set put in place."""
        with self._lock:
            self._raise(
                [
                    f"{patch.target}: {applied.describe()}"
                    for patch, applied in self._applied.items()
                    if not applied.is_in_place
                ]
            )

    def revert(self) -> list[str]:
        """Puts the originals back where our replacements still stand, and drops what is pending.

        Returns the targets left as they are, because something else has replaced our replacement
        since.
        """
        with self._lock:
            self._pending.clear()
            self._on = False
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            todo = list(self._applied.items())
            for owner in self._owners:
                todo += kept_with(owner)
                kept_with(owner).clear()
            left = {}
            for patch, applied in reversed(todo):
                if applied.is_in_place:
                    applied.take_back()
                else:
                    left[patch] = applied
            # Ours is still beneath the other's: put around that, it would run twice.
            self._applied = {p: applied for p, applied in left.items() if p.scope == "class"}
            self._owners.clear()
            return [patch.target for patch in left][::-1]

    def report(self) -> list[Row]:
        """Every patch with its state, in the order of the list."""
        with self._lock:
            return [
                Row(p.target, *self._state(p), p.scope, p.needs, p.why, p.until)
                for p in self.patches
            ]

    def _state(self, patch: Patch) -> tuple[str, str]:
        if patch in self._out:
            return self._out[patch]
        if not self._on:
            return "off", ""
        if patch in self._applied:
            return ("applied" if self._applied[patch].is_in_place else "off"), ""
        attached = any(known is patch for owner in self._owners for known, _ in kept_with(owner))
        return ("applied" if patch.scope == "ours" or attached else "pending"), ""

    def _judge(self, patch: Patch, finding: Finding) -> list[str]:
        """A record's problems by the source; none where it may be left out, which is noted."""
        self._out.pop(patch, None)
        reason, problems, defined_as = finding
        if defined_as is not None:
            self._defined_as[patch.target] = defined_as
        if patch.switch is not None and is_switched_off(patch.switch):
            self._out[patch] = "switched off", f"{patch.switch}={os.environ[patch.switch]}"
        elif reason is not None:
            self._out[patch] = "not needed", reason
        elif problems and patch.needs == "optional":
            self._out[patch] = "left out", "; ".join(problems)
        self._checked[patch] = [] if patch in self._out else problems
        return self._checked[patch]

    def _apply_loaded(self, patches: Sequence[Patch]) -> None:
        """Resolves and builds everything before the first replacement, so that a failure leaves
        nothing behind."""
        ready: dict[Patch, Replaced] = {}
        problems: list[str] = []
        for patch in patches:
            try:
                ready[patch] = Replaced.of_module(patch, self._defined_as[patch.target])
            except PatchError as error:
                problem = f"{error}{patch.remedy}"
                problems += [] if self._leave_out(patch, problem) else [problem]
            except Exception as error:
                if not self._leave_out(patch, f"{type(error).__name__}: {error}"):
                    raise
        self._raise(problems)
        for patch, applied in ready.items():
            applied.put()
            self._applied[patch] = applied

    def _leave_out(self, patch: Patch, problem: str) -> bool:
        """Notes that an optional record is not applied, and says so; returns whether it may be."""
        if patch.needs != "optional":
            return False
        self._out[patch] = "left out", problem
        logger.warning(LEFT_OUT, problem)
        return True

    def _tell(self) -> None:
        left_out = [note for state, note in self._out.values() if state == "left out"]
        if left_out and TOLD not in os.environ:
            os.environ[TOLD] = "1"
            for note in left_out:
                logger.warning(LEFT_OUT, note)

    def _raise(self, problems: Sequence[str]) -> None:
        if problems:
            raise PatchError(
                "vllm-dflash cannot patch vLLM, and has changed nothing:\n  "
                + "\n  ".join(problems)
            )

    def _is_awaited(self, module: str) -> bool:
        return any(patch.module == module for patch in self._pending)

    def _after_import(self, module: str) -> None:
        with self._lock:
            patches = [patch for patch in self._pending if patch.module == module]
            self._pending = [patch for patch in self._pending if patch.module != module]
            try:
                self._apply_loaded(patches)
            except Exception as error:
                # All or none, also when the last of them comes late; and whoever imports the module
                # goes on.
                self.revert()
                self.on_failure(
                    f"{type(error).__name__}: {error}"
                    if not isinstance(error, PatchError)
                    else str(error)
                )
