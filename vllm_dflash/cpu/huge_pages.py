"""A process's memory moved into huge pages, where Linux can do that: a step on a CPU reads all
weights, 512 times as many pages without.

The kernel does it by itself where ``/sys/kernel/mm/transparent_hugepage/enabled`` says ``always``;
most systems say ``madvise``. Done once the weights are loaded and before vLLM makes its KV cache,
which this leaves alone. It takes Linux 6.1, and does nothing elsewhere.

    pytest tests/unit/test_huge_pages.py
"""

import ctypes
import errno
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_SIZE = 2 << 20
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LONGEST = 20.0
"""Seconds; a gigabyte takes some 0.3."""


def use_huge_pages(longest: float = _LONGEST) -> int:
    """Moves this process's anonymous memory into huge pages of 2 MiB; returns the bytes moved, 0
    where the system cannot or must not."""
    if not sys.platform.startswith("linux") or not _allowed():
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    madvise = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, use_errno=True
    )(("madvise", libc))
    moved, deadline = 0, time.monotonic() + longest
    for address in _candidates(Path("/proc/self/maps").read_text().splitlines()):
        if time.monotonic() > deadline:
            break
        if madvise(address, _SIZE, _MADV_COLLAPSE) == 0:
            moved += _SIZE
        elif ctypes.get_errno() == errno.ENOMEM:
            break  # no huge page is left
    return moved


def _allowed() -> bool:
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _candidates(maps: list[str]) -> Iterator[int]:
    """Addresses of whole huge pages in private writable memory that belongs to no file, of
    ``/proc/self/maps``."""
    for line in maps:
        bounds, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            begin, end = (int(bound, 16) for bound in bounds.split("-"))
            yield from range(-(-begin // _SIZE) * _SIZE, end - _SIZE + 1, _SIZE)
