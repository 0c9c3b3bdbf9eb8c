"""Starts a test's scripts as forks of one process that has vLLM imported: the import takes longer
than most of what they do.

``start`` is the harness's side; run as a script, this file is that process: it reads a request a
line and ends with its standard input.
A script finds what it would find when started by itself: its arguments, environment, input, output
and a process group of its own.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any


def start(
    script: Path,
    arguments: Sequence[str],
    env: Mapping[str, str],
    input_path: Path,
    output_path: Path,
) -> int:
    """Runs a Python script beside this process; returns its process id, which is also its process
    group's."""
    parent = _parent(env["VLLM_ENABLE_V1_MULTIPROCESSING"])
    request = {
        "argv": [str(script), *arguments],
        "env": dict(env),
        "input": str(input_path),
        "output": str(output_path),
    }
    assert parent.stdin
    assert parent.stdout
    parent.stdin.write(json.dumps(request) + "\n")
    parent.stdin.flush()
    return int(parent.stdout.readline())


def wait(pid: int, timeout_s: float) -> None:
    """Until the process has ended. Raises TimeoutError."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([descriptor], [], [], timeout_s)[0]:
            raise TimeoutError(f"still running after {timeout_s:.0f} s")
    finally:
        os.close(descriptor)


@cache
def _parent(multiprocessing: str) -> "subprocess.Popen[str]":
    """The process that forks, one for each way of running engines; vLLM reads that variable at its
    import, others when an engine starts."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing,
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def _become(request: dict[str, Any]) -> None:
    """Turns a fork into what it was asked to run."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for path, flags, descriptor in (
        (request["input"], os.O_RDONLY, 0),
        (request["output"], os.O_WRONLY | os.O_CREAT, 1),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    added = [
        path
        for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if path and path not in sys.path
    ]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *added]


def main() -> None:
    import gc

    gc.disable()
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
        print(pid, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
