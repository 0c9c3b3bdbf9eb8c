"""What an actor has started ends with the actor, also where that is killed: vLLM's engine process
does not notice, and would keep its memory.

pytest tests/engine/test_cluster_batch.py
"""

import subprocess

import psutil


def tie_children() -> subprocess.Popen[bytes]:
    """Has a shell wait for this process's end, and then end all children that it has now, theirs
    included.

    Kill what is returned before other children are started: a forked one would hold this process's
    end of the pipe open.
    """
    children = " ".join(str(child.pid) for child in psutil.Process().children(recursive=True))
    return subprocess.Popen(
        ["sh", "-c", f"read -r _; kill -9 {children} 2>/dev/null"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
