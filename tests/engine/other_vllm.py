"""Engines and ``vllm-dflash status`` in processes of their own, where vLLM is an edited copy or
another plug-in is installed."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm_copies
from engine import forks
from engine.harness import TARGET, Job, engine_env, held_out_prompts, wait_until_gone
from pairs import random_prompts
from targets import VOCAB


def edited(folder: Path, *edits: tuple[str, str, str]) -> dict[str, str]:
    """An environment whose vLLM differs from the installed one by ``edits``: file, what is replaced
    once, and by what."""
    vllm_copies.edited(folder, *edits)
    env = before_the_installed(folder)
    for file, _, _ in edits:
        _keep_what_is_known(folder / "vllm" / file, folder / "cache" / "modelinfos")
    return env


def renamed(folder: Path, old: str, new: str) -> dict[str, str]:
    """An environment whose vLLM calls a name otherwise, wherever it stands."""
    vllm_copies.renamed(folder, old, new)
    return before_the_installed(folder)


def before_the_installed(folder: Path) -> dict[str, str]:
    """An environment that finds what is in a folder before what is installed."""
    from vllm.envs import VLLM_CACHE_ROOT

    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    # vLLM keeps what it found out about a model's class until its file is another, and finds it out
    # in a process of its own: with one cache every engine of an unedited vLLM would do so again.
    cache = folder / "cache"
    known = Path(VLLM_CACHE_ROOT, "modelinfos")
    if known.is_dir() and not cache.exists():
        shutil.copytree(known, cache / "modelinfos")
    return engine_env(
        {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "VLLM_CACHE_ROOT": str(cache)}
    )


def _keep_what_is_known(file: Path, known: Path) -> None:
    """What vLLM has found out about the classes of a file of models holds for the edited one too:
    edits are of bodies. With another hash than vLLM's it is found out anew."""
    content = b"\0".join([file.name.encode(), file.read_bytes(), b""])
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if file.parent.name == "models":
        for path in known.glob(f"vllm-model_executor-models-{file.stem}-*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"hash": digest}))


def completed(
    command: Sequence[str], env: dict[str, str], text: str = "", timeout_s: float = 400
) -> subprocess.CompletedProcess[str]:
    """A Python command that was run to its end, as ``forks.start`` takes it, with this as its
    input; it has vLLM's libraries imported, and vLLM itself from where the environment says."""
    with tempfile.TemporaryDirectory() as folder:
        streams = asked, said, errors = [Path(folder, name) for name in ("in", "out", "err")]
        asked.write_text(text)
        process = forks.start(command, env, dict(enumerate(streams)), forks.LIBRARIES)
        try:
            process.wait(timeout_s)
            wait_until_gone(process.pid)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(
            list(command), process.wait(), said.read_text(), errors.read_text()
        )


def status(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``vllm-dflash status``."""
    return completed(["-m", "vllm_dflash.cli", "status"], env)


def run(
    env: dict[str, str], folder: Path, *pairs: tuple[Path, Path | None], **changes: Any
) -> list[dict[str, Any]]:
    """An engine for each target with its drafter or none; a process of its own, as the harness's
    has imported vLLM already."""
    return run_jobs(env, folder, [job(*pair, **changes) for pair in pairs])


def job(target: Path, drafter: Path | None, **changes: Any) -> Job:
    """Few prompts and short answers; drafts are recorded."""
    recorded = drafter is not None
    return Job(target, drafter, prompts_of(target), max_tokens=24, record=recorded, **changes)


class EndedError(RuntimeError):
    """The process ended in the middle of a job; the message is all that it said."""

    def __init__(self, log: str, reports: list[dict[str, Any]]) -> None:
        super().__init__(log)
        self.reports = reports
        """Of the jobs before."""


def run_jobs(env: dict[str, str], folder: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The jobs' reports, each with the process's ``log``. Raises EndedError."""
    out = folder / "reports.json"
    done = completed(
        [str(Path(__file__).with_name("worker.py")), str(out)],
        env,
        json.dumps([job.to_json() for job in jobs]),
    )
    if done.returncode != 0:
        before = Path(f"{out}.before")
        reports = json.loads(before.read_text()) if before.exists() else []
        raise EndedError(done.stdout + done.stderr, reports)
    reports = json.loads(out.read_text())
    for report in reports:
        report["log"] = done.stdout + done.stderr
    return reports


def prompts_of(target: Path) -> list[list[int]]:
    return held_out_prompts(3) if target == TARGET else random_prompts(3, VOCAB)


def tokens(report: dict[str, Any]) -> list[Sequence[int]]:
    return report["batches"][0]["tokens"]


def accepted(report: dict[str, Any]) -> int:
    return report["batches"][0]["counters"]["accepted"]
