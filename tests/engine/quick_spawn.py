"""Processes that Python's multiprocessing spawns, and commands of this package and of vLLM that are
started by ``subprocess``, as forks of a clean twin: each would import vLLM anew, which takes longer
than most of what it does.

``install`` makes the twin, a fork of this process as it is then, which does nothing but fork. What
is spawned later finds what it would find in a process of its own: the arguments, environment,
folder and descriptors of its parent, whose child it is, and nothing of what that has done since.
"""

import ctypes
import json
import os
import runpy
import socket
import subprocess
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
_TESTS = Path(__file__).resolve().parents[1]
_READ_AT_IMPORT = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""A process in which it is to be another one has to import vLLM itself."""
_NOTHING_SPECIAL = -1, None, None, None, -1, None
"""What ``subprocess`` is not asked for: a process group, a group, groups, a user, a umask, and a
function to call first."""


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
    spawn, start, lock = util.spawnv_passfds, subprocess._fork_exec, threading.Lock()
    imported = os.environ.get(_READ_AT_IMPORT)

    def ask(descriptors: Mapping[int, int], **asked: Any) -> int:
        asked = {"env": dict(os.environ), "folder": os.getcwd()} | asked
        text = json.dumps(asked | {"descriptors": list(descriptors)})
        with lock:
            socket.send_fds(ours, [text.encode()], list(descriptors.values()))
            return int(ours.recv(32))

    def fork(path: Any, args: Sequence[Any], passed: Sequence[Any]) -> int:
        if "--multiprocessing-fork" not in args:
            return spawn(path, args, passed)
        code = args[list(args).index("-c") + 1]
        return ask({number: number for number in sorted({int(each) for each in passed})}, code=code)

    def fork_command(args: Any, executables: Any, close: Any, kept: Any, *more: Any) -> int:
        folder, env, stdin, _, _, stdout, _, stderr, _, told, _, apart = more[:12]
        command = [os.fsdecode(each) for each in args]
        given = dict(os.fsdecode(each).split("=", 1) for each in env or ()) or dict(os.environ)
        is_ours = os.fsdecode(executables[0]) == sys.executable and command_of(command)
        is_plain = more[12:18] == _NOTHING_SPECIAL and given.get(_READ_AT_IMPORT) == imported
        if not (is_ours and is_plain):
            return start(args, executables, close, kept, *more)
        streams = {i: i if each == -1 else each for i, each in enumerate((stdin, stdout, stderr))}
        return ask(
            streams | {int(each): int(each) for each in kept if each != told},
            argv=command_of(command),
            apart=bool(apart),
            env=given,
            **({"folder": os.fsdecode(folder)} if folder else {}),
        )

    util.spawnv_passfds, subprocess._fork_exec = fork, fork_command


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
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.001)
            asked = json.loads(text)
            if asked.get("apart"):
                os.setsid()
            os.write(writing, str(os.getpid()).encode())
            for descriptor in (reading, writing, requests.detach()):
                os.close(descriptor)
            return asked, descriptors
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
    own = [number for number in asked["descriptors"] if number > 2]
    if "code" in asked:
        install(own)
        sys.argv = ["-c", "--multiprocessing-fork"]
        exec(asked["code"], {"__name__": "__main__"})
    else:
        sys.stdin = os.fdopen(0, closefd=False)
        run(asked["argv"], own)
    sys.exit()


def command_of(command: Sequence[str]) -> list[str] | None:
    """Of a command line of Python's: a script's path, or "-m" and a module, and the arguments, if
    that is a module of this package's or vLLM's, or a script of the tests'."""
    rest = list(command[1:])
    while rest[:1] == ["-W"]:
        del rest[:2]
    if rest[:1] == ["-m"] and rest[1].partition(".")[0] in ("vllm", "vllm_dflash"):
        return rest
    is_script = bool(rest) and rest[0].endswith(".py") and _TESTS in Path(rest[0]).parents
    return rest if is_script else None


def run(arguments: Sequence[str], own: Sequence[int]) -> None:
    """Becomes a Python command, in a process that was forked for it and has its descriptors and
    environment.

    Args:
        arguments: a script's path, or "-m" and a module, and the arguments.
        own: as of ``install``.
    """
    sys.argv = list(arguments)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    added = [path for path in paths if path and path not in sys.path]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *added]
    install(own)
    call_itself(sys.argv)
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def place(descriptors: Mapping[int, int]) -> None:
    """Gives open descriptors other numbers, by their new ones."""
    for i, descriptor in enumerate(descriptors.values()):
        os.dup2(descriptor, _ABOVE + i, inheritable=False)
        os.close(descriptor)
    for i, wanted in enumerate(descriptors):
        os.dup2(_ABOVE + i, wanted)
        os.close(_ABOVE + i)


def heed_environment() -> None:
    """What reads the environment at its import, or Python at its start, reads this process's."""
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if values := sys.modules.get("prometheus_client.values"):
        values.ValueClass = values.get_value_class()


def call_itself(arguments: Sequence[str]) -> None:
    """Lets the list of processes say what this one is."""
    import setproctitle

    setproctitle.setproctitle(" ".join([Path(sys.executable).name, *arguments]))
