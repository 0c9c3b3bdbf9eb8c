"""Forks in place of processes that would each import vLLM: they find what those would find.

pytest tests/engine/test_forks.py
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import forks
from engine.harness import engine_env, wait_until_gone
from engine.other_vllm import before_the_installed, completed

pytestmark = pytest.mark.engine
SCRIPT = """
import json, multiprocessing, os, sys, warnings

def look(deeper):
    from multiprocessing import Process, get_context
    found = {
        "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "folder": os.getcwd(),
        "said": os.environ.get("SAID"), "kept": hasattr(warnings, "left_behind"),
        "vllm": "vllm.v1.worker.cpu_worker" in sys.modules,
        "plug-ins": getattr(sys.modules.get("vllm.plugins"), "plugins_loaded", False),
    }
    if deeper:
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=tell, args=(answers, deeper - 1))
        child.start()
        found["child"], found["its pid"] = answers.get(timeout=60), child.pid
        child.join(60)
        found["its status"] = child.exitcode
    return found

def tell(answers, deeper):
    answers.put(look(deeper))
    answers.close()
    answers.join_thread()
    sys.exit(7)

if __name__ == "__main__":
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    warnings.left_behind = True
    os.environ["SAID"] = "by the parent"
    os.chdir(sys.argv[1])
    print("FOUND" + json.dumps(look(2)), sys.stdin.read(), flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def test_what_is_spawned_is_a_clean_child(tmp_path: Path) -> None:
    script, told, log = (tmp_path / name for name in ("script.py", "told", "log"))
    script.write_text(SCRIPT)
    told.write_text("the input")
    fork = forks.start(
        [str(script), str(tmp_path), str(int(signal.SIGKILL))], engine_env(), {0: told, 1: log}
    )
    assert fork.wait(120) == -signal.SIGKILL
    wait_until_gone(fork.pid)
    found: dict[str, Any]
    found, end = json.JSONDecoder().raw_decode(log.read_text().partition("FOUND")[2])
    assert log.read_text().partition("FOUND")[2][end:] == " the input\n"
    assert found["pid"] == found["group"] == fork.pid
    for parent in (found, found["child"]):
        child = parent["child"]
        assert child["pid"] == parent["its pid"]
        assert child["parent"] == parent["pid"]
        assert child["group"] == fork.pid
        assert child["folder"] == str(tmp_path)
        assert child["said"] == "by the parent"
        assert child["vllm"]
        assert not child["kept"]
        assert not child["plug-ins"]
        assert parent["its status"] == 7


def test_a_popen_is_driven_by_its_pipes(tmp_path: Path) -> None:
    (tmp_path / "echo_module.py").write_text(
        "import os, sys\n"
        "out = os.fdopen(int(sys.argv[1]), 'w')\n"
        "for line in sys.stdin:\n    print('heard', line, end='', file=out, flush=True)\n"
        "sys.exit(3)\n"
    )
    reading, writing = os.pipe()
    with (tmp_path / "log").open("w") as log:
        process = forks.Popen(
            [sys.executable, "-W", "ignore", "-m", "echo_module", str(writing)],
            env=engine_env({"PYTHONPATH": str(tmp_path)}),
            stdout=log,
            pass_fds=(writing,),
        )
    os.close(writing)
    with os.fdopen(reading) as answers:
        process.stdin.write("a line\n")
        process.stdin.flush()
        assert answers.readline() == "heard a line\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.stdin.close()
        assert process.wait(60) == process.returncode == 3
        assert answers.read() == ""


STARTER = """
import json, os, subprocess, sys
from vllm.plugins import load_general_plugins
load_general_plugins()

def look(env, *options):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *options, sys.argv[1], "an argument"],
        cwd=sys.argv[2], env=os.environ | {"SAID": "to the child"} | env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    said, errors = process.communicate("the input")
    return json.loads(said) | {
        "errors": errors, "status": process.returncode, "its pid": process.pid
    }

others = look({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}), look({}, "-I")
print("FOUND" + json.dumps([os.getpid(), look({}), *others]), flush=True)
"""


def test_a_command_that_is_started_is_a_clean_child(tmp_path: Path) -> None:
    """A process that is to be another than this one, or that Python is given further options for,
    imports vLLM itself."""
    script, folder, log = (tmp_path / name for name in ("script.py", "folder", "log"))
    script.write_text(STARTER)
    folder.mkdir()
    looking = Path(__file__).with_name("looking_script.py")
    fork = forks.start(
        [str(script), str(looking), str(folder)], engine_env(), {0: Path(os.devnull), 1: log}
    )
    assert fork.wait(120) == 0, log.read_text()
    wait_until_gone(fork.pid)
    starter, *children = json.loads(log.read_text().partition("FOUND")[2].splitlines()[0])
    assert starter == fork.pid
    for child, is_fork in zip(children, (True, False, False), strict=True):
        assert child["arguments"] == ["an argument"]
        assert child["name"] == "__main__"
        assert child["pid"] == child["group"] == child["its pid"]
        assert child["parent"] == starter
        assert child["folder"] == str(folder)
        assert child["said"] == "to the child"
        assert child["input"] == "the input"
        # Triton adds a word at the end of a process that has it imported.
        assert child["errors"].startswith("an error\n")
        assert child["status"] == 7
        assert child["vllm"] == is_fork
        assert not child["plug-ins"]


OTHER = """
import json, subprocess, sys

def look():
    known = {name.partition(".")[0] for name in sys.modules}
    found = {
        "torch": "torch" in known, "values": "prometheus_client" in known,
        "ours": sorted(known & {"vllm", "vllm_dflash"}), "writes": not sys.dont_write_bytecode,
    }
    import vllm
    return found | {"vllm": vllm.__file__}

if __name__ == "__main__":
    if sys.argv[1:] != ["child"]:
        command = [sys.executable, "-m", "vllm.look", "child"]
        print(subprocess.run(command, capture_output=True, text=True).stdout, end="")
    print(json.dumps(look()))
    print("an error", file=sys.stderr)
    sys.exit(7)
"""


def test_with_the_libraries_alone_vllm_is_the_environments(tmp_path: Path) -> None:
    """Also in what it starts: nothing of the installed vLLM or of this package is there before, and
    nothing that reads the environment when it is imported."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "look.py").write_text(OTHER)
    (tmp_path / "script.py").write_text(OTHER)
    done = completed([str(tmp_path / "script.py")], before_the_installed(tmp_path))
    assert done.returncode == 7, done.stderr
    # Triton adds a word at the end of a process that has it imported.
    assert done.stderr.startswith("an error\n")
    child, found = map(json.loads, done.stdout.splitlines())
    assert found == {
        "torch": True,
        "values": False,
        "ours": [],
        "writes": False,
        "vllm": str(tmp_path / "vllm" / "__init__.py"),
    }
    assert child == found | {"ours": ["vllm"]}
