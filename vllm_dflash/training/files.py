"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed; with checksums.

Limits: one writer a file. Tests: ``pytest tests/unit/test_train_files.py``.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_PART = ".part"
_CHUNK = 1 << 22


class TrainingError(RuntimeError):
    """A stage cannot go on; the message says why and what to do."""


@contextmanager
def disk_refusals(path: Path) -> Iterator[None]:
    """What is written to ``path`` within, or a refusal that says what to do.

    Raises:
        TrainingError: the disk is full, or a limit of the system's is reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise TrainingError(
            f"{path} cannot be written ({error.strerror}): free some space or set --out to a larger disk; what is finished is kept, "
            "and the same command goes on from there"
        ) from None


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file that gets its name only once all of it is on the disk; what a killed process leaves is overwritten by the next.

    Raises:
        TrainingError: as ``disk_refusals``; whatever was at ``path`` before is still there.
    """
    part = path.with_name(path.name + _PART)
    try:
        with disk_refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """A rename is only as lasting as its folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON text, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON of a file that this package wrote; None where it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None


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
        TrainingError: it was begun with others; each that differs is named.
    """
    path = folder / "inputs.json"
    found, wanted = read_json(path), json.loads(json.dumps(inputs))
    if found is None:
        write_json(path, wanted)
        return
    differing = [
        f"{name} {found.get(name)!r} (now {wanted.get(name)!r})" for name in {**found, **wanted} if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise TrainingError(
            f"{folder} was begun by the stage {what} with {', '.join(differing)}: set it back, choose another --out, or remove {folder} to begin anew"
        )
