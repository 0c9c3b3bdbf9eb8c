"""Fetches the Python source of a vLLM release that is not installed: its wheel from pip's own
index, unpacked without its kernels.

The result lies in .compat/vllm-VERSION of the checkout, beside the wheel's metadata. Each step is
finished or not there: a wheel that is complete is not downloaded anew, an unpacked one not unpacked
anew. Nothing is installed, and no GPU is needed.
Limits: needs a wheel for this platform (Linux) in the index that pip is configured with.

    python tests/compat/wheel.py              the newest release; prints its folder
    python tests/compat/wheel.py supported    the newest that this package supports
    python tests/compat/wheel.py '<0.34'      the newest below 0.34
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_dflash.supported import SUPPORTED_VLLM

CACHE = Path(__file__).resolve().parents[2] / ".compat"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions",
        nargs="?",
        default="",
        help="a range such as '>=0.32,<0.34', or: supported (default: any)",
    )
    versions = parser.parse_args().versions
    print(fetch(newest(SUPPORTED_VLLM if versions == "supported" else versions)))
    return 0


def newest(versions: str = "") -> Version:
    """The newest release of vLLM in the index that lies in the range."""
    done = _pip(["index", "versions", "vllm", "--only-binary", ":all:"], capture_output=True)
    found = [
        Version(text) for text in re.findall(r"[\w.+]+", _after(done.stdout, "Available versions:"))
    ]
    fitting = [version for version in found if version in SpecifierSet(versions)]
    if not fitting:
        sys.exit(
            f"the index has no vLLM {versions or 'at all'} for this Python and platform. pip"
            f" said:\n{done.stdout}{done.stderr}"
        )
    return max(fitting)


def fetch(version: Version) -> Path:
    """The folder that holds the release's ``vllm/**/*.py``; downloads and unpacks what is
    missing."""
    folder = CACHE / f"vllm-{version}"
    if folder.is_dir():
        return folder
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    print(
        f"downloading the wheel of vLLM {version}, some 340 MB, of which its Python is kept",
        file=sys.stderr,
        flush=True,
    )
    # An older pip does not know the variable and begins again where a download breaks off.
    _pip(
        [
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(wheels),
            f"vllm=={version}",
        ],
        stdout=sys.stderr,
        env=os.environ | {"PIP_RESUME_RETRIES": "5"},
    )
    wheel = next(wheels.glob(f"vllm-{version}-*.whl"))
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                part, [name for name in archive.namelist() if name.endswith((".py", "/METADATA"))]
            )
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        wheel.unlink()  # pip would take it for downloaded
        sys.exit(
            f"the wheel of vLLM {version} is damaged ({error}): run this again to fetch it anew"
        )
    part.rename(folder)
    wheel.unlink()
    return folder


def _pip(arguments: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], text=True, check=False, **options
    )  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(
            f"pip {arguments[0]} failed: is there a network, and an index with"
            f" vLLM?\n{done.stdout or ''}{done.stderr or ''}"
        )
    return done  # type: ignore[no-any-return]


def _after(text: str, word: str) -> str:
    return text.partition(word)[2].partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
