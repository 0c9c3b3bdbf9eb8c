"""One command at a time in a run folder: the lock says who holds it.

The lock is the kernel's, on the open file ``lock``: it ends with the process, however that ends, so
none is left behind by a kill. What the file says is for people. Limits: on a file system that knows
no locks (some network ones) a line says so, and nothing is held.

    pytest tests/unit/test_lock.py
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from vllm_dflash import records
from vllm_dflash.files import RunError, refusal, unusable

NAME = "lock"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_HOLDER = {"command": str, "pid": int, "host": str, "since": str}


@contextmanager
def hold(folder: Path, command: str) -> Iterator[None]:
    """Holds ``folder`` (made if absent) for ``command``.

    Raises:
        RunError: another process holds it, which is named; or it, or within a file of it, is not
            this user's to read and write.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open(path)
    except (FileExistsError, NotADirectoryError):
        raise RunError(
            f"{folder} is no folder, or lies in a file: give a folder, or a name that is free"
        ) from None
    except OSError as error:
        raise refusal(path, error) from None
    _note(handle, command)
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSED:
            raise
        raise unusable(error) from None
    finally:
        with suppress(OSError):  # what is left says nothing once nobody holds it
            path.unlink()
        os.close(handle)


def _open(path: Path) -> int:
    """The lock's open file, held; never what a link leads to."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP and path.is_symlink():
                raise OSError(error.errno, "it is a link", error.filename) from None
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                print(
                    f"{path.parent} is on a file system without locks ({error.strerror}): run no"
                    " other command there meanwhile"
                )
                return handle
            os.close(handle)
            raise RunError(
                f"{path.parent} is in use by {_holder(path)}: wait for its end, stop it, or choose"
                " another --out"
            ) from None
        # The one who held it before may have removed the file between the two calls: then another
        # file is the lock now.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)


def _note(handle: int, command: str) -> None:
    """Writes who holds it. For people alone, so a disk that is full does not keep anyone from going
    on."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, records.as_text(_ours(command)).encode(), 0)


def _ours(command: str) -> dict[str, object]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(path: Path) -> str:
    try:
        found = records.read(path, _HOLDER)
    except records.RecordError:
        found = None
    if found is None:
        return "another command"
    return f"{found['command']}, process {found['pid']} on {found['host']} since {found['since']}"
