"""Processes that Python's multiprocessing spawns, as forks of a clean twin: each would import vLLM
anew, which takes longer than most of what it does.

``install`` makes the twin, a fork of this process as it is then, which does nothing but fork. What
is spawned later finds what it would find in a process of its own: the arguments, environment,
folder and descriptors of its parent, whose child it is, and nothing of what that has done since.
"""

import ctypes
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

_MOST_BYTES, _MOST_DESCRIPTORS = 1 << 17, 64
_ABOVE = 300
"""Descriptors from here on are free in a twin."""
_PR_SET_CHILD_SUBREAPER = 36


def install(own: Sequence[int] = ()) -> None:
    """From now on what this process spawns is forked; to be called before it has threads.

    Args:
        own: descriptors that this process alone is to hold open.
    """
    # The twin's grandchildren are then this process's children once their parent has ended.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        for descriptor in (*own, ours.detach()):
            os.close(descriptor)
        _become(*_twin(theirs))
    theirs.close()
    spawn, lock = util.spawnv_passfds, threading.Lock()

    def fork(path: Any, args: Sequence[Any], passed: Sequence[Any]) -> int:
        if "--multiprocessing-fork" not in args:
            return spawn(path, args, passed)
        descriptors = sorted({int(descriptor) for descriptor in passed})
        asked = {
            "code": args[list(args).index("-c") + 1],
            "env": dict(os.environ),
            "folder": os.getcwd(),
            "descriptors": descriptors,
        }
        with lock:
            socket.send_fds(ours, [json.dumps(asked).encode()], descriptors)
            return int(ours.recv(32))

    util.spawnv_passfds = fork


def _twin(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks for each request, and ends with the process that asks; returns in the forks."""
    while True:
        text, descriptors, *_ = socket.recv_fds(requests, _MOST_BYTES, _MOST_DESCRIPTORS)
        if not text:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            for descriptor in (reading, writing, requests.detach()):
                os.close(descriptor)
            return json.loads(text), descriptors
        for descriptor in (writing, *descriptors):
            os.close(descriptor)
        child_id = os.read(reading, 32)
        os.close(reading)
        os.waitpid(between, 0)
        requests.send(child_id)


def _become(asked: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Runs what was to be spawned, and ends."""
    place(dict(zip(asked["descriptors"], descriptors, strict=True)))
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["folder"])
    heed_environment()
    install(asked["descriptors"])
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(asked["code"], {"__name__": "__main__"})
    sys.exit()


def place(descriptors: Mapping[int, int]) -> None:
    """Gives open descriptors other numbers, by their new ones."""
    for i, descriptor in enumerate(descriptors.values()):
        os.dup2(descriptor, _ABOVE + i, inheritable=False)
        os.close(descriptor)
    for i, wanted in enumerate(descriptors):
        os.dup2(_ABOVE + i, wanted)
        os.close(_ABOVE + i)


def heed_environment() -> None:
    """What reads the environment at its import reads this process's."""
    if values := sys.modules.get("prometheus_client.values"):
        values.ValueClass = values.get_value_class()


def call_itself(arguments: Sequence[str]) -> None:
    """Lets the list of processes say what this one is."""
    import setproctitle

    setproctitle.setproctitle(" ".join([Path(sys.executable).name, *arguments]))
