"""Reads files that anyone may have made, a checkpoint's and those that a command is given: regular
files only, and no more of a checkpoint's than there is reason for.

A pipe or a device would be waited for, or fill the memory. Pure Python.

    pytest tests/unit/test_broken_files.py
"""

import errno
import os
import stat
from pathlib import Path

from vllm_dflash.errors import DrafterConfigError

_FETCH = "fetch the checkpoint again"
_NOT_THIS_USERS = (errno.EACCES, errno.EPERM)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_folder(path: str | Path) -> bool:
    """Whether a folder is at ``path``, where ~ and ~user are homes; a path that cannot be one has
    none.

    Raises:
        DrafterConfigError: this user may not look there.
    """
    try:
        return expanded(path).is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise _refusal(path, "looked at", error) from None


def expanded(path: str | Path) -> Path:
    """With a home in the place of ~ or ~user, where that user is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_readable(path: Path) -> None:
    """Refuses a regular file that this user may not read.

    Raises:
        DrafterConfigError: as ``size_of_regular``, or it cannot be opened.
    """
    size_of_regular(path)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        raise _refusal(path, "read", error) from None


def names_in(folder: Path) -> list[str]:
    """What is in a folder, in order; nothing where there is none.

    Raises:
        DrafterConfigError: this user may not look.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _refusal(folder, "looked at", error) from None


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
        raise _refusal(path, "looked at", error) from None
    other = _other_than_regular(status)
    if other is not None:
        raise DrafterConfigError(f"{path} is {other}", f"remove it, and {_FETCH}")
    return status.st_size


def check_input(path: str | Path) -> None:
    """Refuses an input of a command that is no regular file, links followed, before it is opened.

    Raises:
        OSError: it is a pipe, a device or a folder, or is not there.
    """
    other = _other_than_regular(Path(path).stat())
    if other is not None:
        raise OSError(f"it is {other}")


def _other_than_regular(status: os.stat_result) -> str | None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        return None
    return f"{_KINDS.get(kind, 'no file')}, not a regular file"


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
        raise _refusal(path, "read", error) from None


def _refusal(path: str | Path, what: str, error: OSError | ValueError) -> DrafterConfigError:
    number, reason = (
        (error.errno, error.strerror) if isinstance(error, OSError) else (None, str(error))
    )
    remedy = (
        "give this user the right to read it, and to enter its folders"
        if number in _NOT_THIS_USERS
        else _FETCH
    )
    return DrafterConfigError(f"{path} cannot be {what} ({reason})", remedy)
