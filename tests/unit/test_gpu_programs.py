"""The programs of ``tests/gpu`` without a GPU and without an engine: their flags, what they refuse,
their record in JSON after every figure, and going on where a run was cut off.

Engines are stood in for by ``Stand``, which answers jobs as ``child`` and ``oracle`` do. That the
jobs themselves run is shown by ``tests/engine/test_gpu_programs.py``, on the interpreter.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpu import (
    common,
    here,
    load,
    profile_step,
    right_drafts,
    second_start,
    shapes,
    starting,
    step_time,
)

PROGRAMS = [right_drafts, second_start, step_time, profile_step, load]
ROOT = Path(__file__).resolve().parents[2]
H200 = {"name": "NVIDIA H200", "total_bytes": 150_754_820_096, "free_bytes": 150_000_000_000}


class Stand:
    """What an ``EngineProcess`` is to a ``Run``, without a process."""

    jobs: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    started: list[str] = []  # noqa: RUF012
    broken: dict[str, Exception] = {}  # noqa: RUF012
    """By an engine's name what its jobs raise."""
    before: Callable[[], object] = staticmethod(lambda: None)
    """Called before each job."""
    modes: dict[str, int] = {"draft FULL": 9}  # noqa: RUF012
    """How forwards ran."""
    check: str | None = "error"
    """What vLLM does where a step waits."""

    def __init__(self, spec: Any, log: Path, *, tiny: bool) -> None:
        json.dumps(spec.args)  # it goes to a child
        self.name, self.is_killed = spec.name, False
        Stand.started.append(spec.name)

    def __enter__(self) -> "Stand":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""

    def wait_until_ready(self) -> dict[str, Any]:
        return {"seconds": 1.0, "compile_seconds": 0.5, "wait_check": Stand.check}

    def kill(self) -> None:
        self.is_killed = True

    def do(self, job: dict[str, Any]) -> Any:
        Stand.before()
        Stand.jobs.append((self.name, job))
        if self.is_killed:
            raise RuntimeError("killed")
        if self.name in Stand.broken:
            raise Stand.broken[self.name]
        job = json.loads(json.dumps(job))
        if self.name == "oracle":
            tokens = sum(len(d[2]) for s in job["sequences"] for d in s["drafts"])
            same = [tokens, tokens, tokens, tokens]
            counts = {"all": same, "near the end": [0, 0, 0, 0]}
            return {"drafts": 5, "anchors_wrong": 0, "counts": counts}
        return getattr(self, job["do"])(job)

    @staticmethod
    def drafts(job: dict[str, Any]) -> dict[str, Any]:
        drafts = [[i, len(p), 7, [3, 4, 5]] for i, p in enumerate(job["prompts"])]
        outputs = [[7, 3, 4] for _ in job["prompts"]]
        return {"outputs": outputs, "drafts": drafts, "modes": Stand.modes, "tau": 2.0}

    def steady(self, job: dict[str, Any]) -> dict[str, Any]:
        speed = {"plain": 100.0, "adaptive": 99.0}.get(self.name, 150.0)
        return {
            "step_ms": 10.0,
            "tokens_per_second": speed,
            "cold_tokens_per_second": speed,
            "tau": 2.0,
        }

    @staticmethod
    def profile(job: dict[str, Any]) -> dict[str, Any]:
        Path(job["trace"]).write_text('{"traceEvents": []}')
        return {"step_ms": 10.0}

    @staticmethod
    def pieces(job: dict[str, Any]) -> dict[str, Any]:
        return {"lm_head and best token": 100.0}


@pytest.fixture(autouse=True)
def _stands(monkeypatch: pytest.MonkeyPatch) -> None:
    Stand.jobs, Stand.started, Stand.broken = [], [], {}
    Stand.before = staticmethod(lambda: None)
    monkeypatch.setattr(starting, "start_engine", Stand)


@pytest.fixture
def no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is made, for their weights are gigabytes."""

    def make_pair(shape: str, folder: Path, **_: Any) -> shapes.Pair:
        return shapes.Pair(folder / "target", folder / "drafter", 16)

    monkeypatch.setattr(shapes, "make_pair", make_pair)


@pytest.fixture
def on_gpu(no_pairs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    monkeypatch.setattr(here, "find_device", lambda: H200)


def run(program: ModuleType, folder: Path, *more: str) -> int:
    return program.main(["--out", str(folder / "out"), "--work", str(folder / "work"), *more])


def record(folder: Path) -> dict[str, Any]:
    (path,) = [p for p in (folder / "out").glob("*.json") if not p.stem.endswith("-kept")]
    return json.loads(path.read_text())


def states(folder: Path) -> dict[str, str]:
    return {name: figure["state"] for name, figure in record(folder)["figures"].items()}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.NAME)
def test_help_teaches(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, what it answers, how long it takes, and what the exit status says."""
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"python tests/gpu/{program.NAME}.py --out" in said
    assert "minutes" in said
    assert "--tiny" in said
    assert "Exit status" in said
    assert "gpu/README.md" in said


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.NAME)
def test_all_figures_on_a_gpu(program: ModuleType, tmp_path: Path, on_gpu: None) -> None:
    assert run(program, tmp_path) == common.ENDED
    found = record(tmp_path)
    assert found["program"] == program.NAME
    assert found["runs"][0]["device"]["name"] == "NVIDIA H200"
    assert {"vllm", "vllm-dflash", "torch"} <= found["runs"][0]["versions"].keys()
    left = {n: f["why"] for n, f in found["figures"].items() if f["state"] != common.RAN}
    assert all("it needs" in why for why in left.values())
    assert len(found["figures"]) - len(left) >= 6


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.NAME)
def test_all_figures_of_the_tiny_size(program: ModuleType, tmp_path: Path, no_pairs: None) -> None:
    """What cannot be had on a CPU says so, and is no failure."""
    assert run(program, tmp_path, "--tiny") == common.ENDED
    (path,) = [p for p in (tmp_path / "out").glob("*.json") if not p.stem.endswith("-kept")]
    assert path.stem.endswith("-tiny")
    assert common.FAILED not in states(tmp_path).values()
    assert common.RAN in states(tmp_path).values()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.NAME)
def test_figures_are_written_one_by_one(program: ModuleType, tmp_path: Path, on_gpu: None) -> None:
    """A run that is killed in its third job has left what the jobs before it brought, and the next
    one starts no engine for that again."""

    def die_in_the_third() -> None:
        if len(Stand.jobs) == 4:
            raise KeyboardInterrupt

    Stand.before = staticmethod(die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(program, tmp_path)
    first = record(tmp_path)["figures"]
    assert first
    assert all(figure["state"] == common.RAN for figure in first.values())
    Stand.before = staticmethod(lambda: None)
    assert run(program, tmp_path) == common.ENDED
    now = record(tmp_path)
    assert len(now["runs"]) == 2
    assert all(now["figures"][name] == figure for name, figure in first.items())
    done, started = len(Stand.jobs), len(Stand.started)
    assert run(program, tmp_path) == common.ENDED
    assert (len(Stand.jobs), len(Stand.started)) == (done, started)


def test_again_measures_again(tmp_path: Path, on_gpu: None) -> None:
    run(step_time, tmp_path, "--repeats", "1", "--only", "1 requests")
    jobs = len(Stand.jobs)
    run(step_time, tmp_path, "--repeats", "1", "--only", "1 requests", "--again")
    assert len(Stand.jobs) == 2 * jobs


def test_only_some_figures(tmp_path: Path, on_gpu: None) -> None:
    assert run(load, tmp_path, "--only", "1 requests, context 1024, plain") == common.ENDED
    assert list(states(tmp_path)) == ["1 requests, context 1024, plain"]
    assert Stand.started == ["plain"]


def test_an_engine_that_dies_costs_its_own_figures(tmp_path: Path, on_gpu: None) -> None:
    """The others are measured, the exit status says that one failed, and the next run tries it
    again."""
    Stand.broken["native:15"] = RuntimeError("out of memory")
    assert run(step_time, tmp_path, "--repeats", "1") == common.DID_NOT_PASS
    found = record(tmp_path)["figures"]
    assert found["32 requests, native:15, repeat 1"]["why"] == "out of memory"
    assert found["32 requests, dflash:15, repeat 1"]["state"] == common.RAN
    assert found["step over plain's, 32 requests, K = 7"]["passed"]
    Stand.broken = {}
    assert run(step_time, tmp_path, "--repeats", "1") == common.ENDED
    assert common.FAILED not in states(tmp_path).values()


def test_a_bound_that_is_not_met(tmp_path: Path, on_gpu: None, monkeypatch: Any) -> None:
    slow = {"step_ms": 10.0, "cold_tokens_per_second": 90.0, "tau": None}

    def steady(self: Stand, job: dict[str, Any]) -> dict[str, Any]:
        return slow | {"tokens_per_second": 97.0 if self.name == "adaptive" else 100.0}

    monkeypatch.setattr(Stand, "steady", steady)
    assert run(load, tmp_path) == common.DID_NOT_PASS
    figure = record(tmp_path)["figures"]["over plain: 32 requests, context 1024, acceptance 0.05"]
    assert figure["passed"] is False
    assert figure["adaptive"] == pytest.approx(0.97)


def test_the_time_is_over(tmp_path: Path, on_gpu: None, monkeypatch: Any) -> None:
    """Engines are ended and the rest is left out, which the next call measures."""
    begun: list[starting.Starter] = []
    started = starting.Starter.started

    def keeping(self: starting.Starter, *args: Any, **kwargs: Any) -> Any:
        begun.append(self)
        return started(self, *args, **kwargs)

    def end() -> None:
        if len(Stand.jobs) == 3:
            begun[-1].end()

    Stand.before = staticmethod(end)
    monkeypatch.setattr(starting.Starter, "started", keeping)
    assert run(step_time, tmp_path, "--repeats", "1") == common.UNFINISHED
    found = states(tmp_path)
    measured = [name for name, state in found.items() if state == common.RAN and "repeat" in name]
    assert measured == [f"1 requests, {m}, repeat 1" for m in ("plain", "native:15", "dflash:15")]
    assert common.FAILED not in found.values()
    Stand.before = staticmethod(lambda: None)
    assert run(step_time, tmp_path, "--repeats", "1") == common.ENDED


def test_what_did_not_run_shows_nothing(tmp_path: Path, on_gpu: None, monkeypatch: Any) -> None:
    """Right drafts of an engine that ran eagerly say nothing about CUDA graphs; past the largest
    graph they are what is asked for. Nor does a check for waits that is off."""
    monkeypatch.setattr(Stand, "modes", {"draft NONE": 9})
    monkeypatch.setattr(Stand, "check", None)
    assert run(right_drafts, tmp_path) == common.DID_NOT_PASS
    figures = record(tmp_path)["figures"]
    failed = {name for name, figure in figures.items() if figure.get("passed") is False}
    assert {
        "dflash graphs, 32 requests",
        "wide graphs, 3 requests",
        "wide K below the block, 32 requests",
        right_drafts.NO_WAIT,
    } <= failed
    assert not failed & {
        "dflash graphs, 40 requests",
        "dflash eager, 32 requests",
        "wide graphs, 32 requests",
    }


def test_other_settings_are_refused(tmp_path: Path, on_gpu: None, capsys: Any) -> None:
    run(step_time, tmp_path, "--only", "1 requests, plain")
    with pytest.raises(SystemExit) as ended:
        run(step_time, tmp_path, "--tau", "3")
    assert ended.value.code == common.REFUSED
    assert "give another --out" in capsys.readouterr().err


def test_nothing_to_measure_is_no_success(tmp_path: Path, on_gpu: None, capsys: Any) -> None:
    assert run(step_time, tmp_path, "--only", "nosuch") == common.REFUSED
    assert "no figure has 'nosuch'" in capsys.readouterr().out
    for minutes in ("nan", "-1", "0"):
        with pytest.raises(SystemExit):
            run(step_time, tmp_path, "--minutes", minutes)
        assert "more than 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_record_is_refused(
    tmp_path: Path, on_gpu: None, capsys: Any, text: str
) -> None:
    run(load, tmp_path, "--only", "1 requests, context 1024, plain")
    (path,) = (tmp_path / "out").glob("*.json")
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        run(load, tmp_path)
    assert ended.value.code == common.REFUSED
    assert "is no record" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.NAME)
def test_no_gpu_is_refused(
    program: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    nothing = {"name": None, "total_bytes": 0, "free_bytes": 0}
    monkeypatch.setattr(here, "find_device", lambda: nothing)
    with pytest.raises(SystemExit) as ended:
        run(program, tmp_path)
    said = capsys.readouterr().err
    assert ended.value.code == common.REFUSED
    assert "NVIDIA GPU" in said
    assert "--tiny" in said
    assert Stand.started == []


@pytest.mark.slow
def test_what_torch_says_of_the_device() -> None:
    """Asked for real, in another process."""
    found = here.find_device()
    assert found.keys() == {"name", "total_bytes", "free_bytes"}
    assert (found["name"] is None) == (found["total_bytes"] == 0)


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("torch", "use a Python that has it"),
        ("vllm", "pack_vllm.py"),
        ("vllm_dflash", "make wheel"),
        ("vllm_dflash.patches", "a checkout on the path is not enough"),
    ],
)
def test_what_is_not_installed_is_refused(missing: str, remedy: str, monkeypatch: Any) -> None:
    find = here.find_spec
    monkeypatch.setattr(here, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(here.RefusedError, match=remedy):
        here.check_here(tiny=True)


def test_a_python_without_anything() -> None:
    """The refusal comes before any import that would fail."""
    script = ROOT / "tests" / "gpu" / "right_drafts.py"
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "--tiny"], capture_output=True, text=True
    )
    assert ended.returncode == common.REFUSED, ended.stderr
    assert "torch is not installed" in ended.stderr


def test_a_gpu_that_is_too_small_is_refused(tmp_path: Path, on_gpu: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(here, "find_device", lambda: H200 | {"total_bytes": 24_000_000_000})
    with pytest.raises(SystemExit) as ended:
        run(load, tmp_path)
    assert ended.value.code == common.REFUSED


def test_loads_that_do_not_fit(tmp_path: Path, on_gpu: None) -> None:
    """On an H200 with two engines of a 4B target: 256 requests of 1k, a few of 32k, two of 128k."""
    run(load, tmp_path)
    found = record(tmp_path)["figures"]
    assert found["256 requests, context 1024, plain"]["state"] == common.RAN
    left = found["32 requests, context 131072, plain"]
    assert left["state"] == common.LEFT_OUT
    assert "GB of KV cache" in left["why"]
    ran = {n.split(",")[0] for n, f in found.items() if "131072, plain" in n and "step_ms" in f}
    assert ran == {"1 requests", "2 requests"}
    rooms = [job["tokens"] for name, job in Stand.jobs if name == "plain"]
    assert min(rooms) >= load.LEAST_ROOM
    cache = shapes.cache_bytes_a_token("qwen3-4b")
    for name, job in Stand.jobs:
        if name == "plain":
            used = job["requests"] * (job["context"] + job["tokens"] + load.SPARE) * cache
            assert used < H200["total_bytes"] / 2
