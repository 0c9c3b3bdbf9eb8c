"""What a look at upstream's source found, kept in vLLM's cache folder: reading that source takes
each process that vLLM starts a second or two.

It holds for one text: of every upstream file that was read, found at the place where it is found
now, and of our own records and checks. Where a byte of one is another, all is looked at anew. What
cannot be read or written there is looked at in each process, as it would be without.

    pytest tests/unit/test_examined.py
"""

import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_dflash.files import RunError, write_record
from vllm_dflash.log import logger
from vllm_dflash.patch import Patch
from vllm_dflash.records import RecordError, read
from vllm_dflash.upstream import Sources

_FOLDER = "dflash_patches"
_SHAPE = {
    "ours": str,
    "theirs": str,
    "modules": [str],
    "findings": [{"reason": str, "problems": [str], "defined_as": [str]}],
}


class Finding(NamedTuple):
    """What the source says of one record."""

    reason: str | None
    """Why it is not needed."""
    problems: list[str]
    """Why it does not fit, a line each."""
    defined_as: tuple[str, str] | None
    """The module and the name that the target is defined by; None where it was not asked."""


def examine(sources: Sources, patch: Patch) -> Finding:
    """Looks at the source."""
    reason, problems = patch.examine(sources)
    if patch.scope == "instance" or problems:
        return Finding(reason, problems, None)
    definition = sources.locate(patch.target)
    return Finding(reason, problems, (definition.module, definition.qualname))


def findings(patches: Sequence[Patch], folder: Path | None) -> list[Finding]:
    """Of each record, as it was kept in ``folder`` or by a look at the source; kept then. ``None``:
    always by a look."""
    sources = Sources()
    if folder is None:
        return [examine(sources, patch) for patch in patches]
    path = folder / _FOLDER / f"{hashlib.sha256(_place().encode()).hexdigest()[:32]}.json"
    ours = _ours(patches)
    if (known := _kept(path, ours)) is not None:
        return known
    found = [examine(sources, patch) for patch in patches]
    modules = sorted(sources.asked)
    record = {
        "ours": ours,
        "theirs": _theirs(modules),
        "modules": modules,
        "findings": [
            {
                "reason": each.reason or "",
                "problems": each.problems,
                "defined_as": list(each.defined_as or ()),
            }
            for each in found
        ],
    }
    try:
        write_record(path, record)
    except (RunError, OSError) as error:
        logger.debug("vLLM's source is read again by the next process: %s", error)
    return found


def cache_folder() -> Path:
    """vLLM's, by the variables that vLLM has it from; its own modules are not asked, for that they
    are there is not known yet."""
    base = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    root = os.environ.get("VLLM_CACHE_ROOT", os.path.join(base, "vllm"))
    return Path(os.path.expanduser(root))


def _kept(path: Path, ours: str) -> list[Finding] | None:
    try:
        record = read(path, _SHAPE)
    except RecordError as error:
        logger.debug("%s: vLLM's source is read anew", error)
        return None
    if record is None or record["ours"] != ours or record["theirs"] != _theirs(record["modules"]):
        return None
    return [
        Finding(
            each["reason"] or None,
            each["problems"],
            (each["defined_as"][0], each["defined_as"][1]) if each["defined_as"] else None,
        )
        for each in record["findings"]
    ]


def _theirs(modules: Sequence[str]) -> str:
    """Of where upstream's modules are, and of what is in their files."""
    sources, digest = Sources(), hashlib.sha256()
    for module in modules:
        origin = sources.origin(module) or ""
        digest.update(f"\n{module} {origin}\n".encode())
        if origin.endswith(".py"):
            digest.update(_content(Path(origin)))
    return digest.hexdigest()


def _ours(patches: Sequence[Patch]) -> str:
    """Of what looks and of what it looks for: this Python, our own modules and the records."""
    from vllm_dflash import patches as records

    digest = hashlib.sha256(platform.python_version().encode())
    for patch in patches:
        asked = (patch.fingerprints, patch.signatures, patch.names, patch.looked_up)
        digest.update(f"\n{patch.target} {patch.scope} {patch.switch} {asked}\n".encode())
    here, there = Path(__file__).parent, Path(records.__file__).parent
    for file in [*sorted(here.glob("*.py")), *sorted(there.glob("*.py"))]:
        digest.update(f"\n{file.name}\n".encode() + _content(file))
    return digest.hexdigest()


def _place() -> str:
    """Engines of several environments share one cache folder."""
    return f"{Path(__file__).parent} {Sources().origin('vllm')}"


def _content(file: Path) -> bytes:
    try:
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError:
        return b"cannot be read"
