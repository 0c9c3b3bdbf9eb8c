"""The training log: a JSON line an entry, TensorBoard events where its library is installed, and a
plot of both curves.

A resumed run first drops entries past its checkpoint, so the log is that of an undisturbed one.
Tests: ``pytest tests/unit/test_train_resume.py``.
"""

import json
import os
from pathlib import Path
from typing import Any

from vllm_dflash.files import disk_refusals, refusal, whole_file
from vllm_dflash.records import AtLeast, misfit


class Log:
    """Appends entries that have a step."""

    def __init__(self, folder: Path, resumed_at: int, steps: int) -> None:
        """Keeps what was written before the checkpoint of ``resumed_at``; the measurement after the
        last of ``steps`` comes after it."""
        self.path = folder / "log.jsonl"
        kept = [
            e
            for e in read(self.path)
            if e["step"] <= resumed_at and not (e["step"] == steps and "held_out_tau" in e)
        ]
        with whole_file(self.path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self.board = _tensorboard(folder / "tensorboard", resumed_at)

    def write(self, step: int, **values: Any) -> None:
        """One entry; numbers become curves.

        Raises:
            RunError: as ``disk_refusals``.
        """
        with disk_refusals(self.path), open(self.path, "a", opener=_unlinked) as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _unlinked(path: str, flags: int) -> int:
    """An opener that follows no link: the log is made anew when it begins."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read(path: Path) -> list[dict[str, Any]]:
    """The entries; a line that is none, such as a last one that a kill has cut, is left out.

    Raises:
        RunError: something else is in the log's place.
    """
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise refusal(path, error) from None
    lines = [line for line in raw.split(b"\n") if line.strip()]
    entries = [entry for line in lines if (entry := _entry(line)) is not None]
    if len(entries) < len(lines):
        print(
            f"{path}: {len(lines) - len(entries)} of {len(lines)} lines are no entries of a log,"
            " and are left out"
        )
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """A step, and numbers or null."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    good = misfit(found, {"step": AtLeast(int, 0)}) is None and all(
        misfit(value, (float, None)) is None for value in found.values()
    )
    return found if good else None


def plot(log: Path, out: Path) -> bool:
    """Draws loss and tau over the steps as SVG; false where matplotlib is not installed."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return False
    entries = read(log)
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "vllm-dflash",
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
        }
    ):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        loss, tau = figure.subplots(1, 2)
        _curve(loss, entries, "loss", "training loss", "C0")
        _curve(tau, entries, "train_tau", "training text, all places", "C0")
        _curve(tau, entries, "held_out_tau_everywhere", "held-out text, all places", "C2")
        _curve(tau, entries, "held_out_tau", "held-out text, as decoded", "C1")
        for axes, title in ((loss, "loss"), (tau, "tau, tokens a target step")):
            axes.set_title(title)
            axes.set_xlabel("step")
            if axes.lines:
                axes.legend(frameon=False)
        with whole_file(out) as file:
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return True


def _curve(axes: Any, entries: list[dict[str, Any]], name: str, label: str, color: str) -> None:
    points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            label=label,
            color=color,
            marker="." if len(points) < 30 else "",
        )


def _tensorboard(folder: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "tensorboard is not installed, so log.jsonl is the only log: pip install"
            " 'vllm-dflash[train]' has it"
        )
        return None
    return SummaryWriter(str(folder), purge_step=resumed_at + 1)
