"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed;
with checksums. Each is made anew (``create``): what a link in a folder leads to is never written.

Records of JSON are read against their shape (``vllm_dflash.records``). Limits: one writer a file,
which ``lock`` sees to. Tests: ``pytest tests/unit/test_files.py``.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from vllm_dflash import records
from vllm_dflash.records import RecordError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PART = ".part"
_CHUNK = 1 << 22
_SHOWN = 200
"""Characters of a value in a message."""


class RunError(RuntimeError):
    """A command that keeps a folder cannot go on; the message says why and what to do."""


@contextmanager
def disk_refusals(path: Path) -> Iterator[None]:
    """What is written to ``path`` within, or a refusal that says what to do.

    Raises:
        RunError: the disk is full, or a limit of the system's is reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise refusal(path, error) from None
    except SafetensorError as error:
        # It says the system's error in words alone.
        number = next((n for n in _FULL if f"os error {n})" in str(error)), None)
        if number is None:
            raise
        raise refusal(path, OSError(number, os.strerror(number))) from None


def refusal(path: Path, error: OSError) -> RunError:
    """Says that ``path`` cannot be written, and what to do."""
    what = (
        "free some space or set --out to a larger disk"
        if error.errno in _FULL
        else f"remove or move what is at {path}, or set --out to a folder that can be written"
    )
    return RunError(
        f"{path} cannot be written ({error.strerror or error}): {what}; what is finished is kept,"
        " and the same command goes on from there"
    )


def unusable(error: OSError) -> RunError:
    """Says which file or folder the system refuses this user, and what to do."""
    return RunError(
        f"{error.filename} cannot be used ({error.strerror}): give this user the right to read and"
        " write it, or set --out to another folder; what is finished is kept, and the same command"
        " goes on from there"
    )


def create(path: Path, mode: int = 0o666) -> IO[bytes]:
    """A new file at ``path``, open for bytes, in the place of the file or the link that is there;
    ``mode``: who may read and write it, less what the process's mask takes away.

    Raises:
        OSError: a folder is there, or the folder cannot be written.
    """
    path.unlink(missing_ok=True)
    # O_EXCL: a link that has come meanwhile is not followed.
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A new file that gets its name only once all of it is on the disk; what a killed process
    leaves is overwritten by the next. ``mode``: as of ``create``.

    Raises:
        RunError: as ``disk_refusals``, or something at that place is in the way; whatever was at
            ``path`` before is still there.
    """
    part = path.with_name(path.name + _PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = create(part, mode)
    except OSError as error:
        raise refusal(path, error) from None
    try:
        with disk_refusals(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            part.replace(path)
            _sync(path.parent)
        except OSError as error:
            raise refusal(path, error) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``path`` once all of it is on the disk; yields where it
    is to be filled.

    Raises:
        RunError: as ``whole_file``.
    """
    part = path.with_name(path.name + _PART)
    try:
        remove(part)
        part.mkdir(parents=True)
    except OSError as error:
        raise refusal(path, error) from None
    try:
        with disk_refusals(path):
            yield part
        try:
            for file in part.rglob("*"):
                _sync(file)
            remove(path)
            part.rename(path)
            _sync(path.parent)
        except OSError as error:
            raise refusal(path, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def point(link: Path, folder: Path) -> None:
    """Has ``link`` lead to ``folder``, in the place of the link that is there, in one move: whoever
    opens it finds one of the two.

    Raises:
        RunError: something else is at ``link``, or it cannot be written.
    """
    part = link.with_name(link.name + _PART)
    try:
        if link.exists() and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is no link", str(link))
        part.unlink(missing_ok=True)
        part.symlink_to(os.path.relpath(folder, link.parent))
        part.replace(link)
        _sync(link.parent)
    except OSError as error:
        raise refusal(link, error) from None


def put(path: Path, text: str) -> None:
    """``text`` in the place of what is there, in one move; not flushed to the disk: for what is
    soon written anew.

    Raises:
        OSError: as writing does; whatever was at ``path`` before is still there.
    """
    part = path.with_name(path.name + _PART)
    try:
        with create(part) as file:
            file.write(text.encode())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Removes a folder with all that is in it, or whatever else is at ``path``, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """A file's contents, or a folder's names: a rename is only as lasting as its folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """``record`` as JSON text, whole or not at all."""
    with whole_file(path) as file:
        file.write(records.as_text(record).encode())


def read_record(path: Path, shape: Mapping[str, Any], remedy: str) -> dict[str, Any] | None:
    """A record that this package wrote; None where it is not there.

    Raises:
        RunError: it is not as it was written, which the message says, with the ``remedy``.
    """
    try:
        return records.read(path, shape)
    except RecordError as error:
        raise RunError(f"{error}: {remedy}") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits; a few megabytes of it in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that stand for a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def claim(folder: Path, what: str, inputs: Mapping[str, Any]) -> None:
    """Makes ``folder`` the place of a stage with these inputs, or finds that it is.

    Raises:
        RunError: it was begun with others, and each that differs is named; or the record of them is
            damaged.
    """
    path, wanted = folder / "inputs.json", json.loads(json.dumps(inputs))
    found = read_record(
        path,
        {},
        f"remove {folder} to begin the stage {what} anew, or bring the file back from a copy",
    )
    if found is None:
        write_record(path, wanted)
        return
    differing = [
        f"{name} {_short(found.get(name))} (now {_short(wanted.get(name))})"
        for name in {**found, **wanted}
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise RunError(
            f"{path}: {folder} was begun by the stage {what} with {', '.join(differing)}: set it"
            f" back, choose another --out, or remove {folder} to begin anew"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
