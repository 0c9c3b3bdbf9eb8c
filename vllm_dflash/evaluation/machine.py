"""What a report says of where it was measured. Imports neither torch nor vLLM; the engines say what
device they ran on."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import vllm_dflash

_DISTRIBUTIONS = ("vllm", "torch", "transformers", "arctic-inference")


def versions() -> dict[str, str]:
    """Of Python, this package and what it runs on, as far as they are installed."""
    found = {"vllm-dflash": vllm_dflash.__version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": usable,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):  # a system that does not tell
        return None
