"""Where the processes of one server leave what they have counted: a folder with one small JSON file
a process.

An engine and its worker each write theirs whole, at most once a second, and put it in place in one
move; whoever is asked for metrics reads them all, so every API server answers the same and nothing
is counted twice. The file of a process that is gone is not read. Limits: one host. Processes that
are not children of the server's first one (Ray's) find each other by DFLASH_METRICS_DIR.

    pytest tests/unit/test_metrics.py
"""

import atexit
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_dflash import files, records
from vllm_dflash.log import logger

USERS = "DFLASH_METRICS_DIR"
_OURS = "_DFLASH_METRICS_DIR"
_PREFIX = "vllm-dflash-metrics-"
_NAME = re.compile(r"[a-z]+-.*-(\d{1,9})-(\d{1,18})\.json")
"""Of a snapshot: role, engine, process, and when that began."""
_created: list[str] = []
_SHAPE = {"labels": [object], "samples": {}}
_warned: set[Path] = set()


def choose_folder() -> None:
    """In a server's first process: names a folder that the processes it starts inherit. Makes none
    until something is written.

    A server that was itself started from a vLLM process is one of its own, for only
    multiprocessing's children share.
    """
    if (
        USERS in os.environ
        or _created
        or (multiprocessing.parent_process() is not None and _OURS in os.environ)
    ):
        return
    path = os.path.join(tempfile.gettempdir(), f"{_PREFIX}{os.getpid()}-{os.urandom(4).hex()}")
    _created.append(path)
    os.environ[_OURS] = path
    creator = os.getpid()
    atexit.register(
        lambda: shutil.rmtree(path, ignore_errors=True) if os.getpid() == creator else None
    )


def folder() -> Path | None:
    """The folder of this process's server; None where the plug-in was not loaded."""
    path = os.environ.get(USERS) or os.environ.get(_OURS)
    return Path(path) if path else None


def write(target: Path, snapshot: dict[str, Any]) -> None:
    """Puts a snapshot in the place of the last one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files.put(target, json.dumps(snapshot, separators=(",", ":")))


def remove(target: Path) -> None:
    """Ends a series; the last one takes the folder along, where that is not the user's. Never
    raises.

    The server's first process may end without a chance to: on SIGTERM uvicorn stops, and then has
    the signal end it.
    """
    with suppress(OSError):
        target.unlink(missing_ok=True)
    if str(target.parent) == os.environ.get(_OURS):
        with suppress(OSError):  # not empty
            target.parent.rmdir()


def remove_left_behind() -> None:
    """Removes this user's folders of servers that were killed, whose processes could not. Never
    raises."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with suppress(OSError):
            if (
                pid.isdecimal()
                and path.stat().st_uid == os.geteuid()
                and not any(_lives(file) for file in path.iterdir())
                and _started(int(pid)) < 0
            ):
                shutil.rmtree(path, ignore_errors=True)


def _lives(file: Path) -> bool:
    """Whether a snapshot is of a process that lives."""
    match = _NAME.fullmatch(file.name)
    return match is not None and _started(int(match[1])) == int(match[2])


def file_name(role: str, engine: str) -> str:
    """Of this process; it names the process and when that began, as numbers of processes come
    again."""
    return f"{role}-{engine}-{os.getpid()}-{_started(os.getpid())}.json"


def read_all() -> Iterator[dict[str, Any]]:
    """The snapshots of all processes that live, in a fixed order; their files are removed where
    not. Other files are left alone.

    What is in a file is as its process wrote it, or as whoever damaged it: ``read.families`` looks.
    """
    path = folder()
    if path is None or not path.is_dir():
        return
    for file in sorted(path.glob("*.json")):
        if _NAME.fullmatch(file.name) is None:
            continue
        if not _lives(file):
            with suppress(OSError):
                file.unlink(missing_ok=True)
            continue
        try:
            snapshot = records.read(file, _SHAPE)
        except records.RecordError as error:
            if file not in _warned:
                _warned.add(file)
                logger.warning("%s; its metrics are left out", error)
            continue
        if snapshot is not None:
            yield snapshot


def _started(pid: int) -> int:
    """When a process began, in clock ticks since the machine did; -1 where there is none, or a
    zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
