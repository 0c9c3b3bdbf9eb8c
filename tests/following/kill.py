"""kill -9 of a refresh in each of its stages, of a server in its swaps, and a full disk.

After each the server is started anew, with OUT/drafter of the refresh where that is there and the
first drafter where it is not, and says the id of the tensors that came into its engine: it has to
be that of the old drafter or of the new one. That a mixture would be told is tried with one.

A refresh kills itself as a file of its folder would get its name: what is written is there in part,
which is the worst that can be. A full disk is a small tmpfs, filled; where it cannot be mounted,
writing fails in the process as it would there.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.harness import DRAFTER, engine_env, wait_until_gone
from engine.test_serve import request, server
from engine.test_swap import swappable, which
from following.made import SETTINGS, finetuned, mixture, two_drafters
from following.record import FAILS, HOLDS, OPEN, Lines, none_of, told
from soak_server import processes
from vllm_dflash.swap.turns import PATH
from vllm_dflash.weights.identity import id_of_folder

ROUND, RUN = "rounds/*/round.json", "rounds/*/run"
STAGES = {
    "traffic": "rounds/*/traffic.jsonl",
    "begun": ROUND,
    "answers, prompts split": f"{RUN}/generate/split.json",
    "answers": f"{RUN}/generate/*/shard-00000.safetensors",
    "before": ROUND,
    "training": f"{RUN}/train/checkpoints/step-*",
    "trained": f"{RUN}/train/drafter",
    "training noted": f"{RUN}/train/result.json",
    "after": ROUND,
    "proved in vLLM": f"{RUN}/prove.json",
    "exported": f"{RUN}/drafter",
    "noted beside the weights": f"{RUN}/drafter/refresh.json",
    "decision": ROUND,
    "the link": "drafter",
}
"""What gets its name when the refresh is killed, one stage after the other of one round."""
FREE_MB = (0.0, 0.5, 2.0, 8.0, 24.0)
"""Left on the disk, in turn, before it has room."""
STEPS, HELD_OUT, A_STEP = 40, 24, 16 * 32 * 7
"""Steps of the fine-tuning, held-out prompts, and drafted tokens that a step of the refresh learns
from."""
BETTER, SHORT = 24, 4
"""Steps of a refresh whose drafter is kept, and of one that only has to end."""
SECONDS = 1500

HOOK = """
import errno, fnmatch, os, signal, sys
os.environ.setdefault("REFRESH_PID", str(os.getpid()))
out, killed_at, full = (os.environ[f"REFRESH_{name}"] for name in ("OUT", "KILLED_AT", "FULL"))
def watch(event, args):
    if event == "os.rename" and killed_at:
        name = os.path.relpath(os.fsdecode(args[1]), out)
        if fnmatch.fnmatchcase(name, killed_at):
            os.kill(int(os.environ["REFRESH_PID"]), signal.SIGKILL)
    if event == "open" and full and isinstance(args[0], str) and args[0].startswith(out):
        if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])
sys.addaudithook(watch)
"""
"""sitecustomize.py of the command and of the engines that it starts: where the command is killed,
and whether its disk is full."""


def refresh(
    made: Path, out: Path, log: Path, steps: int, killed_at: str = "", full: bool = False
) -> dict[str, Any]:
    """Runs it with prompts of the fine-tuned target: the ``status`` that it ended with, and what of
    it was ``left`` running a minute later, which is ended then."""
    out.mkdir(parents=True, exist_ok=True)
    flags = ["--target", made / "target", "--draft", DRAFTER, "--prompts", made / "few.jsonl"]
    flags += ["--tokens", steps * A_STEP, "--held-out", HELD_OUT]
    flags += ["--dtype", "float32", "--out", out]
    words = [Path(sys.executable).with_name("vllm-dflash"), "refresh", SETTINGS, *flags]
    hook = log.with_suffix(".hook")
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)
    env = {"PYTHONPATH": hook, "REFRESH_OUT": out, "REFRESH_KILLED_AT": killed_at}
    env |= {"REFRESH_FULL": "yes" if full else ""}
    with log.open("a") as file:
        process = subprocess.Popen(
            list(map(str, words)),
            stdout=file,
            stderr=file,
            env=engine_env({name: str(value) for name, value in env.items()}),
            start_new_session=True,
        )
        found: dict[str, Any] = {"status": None, "left": None}
        try:
            found["status"] = process.wait(SECONDS)
            wait_until_gone(process.pid, 60)  # its engines end with it
        except AssertionError as error:
            found["left"] = str(error)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return found


def serves(target: Path, drafter: Path) -> str:
    """The id of what a server has that is started with a drafter."""
    flags = ["--speculative-config", json.dumps({"method": "dflash", "model": str(drafter)})]
    flags += ["--middleware", "vllm_dflash.swap.endpoint.DrafterEndpoint"]
    flags += ["--worker-extension-cls", "vllm_dflash.swap.worker.DrafterSwap"]
    env = {"VLLM_DFLASH_SWAP_FROM": str(drafter.parent)}
    with server(*flags, env=env, model=target) as port:
        return str(which(port)["id"])


def run(out: Path, lines: Lines, kills: int, only: str) -> None:
    """Tries what is not in ``lines`` yet."""
    made = finetuned(out, STEPS)
    rows = (made / "prompts.jsonl").read_text().splitlines(keepends=True)
    (made / "few.jsonl").write_text("".join(rows[:120]))
    parts = {"stages": _stages, "swaps": _swaps, "disk": _full_disk, "mixture": _mixture}
    for name, part in parts.items():
        if only in name:
            part(out, made, lines, kills)


def _stages(out: Path, made: Path, lines: Lines, kills: int) -> None:
    folder, log = out / "killed", out / "killed.log"
    for stage, place in STAGES.items():
        if lines.of(case="stage", stage=stage):
            continue
        with told(f"a refresh that is killed at: {stage}"):
            found = refresh(made, folder, log, BETTER, place)
            _note(lines, made, folder, case="stage", stage=stage, **found)
    if not lines.of(case="stage", stage="the next command"):
        with told("the next command"):
            # It ends what is left of the round, and is killed as it begins another.
            found = refresh(made, folder, log, BETTER, STAGES["traffic"])
            _note(lines, made, folder, case="stage", stage="the next command", **found)


def _note(lines: Lines, made: Path, folder: Path, **row: Any) -> None:
    """What a server has that is started now, and what it may have."""
    link, old = folder / "drafter", id_of_folder(DRAFTER)
    exported = sorted(folder.glob(f"{RUN}/drafter"))
    found = serves(made / "target", link if link.exists() else DRAFTER)
    new = id_of_folder(exported[0]) if exported else None
    said = {old: "old", new: "new"}.get(found, "neither")
    lines.add(**row, serves=said, id=found, old=old, new=new)
    about = ", ".join(f"{name} {value}" for name, value in row.items())
    print(f"  {about}: the server has {said} ({found})", flush=True)


def _swaps(out: Path, made: Path, lines: Lines, kills: int) -> None:
    """The server, its engine or its worker is killed at chance moments of a swap under load."""
    drafters, dice = two_drafters(out), random.Random(1)
    known = {id_of_folder(drafters / name): name for name in ("good", "noisy")}
    for turn in range(kills):
        victim, at = ("server", "engine", "worker")[turn % 3], dice.random()
        if lines.of(case="swap", turn=turn):
            continue
        with told(f"a server whose {victim} is killed in a swap"):
            with swappable(drafters, ends_itself=True) as port:
                pids, took = processes(port), _swap(port, "noisy")
                _swap(port, "good")
                asked = threading.Thread(target=_swap, args=(port, "noisy"), daemon=True)
                asked.start()
                time.sleep(at * took)
                os.kill(pids[victim], signal.SIGKILL)
                if victim == "server":  # vLLM's engine outlives it: a service manager ends that
                    os.kill(pids["engine"], signal.SIGKILL)
            with swappable(drafters) as port:
                found = which(port)["id"]
        said = known.get(found, "neither")
        row = {"victim": victim, "after_s": round(at * took, 3), "of_s": round(took, 3)}
        lines.add(case="swap", turn=turn, serves=said, id=found, **row)
        print(f"  {victim} killed {at * took:.2f} s into a swap: then {said}", flush=True)


def _swap(port: int, name: str) -> float:
    """The seconds that it took; whoever is asked may be gone."""
    began = time.monotonic()
    with suppress(Exception):
        request(port, PATH, {"drafter": name})
    return time.monotonic() - began


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[bool]:
    """A tmpfs at ``folder``; False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_mount():  # what was killed here has left it
        subprocess.run(["umount", "-l", str(folder)], check=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _full_disk(out: Path, made: Path, lines: Lines, kills: int) -> None:
    """A refresh on a disk with more and more room: it ends with a remedy, and goes on."""
    if lines.of(case="disk", free_mb=None):
        return
    log = out / "disk.log"
    with small_disk(out / "disk", 512) as mounted:
        folder = out / "disk" / "refreshed"
        if not mounted:
            shutil.rmtree(folder, ignore_errors=True)
        for free in (*(FREE_MB if mounted else FREE_MB[:1]), None):
            ballast = out / "disk" / "ballast"
            if mounted:
                _fill(ballast, free)
            before = log.stat().st_size if log.exists() else 0
            with told(f"a refresh with {free} MB of room"):
                found = refresh(made, folder, log, SHORT, full=not mounted and free is not None)
                text = log.read_bytes()[before:].decode(errors="replace")
                remedy, broke = "free some space" in text, "Traceback (most recent" in text
                row = {"free_mb": free, "remedy": remedy, "traceback": broke} | found
                _note(lines, made, folder, case="disk", mounted=mounted, **row)
            if found["status"] in (0, 3) and free is not None:  # so much is room enough
                lines.add(case="disk", free_mb=None, skipped=True)
                return


def _fill(ballast: Path, free_mb: float | None) -> None:
    """Leaves so much of a disk; all, where it is None."""
    ballast.unlink(missing_ok=True)
    if free_mb is not None:
        room = shutil.disk_usage(ballast.parent).free - int(free_mb * 2**20)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, room))


def _mixture(out: Path, made: Path, lines: Lines, kills: int) -> None:
    """A drafter of two others' tensors: its id is neither's."""
    if lines.of(case="mixture"):
        return
    drafters = two_drafters(out)
    mixed = mixture(drafters / "good", drafters / "noisy", out / "mixture")
    known = {id_of_folder(drafters / name): name for name in ("good", "noisy")}
    found = serves(made / "target", mixed)
    lines.add(case="mixture", id=found, serves=known.get(found, "neither"))
    print(f"  a mixture is served: its id {found} is that of {known.get(found, 'neither')}")


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What holds."""
    stages, swaps, disk, mixed = (
        [row for row in rows if row["case"] == case]
        for case in ("stage", "swap", "disk", "mixture")
    )
    found = []
    if stages:
        wrong = [row["stage"] for row in stages if row["serves"] == "neither"]
        found.append(
            none_of(
                "kills of a refresh, after which neither serves", len(wrong), len(stages), wrong
            )
        )
        alive = [row["stage"] for row in stages if row["status"] != -signal.SIGKILL]
        found.append(none_of("stages were not reached", len(alive), len(stages), alive))
        left = [row["stage"] for row in stages if row["left"]]
        found.append(none_of("kills leave a process running", len(left), len(stages), left))
        last = [row["serves"] for row in stages if row["stage"] == "the next command"]
        state = OPEN if not last else HOLDS if last == ["new"] else FAILS
        found.append(f"{state} the round that was killed {len(STAGES)} times ends with the new one")
    if swaps:
        wrong = [row["turn"] for row in swaps if row["serves"] != "good"]
        what = "servers killed in a swap have not their command line's drafter after a restart"
        found.append(none_of(what, len(wrong), len(swaps), wrong))
    if disk:
        own = [row for row in disk if not row.get("skipped")]
        full = [row for row in own if row["status"] not in (0, 3)]
        silent = [row["free_mb"] for row in full if not row["remedy"] or row["traceback"]]
        what = "refreshes on a full disk end without the remedy, or with a traceback"
        found.append(none_of(what, len(silent), len(full), silent))
        wrong = [row["free_mb"] for row in own if row["serves"] == "neither"]
        found.append(none_of("of them leave neither drafter", len(wrong), len(own), wrong))
        ended = [row["status"] for row in own if row["status"] in (0, 3)]
        found.append(f"{HOLDS if ended else OPEN} with room it goes on, and ends with {ended}")
    if mixed:
        state = HOLDS if mixed[0]["serves"] == "neither" else FAILS
        found.append(f"{state} a mixture has an id of its own: {mixed[0]['id']}")
    return found
