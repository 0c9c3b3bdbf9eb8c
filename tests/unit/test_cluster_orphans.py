"""A process that is killed takes with it what it has started, at any moment."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow
START = """
import subprocess, sys, time
from vllm_dflash.cluster.orphans import Tie
tie = Tie()
child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE)
print(child.pid, int(child.stdout.readline()), flush=True)
"""
ENDS = {
    "while it starts": "time.sleep(600)",
    "once it has started": "tie.all_started(); print('started', flush=True); time.sleep(600)",
    "not once it is cut": "tie.all_started(); tie.cut(); print('cut', flush=True); time.sleep(600)",
}


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody waits for any more has ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("end", ENDS)
def test_children_of_a_killed_process(end: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", START + ENDS[end]], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    try:
        if end == "while it starts":
            time.sleep(2)
        else:
            parent.stdout.readline()
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        cut = end == "not once it is cut"
        until = time.monotonic() + (1 if cut else 10)
        while any(map(alive, children)) and time.monotonic() < until:
            time.sleep(0.05)
        assert [alive(child) for child in children] == [cut] * 2
    finally:
        for child in children:
            if alive(child):
                child.kill()
