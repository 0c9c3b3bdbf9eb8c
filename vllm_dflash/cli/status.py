"""``vllm-dflash status``: what is installed, and what is replaced in vLLM. Neither torch nor
vLLM is imported for it."""

import importlib.metadata
import textwrap
from typing import Any

import vllm_dflash
from vllm_dflash import kinds
from vllm_dflash.cli.flags import add_command
from vllm_dflash.patch import SCOPES
from vllm_dflash.plugin import patch_set, why_off
from vllm_dflash.supported import INSTALL_VLLM, SUPPORTED_VLLM, installed_vllm
from vllm_dflash.tools.compat import GONE, check_names, installed_release
from vllm_dflash.tools.imported import imported_names
from vllm_dflash.worker_calls import other_plug_ins


def add(commands: Any) -> None:
    """Adds the command."""
    status = add_command(
        commands,
        "status",
        "versions, whether the plug-in is on, and its patches",
        "Prints the versions, whether the plug-in is on, and every patch with its reason. "
        "Ends with 1 where vLLM would run without the plug-in. Imports neither torch nor vLLM.",
        ["vllm-dflash status"],
    )
    status.set_defaults(run=lambda _: _status())


def _status() -> int:
    version = installed_vllm()
    print(f"vllm-dflash  {vllm_dflash.__version__}")
    print(f"vLLM         {version or 'not installed'} (supported: {SUPPORTED_VLLM})")
    if version is None:
        for line in INSTALL_VLLM:
            print(f"             {line}")
    print(f"torch        {_version('torch')}")
    problems = [] if version is None else [*patch_set().check(version), *_kinds()]
    state = why_off() or (
        "off: vLLM is not installed"
        if version is None
        else "off: the patches do not fit this vLLM"
        if problems
        else "on"
    )
    print(f"plug-in      {state}")
    if others := other_plug_ins():
        print(
            _paragraph(
                "",
                f"other plug-ins, for vLLM or of kinds: {', '.join(others)}. What they replace is"
                " not seen here: where it is in the way, vLLM's log says so at its start",
            )
        )
    for problem in problems:
        print(f"  {problem}")
    for name, users in _gone() if version else ():
        print(f"  gone: {name}, which {', '.join(users)} import")
    rows = patch_set().report()
    for row in rows:
        if row.note:
            print(f"  {row.state}: {row.target}\n{_paragraph('', row.note)}")
    print(
        f"\npatches (for vLLM {SUPPORTED_VLLM}; none is applied or was checked here)"
        if version is None
        else "\npatches (none is applied: the plug-in is off)"
        if state != "on"
        else "\npatches (applied in vLLM's processes, each when its module is imported or its"
        " object made)"
    )
    for row in rows:
        print(f"\n  {row.target}")
        print(f"    {SCOPES[row.scope]}, {row.needs}{f'; {row.state}' if row.note else ''}")
        print(_paragraph("why", row.why))
        print(_paragraph("until", row.until))
    return 0 if state == "on" else 1


def _kinds() -> list[str]:
    """Why this package's kinds of drafters cannot be had, if so. Other packages' may import torch,
    and are left out singly in vLLM's processes."""
    try:
        kinds.own()
    except Exception as error:
        return [f"kinds of drafters: {error!r}"]
    return []


def _gone() -> list[tuple[str, tuple[str, ...]]]:
    """Names of vLLM's that this package imports and that the installed one has no longer, with the
    files that do: what needs them ends."""
    release = installed_release()
    found = [] if release is None else check_names(imported_names("vllm"), release, None)
    return [(each.name, each.users) for each in found if each.state == GONE]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _paragraph(title: str, text: str) -> str:
    start = f"    {title + ':' if title else '':<7}"
    return textwrap.fill(text, width=110, initial_indent=start, subsequent_indent=" " * 11)
