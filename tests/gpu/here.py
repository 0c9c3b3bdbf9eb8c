"""What the programs of this folder need of the machine that they run on, and what they say where it
is not there.

Imports neither torch nor vLLM nor this package: it says what is missing of them.

    pytest tests/unit/test_gpu_programs.py
"""

import json
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

_PACKAGES = ("vllm", "vllm-dflash", "torch", "triton", "transformers")
_ASK_DEVICE = """
import json, torch
free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
name = torch.cuda.get_device_name() if total else None
print(json.dumps({"name": name, "total_bytes": total, "free_bytes": free}))
"""


class RefusedError(RuntimeError):
    """The program cannot run here; the message says what to do."""


def check_here(*, tiny: bool) -> dict[str, Any]:
    """The device to run on.

    Raises:
        RefusedError: something is missing here.
    """
    if find_spec("torch") is None:
        raise RefusedError(f"torch is not installed in {sys.executable}: use a Python that has it")
    device = {"name": "CPU", "total_bytes": 0, "free_bytes": 0} if tiny else find_device()
    if device["name"] is None:
        raise RefusedError(
            "this needs an NVIDIA GPU, and torch sees none here: run it where `nvidia-smi` shows"
            " one and torch is a CUDA build, or give --tiny, which runs the same code on a CPU"
        )
    if find_spec("vllm") is None:
        raise RefusedError(
            f"vLLM is not installed in {sys.executable}: pip install '.[cuda]', or, without a"
            " network, unpack what tests/gpu/pack_vllm.py made and put it first on PYTHONPATH"
            " (tests/gpu/README.md)"
        )
    if find_spec("vllm_dflash") is None or find_spec("vllm_dflash.patches") is None:
        raise RefusedError(
            f"vllm-dflash is not installed in {sys.executable}; a checkout on the path is not"
            " enough, as patches/ becomes part of the package only then: make wheel, and pip"
            " install --no-deps dist/vllm_dflash-*.whl"
        )
    return device


def find_device() -> dict[str, Any]:
    """The GPU's name and bytes; asked in another process, so that this one holds none of it."""
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_DEVICE], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        raise RefusedError(f"torch does not start here: {asked.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(asked.stdout)
    return found


def versions() -> dict[str, str | None]:
    """Of what a figure depends on."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
