"""What an actor has started ends with the actor, also where that is killed, and also while it is
still starting: vLLM's engine process does not notice, and would keep its memory.

    pytest tests/unit/test_cluster_orphans.py
"""

import contextlib
import subprocess
import threading

import psutil

_EVERY_S = 0.2
"""A child that is started as its parent is killed is missed if it is younger."""


class Tie:
    """A shell that waits for this process's end, and then ends the children that it was told of."""

    def __init__(self) -> None:
        """Children, and theirs, are told of as they come, from now until ``all_started``.

        They have to be spawned, as vLLM's are in an actor of Ray: a forked one would hold this
        process's end of the pipe open.
        """
        self._shell = subprocess.Popen(
            # The last line counts: a child that has ended leaves its number to another process.
            ["sh", "-c", "while read -r line; do pids=$line; done; kill -9 $pids 2>/dev/null"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._told: set[int] = set()
        self._complete = threading.Event()
        self._watch = threading.Thread(target=self._look_out, name="children", daemon=True)
        self._watch.start()

    def all_started(self) -> None:
        """All children are there: those of now are told of, and no later ones."""
        self._complete.set()
        self._watch.join()
        self._tell()

    def cut(self) -> None:
        """Nothing is ended any more, whatever becomes of this process."""
        self._complete.set()
        self._watch.join()
        self._shell.kill()
        self._shell.wait()
        if self._shell.stdin is not None:
            self._shell.stdin.close()

    def _look_out(self) -> None:
        while not self._complete.wait(_EVERY_S):
            self._tell()

    def _tell(self) -> None:
        children = {child.pid for child in psutil.Process().children(recursive=True)}
        children.discard(self._shell.pid)
        if children != self._told and self._shell.stdin is not None:
            self._told = children
            with contextlib.suppress(OSError):  # somebody has ended the shell
                self._shell.stdin.write((" ".join(map(str, children)) + "\n").encode())
                self._shell.stdin.flush()
