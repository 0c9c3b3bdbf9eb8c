"""The pipes to an engine's process: its chatter, its death, and its parent's."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from vllm_dflash.engines.process import (
    EngineFailedError,
    EngineProcess,
    EngineRefusedError,
    _what_was_said,
)
from vllm_dflash.evaluation import starting
from vllm_dflash.evaluation.methods import Method
from vllm_dflash.evaluation.plan import Plan
from vllm_dflash.evaluation.workload import Point

CHILD = """
import os, sys, time
from vllm_dflash.engines.child import RefusedError, serve

def begin(settings):
    print('{"result": "chatter on standard output"}', flush=True)
    if settings.get("fails"):
        raise ValueError("this vLLM refuses: say please")

    def work(job, parent):
        if settings.get("dies"):
            os.kill(os.getpid(), 9)
        if settings.get("refuses"):
            raise RefusedError("not this job: ask another")
        parent.done()
        while settings.get("works for ever"):
            time.sleep(0.1)
        parent.pause()
        print("Error: chatter again", file=sys.stderr, flush=True)
        return {"prompts": job["prompts"]}

    return work, {"pid": os.getpid(), "set": os.environ.get("OF_THE_METHOD")}

serve(begin)
"""


class Child(EngineProcess):
    """Runs ``CHILD``."""

    @staticmethod
    def _command(module):
        return "-c", CHILD


def start(log, settings=None, environment=None):
    return Child("", settings or {}, log, environment)


def run_all(engine, on_done=lambda _: None):
    """All slices of a job."""
    slices, count = engine.slices({"prompts": [[1, 2]]}, on_done), 0
    while True:
        try:
            next(slices)
        except StopIteration as end:
            assert count == 1, "it paused once"
            return end.value
        count += 1


def test_chatter_does_not_reach_the_protocol(tmp_path):
    done = []
    with start(tmp_path / "log", environment={"OF_THE_METHOD": "yes"}) as engine:
        ready = engine.wait_until_ready()
        assert ready["set"] == "yes"
        for _ in range(2):
            assert run_all(engine, done.append) == {"prompts": [[1, 2]]}
    assert done == [1, 1]
    assert "chatter on standard output" in (tmp_path / "log").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(ready["pid"], 0)


def test_one_that_does_not_start_says_why(tmp_path):
    with (
        start(tmp_path / "log", {"fails": True}) as engine,
        pytest.raises(EngineFailedError, match="status 1: ValueError: this vLLM refuses") as error,
    ):
        engine.wait_until_ready()
    assert "Traceback" in error.value.tail


def test_a_job_that_is_refused_says_what_to_do(tmp_path):
    with start(tmp_path / "log", {"refuses": True}) as engine:
        engine.wait_until_ready()
        with pytest.raises(EngineRefusedError, match="not this job: ask another"):
            engine.do({"prompts": []})


def test_of_a_refused_configuration_the_validators_words_are_told():
    """pydantic's last lines are an address; what is wrong stands between its title and them."""
    lines = [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for SpeculativeConfig",
        (
            "  Value error, K is 99: set 7 or less [type=value_error, input_value=ArgsKwargs((),"
            " {}), input_type=ArgsKwargs]"
        ),
        "    For further information visit the errors' page",
    ]
    assert _what_was_said(lines) == "K is 99: set 7 or less"
    assert (
        _what_was_said(["Traceback", "OSError: no such head", "[rank0] shutting down"])
        == "OSError: no such head"
    )
    assert _what_was_said(["Killed"]) == "Killed"
    assert _what_was_said([]) == "it said nothing"


def test_one_that_dies_says_how(tmp_path):
    with start(tmp_path / "log", {"dies": True}) as engine:
        engine.wait_until_ready()
        with pytest.raises(EngineFailedError, match="signal SIGKILL"):
            run_all(engine)
        with pytest.raises(EngineFailedError, match="signal SIGKILL"):
            run_all(engine)


@pytest.mark.parametrize(
    ("engine_args", "begun_for_each"),
    [({}, [1, 2, 3]), ({"kv_cache_memory_bytes": 1 << 30}, [2, 3, 3])],
)
def test_as_many_begin_at_once_as_there_are_cores(
    tmp_path, monkeypatch, engine_args, begun_for_each
):
    """Where the cache's size is given; elsewhere vLLM measures free memory, which another one's
    start would change."""
    begun, found = [], []

    def beginning(settings, environment, log):
        begun.append(log.stem)
        return start(log, settings, environment)

    monkeypatch.setattr(starting, "BenchEngine", beginning)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    methods = [Method(name, "plain") for name in ("a", "b", "c")]
    plan = Plan("T", methods, [Point("p", None, 0.0, 1, 8)], {}, 8, 1, "float32", 64, engine_args)
    with ExitStack() as stack:
        for method, engine in starting._launched(plan, tmp_path, stack):
            engine.wait_until_ready()
            found.append((method.name, len(begun)))
    assert found == list(zip(["a", "b", "c"], begun_for_each, strict=True))
    assert begun == ["a", "b", "c"]


def test_an_interrupted_parent_ends_its_children(tmp_path):
    """At once: one that is in the middle of a job would not look at its input for minutes."""
    engine = start(tmp_path / "log")
    pid = engine.wait_until_ready()["pid"]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), engine:
        raise KeyboardInterrupt
    assert time.monotonic() - began < 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_parent_leaves_no_child(tmp_path, busy):
    """Nobody cleans up after SIGKILL: the children see the end of their input, in the middle of a
    job too."""
    code = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_engine_process import start
        engines = [start(Path(f"{tmp_path}/log{{i}}"), {{"works for ever": {busy}}}) for i in range(2)]
        print(*(engine.wait_until_ready()["pid"] for engine in engines), flush=True)
        for engine in engines if {busy} else ():
            engine._send({{"prompts": []}})
            engine._receive()
        time.sleep(60)
        """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in children):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.02)


def running(pid):
    """Whether a process runs; one that has ended and is not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
