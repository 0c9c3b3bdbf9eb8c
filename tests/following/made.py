"""What the parts are made of, kept in OUT: two drafters, a fine-tuned target, a quantized one."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.harness import ROOT
from engine.test_swap import make_drafters
from quantized import quantize_target

SETTINGS = ROOT / "examples" / "follow" / "refresh.toml"


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, made where it is not there: whole, or not."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as new:
            make(Path(new, path.name))
            Path(new, path.name).rename(path)
    return path


def two_drafters(out: Path) -> Path:
    """A folder with ``good`` and ``noisy``, and some that are refused."""
    return once(out / "drafters", make_drafters)


def finetuned(out: Path, steps: int) -> Path:
    """A folder with the embedded target after a merged LoRA, and prompts of what it learned."""
    script = ROOT / "examples" / "follow" / "finetune.py"

    def make(folder: Path) -> None:
        print(f"fine-tuning the target, {steps} steps", flush=True)
        command = [sys.executable, str(script), "--out", str(folder), "--steps", str(steps)]
        subprocess.run(command, check=True)

    return once(out / f"finetuned-{steps}", make)


def int8(target: Path, folder: Path) -> Path:
    """The target with its layers in 8 bits."""
    return once(folder, lambda new: quantize_target(target, new))


def mixture(first: Path, second: Path, folder: Path) -> Path:
    """A drafter that has every other tensor of the second."""
    from safetensors.torch import load_file, save_file

    def make(new: Path) -> None:
        shutil.copytree(first, new)
        tensors, other = (load_file(each / "model.safetensors") for each in (first, second))
        tensors |= {name: other[name] for name in sorted(tensors)[::2]}
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        for note in ("training.json", "refresh.json"):
            (new / note).unlink(missing_ok=True)

    return once(folder, make)
