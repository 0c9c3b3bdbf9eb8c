"""What the five programs of this folder share: their flags, their clock, their record in JSON, and
the engines that they start.

A program asks ``Run.figure`` for one figure after the other. Each is written as soon as it is
there, so that a run that is cut off has left its figures, and the same command goes on with those
that are missing. At the end of ``--minutes`` engines are ended and what is left is noted as left
out.

    pytest tests/unit/test_gpu_programs.py
"""

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from gpu import here, shapes
from gpu.here import RefusedError, versions
from gpu.starting import Engines, Spec, Starter

RAN, FAILED, LEFT_OUT = "ran", "failed", "left out"
ENDED, DID_NOT_PASS, REFUSED, UNFINISHED = range(4)
"""Exit statuses: all figures are there and pass; one failed or does not pass; nothing was run;
figures were left out."""


class LeftOutError(RuntimeError):
    """A figure cannot be had here, and nothing is wrong; the message says why."""


def parser(
    doc: str | None, name: str, figures: str, shape: str | None = None
) -> argparse.ArgumentParser:
    """The flags that all five have.

    Args:
        doc: the program's own text, which ``--help`` shows.
        name: the program's, and its file's.
        figures: what its figures are named like.
        shape: the target's for which a program makes up weights, where another one may be given.
    """
    made = argparse.ArgumentParser(
        prog=f"python tests/gpu/{name}.py",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"OUT/{name}-VERSION.json holds each figure as soon as it is there; the same command\n"
            "goes on with those that are missing. Exit status: 0 all there and passed, 1 one\n"
            "failed or did not pass, 2 refused, 3 the time was over. tests/gpu/README.md says\n"
            "what each program answers, and how vLLM gets to a machine without a network."
        ),
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "gpu-results"),
        help="folder of the figures (default: $OUT, or gpu-results)",
    )
    made.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vllm-dflash-gpu",
        help="folder of random pairs, caches, traces and the engines' logs: gigabytes, which"
        " nobody has to keep (default: %(default)s)",
    )
    made.add_argument(
        "--minutes",
        type=_minutes,
        default=9.5,
        help="after these all engines are ended (default: %(default)s)",
    )
    made.add_argument(
        "--tiny",
        action="store_true",
        help="the same code on a CPU, with a toy pair, on the V2 runner through Triton's"
        " interpreter: says whether the program works, and nothing about speed",
    )
    made.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help=f"figures with TEXT in their name, or one of several that | parts: {figures}",
    )
    made.add_argument(
        "--again", action="store_true", help="measure also those that the file already has"
    )
    if shape is not None:
        large = [name for name in shapes.TARGETS if name.startswith("qwen3")]
        made.add_argument("--shape", choices=large, default=shape, help="the target's shapes")
    return made


def _minutes(text: str) -> float:
    found = float(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: more than 0")
    return found


def begin(name: str, args: argparse.Namespace, **settings: Any) -> "Run":
    """A run with these flags; the program ends where there cannot be one."""
    if hasattr(args, "shape"):
        args.shape = settings["shape"] = "tiny" if args.tiny else args.shape
    try:
        return Run(name, args, here.check_here(tiny=args.tiny), **settings)
    except RefusedError as error:
        refuse(error)


class Run:
    """One run of a program: what it has, what it measures, and how long it may."""

    def __init__(
        self, name: str, args: argparse.Namespace, device: Mapping[str, Any], **settings: Any
    ) -> None:
        """Reads the figures that there are.

        Raises:
            RefusedError: they were measured with other ``settings``, or cannot be read.
        """
        self.args, self.device, self._began = args, device, time.monotonic()
        self._starter = Starter(tiny=args.tiny)
        found = versions()
        size = "-tiny" if args.tiny else ""
        self.path = args.out / f"{name}-{found['vllm']}{size}.json"
        self.work, self.dtype = args.work / f"{args.out.name}{size}", "bfloat16"
        if args.tiny:
            self.dtype = "float32"
        self.data: dict[str, Any] = {
            "program": name, "settings": settings, "runs": [], "engines": {}, "figures": {}
        }  # fmt: skip
        if self.path.is_file():
            self._read(settings)
        self.data["runs"].append(
            {
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": sys.argv,
                "device": dict(device),
                "versions": found,
            }
        )
        self.names: list[str] = []
        """Of the figures that this run was asked for."""
        self._timer = threading.Timer(60 * args.minutes, self._starter.end)
        self._timer.daemon = True
        self._timer.start()

    @property
    def is_over(self) -> bool:
        """Whether the time is: engines have been ended."""
        return self._starter.is_over

    def large_pair(self) -> shapes.Pair:
        """Of ``--shape``; weights of the tiny one only, as vLLM makes up the others."""
        shape, tiny = self.args.shape, self.args.tiny
        folder = self.work / "pairs" / shape
        return shapes.make_pair(shape, folder, dtype=self.dtype, weights=tiny)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self._began:4.0f} s] {text}", flush=True)

    def wants(self, *names: str) -> bool:
        """Whether any of these figures is to be measured in this run."""
        return any(self._is_asked(name) and not self._has(name) for name in names)

    def value(self, name: str) -> dict[str, Any] | None:
        """A figure that is there, of this run or one before."""
        found: dict[str, Any] | None = self.data["figures"].get(name)
        return found if found is not None and found["state"] == RAN else None

    def figure(
        self, name: str, measure: Callable[[], dict[str, Any]], *, made_of_others: bool = False
    ) -> dict[str, Any] | None:
        """One figure: measured unless it is there, written at once; None where there is none.

        Args:
            measure: returns the figure; with ``passed`` where there is a bound, and raises
                ``LeftOutError`` where it cannot be had here.
            made_of_others: it costs nothing, and is made anew as the others may be.
        """
        if not self._is_asked(name):
            return self.value(name)
        self.names.append(name)
        if self._has(name) and not made_of_others:
            self.say(f"{name}: there already")
            return self.value(name)
        if self.is_over and not made_of_others:
            return self._put(name, LEFT_OUT, {"why": "the time was over"})
        began = time.monotonic()
        try:
            found = measure()
        except LeftOutError as why:
            return self._put(name, LEFT_OUT, {"why": str(why)})
        except Exception as error:  # one figure less: the others are worth the lease
            if self.is_over:
                return self._put(name, LEFT_OUT, {"why": "the time was over"})
            said = "".join(traceback.format_exception(error))  # with the engine's log as a note
            return self._put(name, FAILED, {"why": str(error), "log": said})
        return self._put(name, RAN, found | {"seconds": round(time.monotonic() - began, 2)})

    @contextmanager
    def engines(self, specs: Sequence[Spec], *, gently: bool = False) -> Iterator[Engines]:
        """Starts engines side by side, and ends them: ``gently`` where they have something to put
        away."""
        if self.is_over or not specs:
            yield Engines({}, {})
            return
        self.say(f"starting {', '.join(spec.name for spec in specs)}")
        logs = self.work / "logs" / self.path.stem
        with self._starter.started(specs, logs, self._ready, gently=gently) as engines:
            yield engines

    def _ready(self, name: str, ready: Any) -> None:
        """What an engine says of itself, or why it did not start."""
        if isinstance(ready, Exception):
            self.say(f"{name} did not start: {ready}")
            return
        self.data["engines"][name] = ready
        self._write()
        self.say(f"{name} is ready after {ready['seconds']:.0f} s")
        if ready.get("profile"):
            self.say(f"{name} has measured its steps: {shown(ready['profile'])}")

    def keep(self, name: str, made: Any) -> None:
        """Keeps beside the figures what other figures are made of, in this run or a later one."""
        self._put_file(self._kept_path, json.dumps(self._read_kept() | {name: made}))

    def kept(self, name: str) -> Any:
        """What ``keep`` kept.

        Raises:
            RuntimeError: nothing.
        """
        found = self._read_kept()
        if name not in found:
            raise RuntimeError(f"{name} left nothing to compare with: see its own figure")
        return found[name]

    @property
    def _kept_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}-kept.json")

    def _read_kept(self) -> dict[str, Any]:
        return json.loads(self._kept_path.read_text()) if self._kept_path.is_file() else {}

    def finish(self) -> int:
        """Says what there is; the exit status."""
        self._timer.cancel()
        if not self.names:
            self.say(f"no figure has {self.args.only!r} in its name: --help has the names")
            return REFUSED
        states = [self.data["figures"][name] for name in self.names]
        count = {s: sum(f["state"] == s for f in states) for s in (RAN, FAILED, LEFT_OUT)}
        wrong = [n for n, f in zip(self.names, states) if f.get("passed") is False]
        self.say(
            f"{count[RAN]} figures, {len(wrong)} below their bound, {count[FAILED]} failed,"
            f" {count[LEFT_OUT]} left out: {self.path}"
        )
        if wrong or count[FAILED]:
            return DID_NOT_PASS
        return UNFINISHED if self.is_over and count[LEFT_OUT] else ENDED

    def _read(self, settings: Mapping[str, Any]) -> None:
        try:
            self.data = json.loads(self.path.read_text())
            before = self.data["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(f"{self.path} is no record of this program: {error}") from None
        if before != json.loads(json.dumps(settings)):
            raise RefusedError(
                f"{self.path} was measured with {before}, and this is {settings}: give another"
                " --out"
            )

    def _is_asked(self, name: str) -> bool:
        return any(text in name for text in self.args.only.split("|"))

    def _has(self, name: str) -> bool:
        return self.value(name) is not None and not (
            self.args.again and name not in self._measured_now()
        )

    def _measured_now(self) -> set[str]:
        run = len(self.data["runs"]) - 1
        return {n for n, f in self.data["figures"].items() if f.get("run") == run}

    def _put(self, name: str, state: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
        found = {"state": state, "run": len(self.data["runs"]) - 1, **values}
        self.data["figures"][name] = found
        self._write()
        short = {k: v for k, v in found.items() if isinstance(v, (int, float)) and k != "run"}
        text = "; ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                         for k, v in short.items())  # fmt: skip
        self.say(f"{name}: {text if state == RAN else state + ': ' + found['why']}")
        return found if state == RAN else None

    def _write(self) -> None:
        self._put_file(self.path, json.dumps(self.data, indent=1))

    @staticmethod
    def _put_file(path: Path, text: str) -> None:
        from vllm_dflash.files import put

        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, text + "\n")


def shown(profile: dict[str, Any]) -> str:
    """What an engine's steps were measured to take: milliseconds by rows, and what contexts add."""
    parts = []
    for whose in ("target", "draft"):
        rows = zip(profile["rows"][1:-1], profile[whose][1:-1], strict=True)
        parts.append(f"{whose} " + " ".join(f"{n:g}:{1000 * s:.3g}" for n, s in rows))
    more = (f"{name} {1e9 * profile[name]:.3g}" for name in ("read", "attend", "draft_attend"))
    return f"ms by rows, {', '.join(parts)}; ns a position, {', '.join(more)}"


def refuse(error: RefusedError) -> NoReturn:
    """Ends the program with what to do."""
    print(f"refused: {error}", file=sys.stderr)
    sys.exit(REFUSED)
