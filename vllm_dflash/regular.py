"""Reads files of a folder that anyone may have made: regular files only, and no more of them than
there is reason for.

A pipe or a device under a checkpoint's name would be waited for, or fill the memory. Pure Python.

    pytest tests/unit/test_broken_files.py
"""

import os
import stat
from pathlib import Path

from vllm_dflash.config import DrafterConfigError

_FETCH = "fetch the checkpoint again"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def size_of_regular(path: Path) -> int | None:
    """The bytes of a regular file, links followed; None where nothing has that name.

    Raises:
        DrafterConfigError: it is something else, or the name cannot be one.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DrafterConfigError(f"{path} is a link to nothing", _FETCH) from None
        return None
    except (OSError, ValueError) as error:
        raise DrafterConfigError(f"{path} cannot be looked at ({_reason(error)})", _FETCH) from None
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise DrafterConfigError(
            f"{path} is {_KINDS.get(kind, 'no file')}, not a regular file",
            f"remove it, and {_FETCH}",
        )
    return status.st_size


def read_regular(path: Path, most: int) -> bytes | None:
    """The bytes of a regular file; None where nothing has that name.

    Raises:
        DrafterConfigError: as ``size_of_regular``, or it cannot be read, or has more than ``most``
            bytes.
    """
    size = size_of_regular(path)
    if size is None:
        return None
    if size > most:
        raise DrafterConfigError(
            f"{path} has {size} bytes, more than the {most} that such a file has at most", _FETCH
        )
    try:
        # Should it have become a pipe since, the call returns all the same.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.read(most)
    except OSError as error:
        raise DrafterConfigError(f"{path} cannot be read ({_reason(error)})", _FETCH) from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
