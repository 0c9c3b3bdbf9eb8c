"""The command ``vllm-dflash``: what is installed, whether the plug-in is on, and what it replaces in vLLM.

vllm-dflash status
"""

import argparse
import importlib.metadata
import os
import sys
import textwrap

import vllm_dflash
from vllm_dflash.plugin import SWITCH, is_off, patch_set
from vllm_dflash.supported import SUPPORTED_VLLM, installed_vllm

_PLUGIN_NAME = "dflash"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-dflash", description="Block-diffusion speculative decoding (DFlash) for stock vLLM.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    status = commands.add_parser(
        "status",
        help="versions, whether the plug-in is on, and its patches",
        description="Prints the versions, whether the plug-in is on, and every patch with its reason. "
        "Ends with 1 where vLLM would run without the plug-in. Imports neither torch nor vLLM.",
    )
    status.set_defaults(run=_status)
    return int(parser.parse_args(arguments).run())


def _status() -> int:
    version = installed_vllm()
    print(f"vllm-dflash  {vllm_dflash.__version__}")
    print(f"vLLM         {version or 'not installed'} (supported: {SUPPORTED_VLLM})")
    print(f"torch        {_version('torch')}")
    problems = patch_set().check(version)
    state = _why_off() or ("off: the patches do not fit this vLLM" if problems else "on")
    print(f"plug-in      {state}")
    for problem in problems:
        print(f"  {problem}")
    print("\npatches (applied in vLLM's processes, each when its module is imported)")
    for row in patch_set().report():
        print(f"\n  {row.target}")
        print(_paragraph("why", row.why))
        print(_paragraph("until", row.until))
    return 0 if state == "on" else 1


def _why_off() -> str | None:
    if is_off():
        return f"off: {SWITCH}={os.environ[SWITCH]}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _PLUGIN_NAME not in allowed.split(","):
        return f"off: VLLM_PLUGINS={allowed!r} does not name {_PLUGIN_NAME}"
    if not any(point.name == _PLUGIN_NAME for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        return "off: vLLM cannot see it; install this package with pip into vLLM's environment"
    return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _paragraph(title: str, text: str) -> str:
    return textwrap.fill(text, width=110, initial_indent=f"    {title + ':':<7}", subsequent_indent=" " * 11)


if __name__ == "__main__":
    sys.exit(main())
