"""What another vLLM's source means for this package, read as text: nothing is imported, no GPU and
no build is needed.

    vllm-dflash compat --source FOLDER         (`make compat` fetches the newest release for it)

Two questions. Is the code that the patches were written against still there, by their fingerprints?
And is every name there that this package imports from vLLM? For what differs it shows the unified
diff of just that definition. Limits: kernels (``torch.ops``) are not read, nor what a class
inherits. Tests: ``pytest tests/unit/test_compat.py``.
"""

import argparse
import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from vllm_dflash import patches
from vllm_dflash.patch import Patch
from vllm_dflash.patches import ALL
from vllm_dflash.supported import SUPPORTED_VLLM, installed_vllm, is_supported
from vllm_dflash.tools.imported import imported_names
from vllm_dflash.upstream import Definition, SourceNotFoundError, Sources

SAME, KNOWN, CHANGED, GONE, NOT_NEEDED = "same", "known", "changed", "gone", "not needed"
STATES = {
    GONE: "there is no such definition any more",
    CHANGED: "its code is not what it was",
    KNOWN: (
        "its code is not what it was, and the patch was written against this one too, or runs"
        " something before or after it"
    ),
    NOT_NEEDED: "the patch is not for this release",
    SAME: "the same code",
}
"""Worst first."""


@dataclass(frozen=True)
class Release:
    """A vLLM whose source is read."""

    version: str | None
    """None where the folder does not say."""
    where: str
    sources: Sources

    def __str__(self) -> str:
        return f"vLLM {self.version or 'of an unknown version'} ({self.where})"

    def find(self, name: str) -> Definition | None:
        try:
            return self.sources.find(name)
        except SourceNotFoundError:
            return None


@dataclass(frozen=True)
class Finding:
    """What became of one name."""

    name: str
    state: str
    fingerprint: str = ""
    """In the release that is looked at; empty where it is gone."""
    diff: str = ""
    users: tuple[str, ...] = ()
    """Files of this package that import it."""


@dataclass(frozen=True)
class PatchFinding:
    """What became of what one patch needs."""

    patch: Patch
    names: tuple[Finding, ...]
    """The target first, then what the replacement relies on. Empty where the patch is not for this
    release."""

    @property
    def state(self) -> str:
        return min(
            (finding.state for finding in self.names), key=list(STATES).index, default=NOT_NEEDED
        )

    @property
    def file(self) -> str:
        """Where the patch stands, from the checkout's root."""
        modules = {
            name: dict(vars(module))
            for name, module in vars(patches).items()
            if isinstance(module, ModuleType)
        }
        homes = [
            name
            for name, members in modules.items()
            if any(_holds(member, self.patch) for member in members.values())
        ]
        return f"patches/{homes[0]}.py" if homes else "patches/"


def _holds(member: object, patch: Patch) -> bool:
    return member is patch or (isinstance(member, tuple) and any(item is patch for item in member))


def run(args: argparse.Namespace) -> int:
    """The command: prints the report; 1 where something has to be done, 2 on wrong usage."""
    try:
        release = release_in(args.source)
        before = release_in(args.against) if args.against else installed_release()
    except FileNotFoundError as error:
        print(f"vllm-dflash compat: {error}", file=sys.stderr)
        return 2
    patched = check_patches(ALL, release, before)
    names = check_names(imported_names("vllm"), release, before)
    todo = list(to_do(release, patched, names))
    print("\n".join(_report(release, before, patched, names, todo, args.diffs)))
    return 1 if todo else 0


def release_in(folder: Path) -> Release:
    """The vLLM in a folder: an unpacked wheel, a site-packages or a checkout.

    Raises:
        FileNotFoundError: it has none.
    """
    if not (folder / "vllm" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"{folder} has no vllm/__init__.py: give the folder that holds vllm/, such as an"
            " unpacked wheel"
        )
    versions = [path.stem.removeprefix("vllm-") for path in folder.glob("vllm-*.dist-info")]
    generated = folder / "vllm" / "_version.py"
    if not versions and generated.is_file():
        versions = re.findall(
            r"^__version__ = .*['\"](.+)['\"]$", generated.read_text(), re.MULTILINE
        )
    return Release(versions[0] if versions else None, str(folder), Sources(folder))


def installed_release() -> Release | None:
    """The vLLM that this Python would import; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    return Release(installed_vllm(), "installed", Sources())


def is_for(patch: Patch, release: Release) -> bool:
    """Whether a patch is for a release."""
    try:
        return patch.unneeded is None or patch.unneeded(release.sources) is None
    except SourceNotFoundError:
        return True


def check_patches(
    all_patches: Iterable[Patch], release: Release, before: Release | None
) -> list[PatchFinding]:
    """Each patch with its target and what it relies on."""
    return [
        PatchFinding(patch, tuple(_check_patch(patch, release, before))) for patch in all_patches
    ]


def _check_patch(patch: Patch, release: Release, before: Release | None) -> Iterator[Finding]:
    if not is_for(patch, release):
        return
    relied_on = dict.fromkeys([*patch.fingerprints, *patch.signatures])
    if patch.target not in relied_on:  # only that it is there
        yield Finding(patch.target, SAME if _is_there(patch, release) else GONE)
    for name in sorted(relied_on, key=lambda name: name != patch.target):
        finding = _compare(name, release, before)
        if finding.state == GONE or not patch.differences(name, release.sources):
            yield replace(finding, state=KNOWN) if finding.state == CHANGED else finding
        else:
            yield replace(finding, state=CHANGED)
    yield from (Finding(problem, GONE) for problem in patch.missing(release.sources))


def _is_there(patch: Patch, release: Release) -> bool:
    if patch.scope == "instance":
        try:
            return release.sources.has_attribute(patch.target)
        except SourceNotFoundError:
            return False
    return release.find(patch.target) is not None


def check_names(
    names: Mapping[str, Iterable[str]], release: Release, before: Release | None
) -> list[Finding]:
    """Each imported name, with the files that import it; of a name with an attribute only what can
    be decided by text."""
    found = []
    for name, users in names.items():
        finding = _compare(name, release, before)
        owner, _, attribute = (
            name.rpartition(".") if "." in name.partition(":")[2] else (name, "", "")
        )
        if attribute:
            # What a class inherits, or an instance has, is not in the text of what is imported.
            if finding.state == GONE and (
                before is None or before.find(name) is None or release.find(owner) is None
            ):
                continue
            # The class itself is in the list, with its diff.
            if finding.state == CHANGED and isinstance(
                getattr(release.find(owner), "node", None), ast.ClassDef
            ):
                continue
        elif any(other.startswith(f"{name}.") for other in names) and _is_module(
            release.find(name)
        ):
            continue  # a module: its names that are used are in the list
        found.append(
            Finding(name, finding.state, finding.fingerprint, finding.diff, tuple(sorted(users)))
        )
    return found


def _compare(name: str, release: Release, before: Release | None) -> Finding:
    new, old = release.find(name), before.find(name) if before else None
    if new is None:
        return Finding(name, GONE)
    if before is None or old is None or old.fingerprint == new.fingerprint:
        return Finding(name, SAME, new.fingerprint)
    headers = (f"{before.version}  {_place(old)}", f"{release.version}  {_place(new)}")
    texts = (
        before.sources.text(old).splitlines(keepends=True),
        release.sources.text(new).splitlines(keepends=True),
    )
    return Finding(
        name, CHANGED, new.fingerprint, "".join(difflib.unified_diff(texts[0], texts[1], *headers))
    )


def _is_module(definition: Definition | None) -> bool:
    return definition is not None and isinstance(definition.node, ast.Module)


def _place(definition: Definition) -> str:
    return f"{definition.module}:{definition.qualname}"


def to_do(
    release: Release, patched: Iterable[PatchFinding], names: Iterable[Finding]
) -> Iterator[str]:
    """What has to be done before this release can be supported, a line each."""
    if release.version is not None and not is_supported(release.version):
        yield (
            f"vLLM {release.version} is not in {SUPPORTED_VLLM}: once the rest is done and tested,"
            " widen vllm_dflash/supported.py"
        )
    for found in patched:
        for finding in found.names:
            if finding.state == GONE:
                yield f"{found.file}: {finding.name} is gone: find what took its place"
            elif finding.state == CHANGED:
                yield (
                    f"{found.file}: read the difference in {finding.name}; if it still fits, accept"
                    f" {finding.fingerprint}"
                )
    for finding in names:
        if finding.state == GONE:
            yield f"{', '.join(finding.users)}: {finding.name} is gone: find what took its place"


def _report(
    release: Release,
    before: Release | None,
    patched: Sequence[PatchFinding],
    names: Sequence[Finding],
    todo: Sequence[str],
    diffs: bool,
) -> Iterator[str]:
    yield str(release)
    yield (
        f"compared with {before}"
        if before
        else "compared with nothing, for no vLLM is installed: --against FOLDER shows differences"
    )
    yield f"this package supports {SUPPORTED_VLLM}"
    yield f"\npatches: {_counts(found.state for found in patched)}"
    for found in patched:
        yield f"  {found.state:<10} {found.patch.target}  ({found.file})"
        for finding in found.names[1:]:
            if finding.state != SAME:
                yield f"             {finding.state}: {finding.name}"
    yield f"\nimported names: {_counts(finding.state for finding in names)}"
    for finding in names:
        if finding.state != SAME:
            yield f"  {finding.state:<10} {finding.name}  ({', '.join(finding.users)})"
    if diffs:
        every = [finding for found in patched for finding in found.names] + list(names)
        for diff in dict.fromkeys(finding.diff for finding in every if finding.diff):
            yield f"\n{diff.rstrip()}"
    yield "\nto do:" if todo else "\nnothing to do"
    yield from (f"  {line}" for line in todo)


def _counts(states: Iterable[str]) -> str:
    states = list(states)
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
