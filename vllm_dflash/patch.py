"""A record of one replacement in vLLM, and its check against the source that is installed. Imports
nothing of it.

pytest tests/unit/test_patching.py tests/patches
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_dflash.replaced import replaced_by
from vllm_dflash.upstream import SourceNotFoundError, Sources

CPU_FIXES = "VLLM_DFLASH_CPU_FIXES"
"""Turns off, with 0, what mends vLLM's CPU sampling for every speculative method, not for ours
alone."""
SCOPES = {
    "class": "replaced for all",
    "instance": "replaced in single objects",
    "ours": "nothing is replaced: code of ours repeats or extends it",
}
_OFF = frozenset({"0", "off", "false", "no"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Patch:
    """One replacement, or code of ours that repeats or extends upstream's. Dotted names are
    ``module:Qual.name``."""

    target: str
    """The name that is replaced, in the module where it is looked up; of one object, an attribute
    by its class."""
    scope: Literal["class", "instance", "ours"] = "class"
    """``class``: for all, in its module or class. ``instance``: in single objects, by ``attach``.
    ``ours``: nothing is replaced; code of ours repeats or extends the target, and asks
    ``PatchSet.fits`` where it can do without."""
    needs: Literal["required", "optional"] = "required"
    """A required one that does not fit keeps all from being applied; an optional one only
    itself."""
    fingerprints: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    """Bodies that are replaced or repeated: upstream name to the fingerprint of its source, by
    version where it has several."""
    signatures: Mapping[str, str] = field(default_factory=dict)
    """Functions before or after which something is run: upstream name to its parameters, as
    ``Definition.signature`` has them; ``...`` at the end stands for any more. Their bodies may
    change."""
    names: Sequence[str] = ()
    """What code of ours reads or sets: attributes, as ``module:Class.name``, and names of modules.
    One that is gone would be read as a default, or set for nobody, without a word."""
    looked_up: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Upstream functions, each with the names that it must look up: the target's own, which a local
    import would pass by, and attributes and keys that are only set here."""
    why: str
    """Why it is needed, and why no official hook serves."""
    until: str
    """When it can be dropped."""
    replace: Callable[..., Any] | None = None
    """Receives the original, and for an instance what ``attach`` was given; returns the
    replacement. Heavy imports belong inside."""
    unneeded: Callable[[Sources], str | None] | None = None
    """Says why the installed source does not need it; None where it does."""
    switch: str | None = None
    """An environment variable; 0 turns it off."""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]

    @property
    def name(self) -> str:
        return self.qualname.rpartition(".")[2]

    def accepted(self, name: str) -> frozenset[str]:
        """The fingerprints of an upstream name that it was written against."""
        known = self.fingerprints[name]
        return frozenset({known} if isinstance(known, str) else known.values())

    def examine(self, sources: Sources) -> tuple[str | None, list[str]]:
        """Why the source does not need it, or None; and why it does not fit, a line each."""
        problems: list[str] = []
        try:
            if self.scope != "instance":
                sources.locate(self.target)
            elif not sources.has_attribute(self.target):
                problems.append(f"{self.target}: its class's source has no such attribute")
            if self.unneeded is not None and (reason := self.unneeded(sources)):
                return reason, []
        except SourceNotFoundError as error:
            problems.append(f"{self.target}: {error}")
        for name in dict.fromkeys([*self.fingerprints, *self.signatures]):
            try:
                problems += self.differences(name, sources)
            except SourceNotFoundError as error:
                problems.append(f"{self.target}: relies on {name}, but {error}")
        problems += self.missing(sources)
        return None, [problem + self.remedy for problem in problems]

    @property
    def remedy(self) -> str:
        """How to go on without it, to be added to a problem; empty where there is no way."""
        return f" (set {self.switch}=0 to go on without this part)" if self.switch else ""

    def missing(self, sources: Sources) -> list[str]:
        """Which of ``names`` are gone, and which of ``looked_up`` nobody looks up, a line each."""
        problems = []
        for name in self.names:
            try:
                if "." not in name.partition(":")[2]:
                    sources.find(name)
                elif not sources.has_attribute(name):
                    problems.append(f"{self.target}: relies on {name}, which is gone")
            except SourceNotFoundError as error:
                problems.append(f"{self.target}: relies on {name}, but {error}")
        for function, names in self.looked_up.items():
            try:
                where = sources.locate(function).module
                if self.scope == "class" and self.name in names and where != self.module:
                    problems.append(f"{self.target}: it is looked up in {where}")
                problems += [
                    f"{self.target}: {function} does not look {name} up any more"
                    for name in names
                    if not sources.looks_up(function, name)
                ]
            except SourceNotFoundError as error:
                problems.append(f"{self.target}: relies on {function}, but {error}")
        return problems

    def replaced(self) -> str | None:
        """Which of the bodies that are replaced or repeated is not what runs in this process, or
        None; a module that is not imported has none."""
        for name in self.fingerprints:
            if (found := replaced_by(name)) is not None:
                return (
                    f"{self.target}: relies on {name}, but it is {found}: another plug-in replaced"
                    " it; load one of the two"
                )
        return None

    def differences(self, name: str, sources: Sources) -> list[str]:
        """Why an upstream name is not what it was written against, a line each. Raises
        SourceNotFoundError."""
        definition, relies = sources.locate(name), f"{self.target}: relies on {name}, whose"
        if name in self.fingerprints and definition.fingerprint not in self.accepted(name):
            known = ", ".join(sorted(self.accepted(name)))
            return [
                f"{relies} source has changed (fingerprint {definition.fingerprint}, written"
                f" against {known})"
            ]
        if name in self.signatures and not _agree(definition.signature, self.signatures[name]):
            return [
                f"{relies} parameters have changed ({definition.signature}; written against"
                f" {self.signatures[name]})"
            ]
        return []


def is_switched_off(variable: str) -> bool:
    """Whether an environment variable says 0, off, false or no."""
    return os.environ.get(variable, "").strip().lower() in _OFF


def _agree(signature: str, expected: str) -> bool:
    """``expected`` may end in ``...``."""
    start, dots, _ = expected.partition("...")
    return signature.startswith(start.rstrip(", ")) if dots else signature == expected
