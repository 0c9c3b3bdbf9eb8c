"""Where the processes of one server leave what they have counted: a folder with one small JSON file a process.

An engine and its worker each write theirs whole, at most once a second, and put it in place in one move; whoever is asked for
metrics reads them all, so every API server answers the same and nothing is counted twice. The file of a process that is gone is
not read. Limits: one host. Processes that are not children of the server's first one (Ray's) find each other by DFLASH_METRICS_DIR.

    pytest tests/unit/test_metrics.py
"""

import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USERS = "DFLASH_METRICS_DIR"
_OURS = "_DFLASH_METRICS_DIR"
_created: list[str] = []


def choose_folder() -> None:
    """In a server's first process: names a folder that the processes it starts inherit. Makes none until something is written.

    A server that was itself started from a vLLM process is one of its own, for only multiprocessing's children share.
    """
    if USERS in os.environ or _created or (multiprocessing.parent_process() is not None and _OURS in os.environ):
        return
    path = os.path.join(tempfile.gettempdir(), f"vllm-dflash-metrics-{os.getpid()}-{os.urandom(4).hex()}")
    _created.append(path)
    os.environ[_OURS] = path
    creator = os.getpid()
    atexit.register(lambda: shutil.rmtree(path, ignore_errors=True) if os.getpid() == creator else None)


def folder() -> Path | None:
    """The folder of this process's server; None where the plug-in was not loaded."""
    path = os.environ.get(USERS) or os.environ.get(_OURS)
    return Path(path) if path else None


def write(target: Path, snapshot: dict[str, Any]) -> None:
    """Puts a snapshot in the place of the last one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps(snapshot, separators=(",", ":")))
    scratch.replace(target)


def file_name(role: str, engine: str) -> str:
    """Of this process; it names the process and when that began, as numbers of processes come again."""
    return f"{role}-{engine}-{os.getpid()}-{_started(os.getpid())}.json"


def read_all() -> Iterator[dict[str, Any]]:
    """The snapshots of all processes that live, in a fixed order; the files of the others are removed."""
    path = folder()
    if path is None or not path.is_dir():
        return
    for file in sorted(path.glob("*.json")):
        *_, pid, started = file.stem.split("-")
        if _started(int(pid)) != int(started):
            file.unlink(missing_ok=True)
            continue
        try:
            yield json.loads(file.read_text())
        except FileNotFoundError:
            continue


def _started(pid: int) -> int:
    """When a process began, in clock ticks since the machine did; -1 where there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
