"""The long proofs of refreshes and swaps, by hand.

    .venv/bin/python tests/prove_follow.py soak --minutes 30    a swap a minute under mixed traffic
    .venv/bin/python tests/prove_follow.py context              tau after a swap, by --context
    .venv/bin/python tests/prove_follow.py curve --minutes 1,2,4,8,15    tau against minutes
    .venv/bin/python tests/prove_follow.py kill                 kill -9 of the server in its swaps

``soak`` compares each greedy answer with plain decoding's and prints tau of each minute beside the
mean of its drafter's, and the server's memory. ``curve`` fine-tunes the embedded target first
(examples/follow/finetune.py) and refreshes its drafter anew for each budget.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from engine.harness import DRAFTER, TARGET, held_out_prompts, run_engine  # noqa: E402
from engine.test_serve import request  # noqa: E402
from engine.test_swap import Clients, make_drafters, swappable, tau_since, which  # noqa: E402
from engine.test_swap import counts as drafts_of  # noqa: E402
from vllm_dflash.cli import main as command  # noqa: E402
from vllm_dflash.swap.turns import CONTEXTS, PATH  # noqa: E402
from vllm_dflash.weights.identity import id_of_folder  # noqa: E402


def listener(port: int) -> int:
    """The process that listens there."""
    for found in psutil.net_connections("tcp"):
        if found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN:
            assert found.pid is not None
            return found.pid
    raise RuntimeError(f"nobody listens on {port}")


def ask_for_swap(port: int) -> None:
    """Whose server may be killed meanwhile."""
    with contextlib.suppress(Exception):
        request(port, PATH, {"drafter": "noisy"})


def memory_mb(port: int) -> float:
    """Of all processes of the server that listens there."""
    first = psutil.Process(listener(port))
    total = 0
    for process in [first, *first.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def prove_soak(minutes: int, every: float, folder: Path) -> bool:
    drafters = make_drafters(folder)
    prompts = held_out_prompts(48)
    expected = run_engine(TARGET, None, prompts, max_tokens=96)[0].tokens
    ids = {name: id_of_folder(drafters / name) for name in ("good", "noisy")}
    taus: dict[str, list[float]] = {"good": [], "noisy": []}
    memory, good = [], True
    with swappable(drafters) as port, Clients(port, prompts, expected, mixed=True) as traffic:
        for turn in range(round(minutes * 60 / every)):
            name = ("noisy", "good")[turn % 2]
            began = time.monotonic()
            status = command(["swap", "--server", f"http://127.0.0.1:{port}", name])
            took = time.monotonic() - began
            good &= status == 0 and which(port)["id"] == ids[name]
            before = drafts_of(port)
            time.sleep(max(0.0, every - took))
            taus[name].append(tau_since(port, before))
            memory.append(memory_mb(port))
            print(
                f"{turn + 1}: {name} in {took:.2f} s, tau {taus[name][-1]:.3f},"
                f" {memory[-1]:.0f} MB, {traffic.greedy} greedy {traffic.sampled} sampled"
                f" {traffic.broken} broken off, {len(traffic.wrong)} wrong",
                flush=True,
            )
    for name, found in taus.items():
        mean = statistics.mean(found)
        apart = max(abs(tau - mean) / mean for tau in found)
        print(f"{name}: tau {mean:.3f}, the furthest {apart:.1%} from it")
        good &= apart <= 0.03
    third = max(1, len(memory) // 3)
    grown = statistics.mean(memory[-third:]) - statistics.mean(memory[third : 2 * third])
    print(f"memory {grown:+.1f} MB from the second third to the last; wrong: {traffic.wrong[:3]}")
    return good and not traffic.wrong


def prove_context(folder: Path) -> bool:
    """Long contexts of the noisy drafter, and tau of the seconds after the good one came."""
    drafters = make_drafters(folder)
    text = [*itertools.chain.from_iterable(held_out_prompts(12))]
    prompts = [text[100 * i : 100 * i + 320] for i in range(4)]
    expected = run_engine(TARGET, None, prompts, max_tokens=160)[0].tokens
    print("| context | tau in 3 s | 6 s | 9 s | 12 s |\n|---|---|---|---|---|")
    with swappable(drafters) as port, Clients(port, prompts, expected, mixed=True) as traffic:
        for context in (*CONTEXTS, *CONTEXTS):
            url = f"http://127.0.0.1:{port}"
            command(["swap", "--server", url, "noisy", "--context", "recompute"])
            time.sleep(12)
            command(["swap", "--server", url, "good", "--context", context])
            row = []
            for _ in range(4):
                before = drafts_of(port)
                time.sleep(3)
                row.append(f"{tau_since(port, before):.2f}")
            print(f"| {context} | {' | '.join(row)} |", flush=True)
    print(f"wrong: {traffic.wrong[:3]}")
    return not traffic.wrong


def prove_curve(minutes: list[float], folder: Path) -> bool:
    script = HERE.parent / "examples" / "follow" / "finetune.py"
    subprocess.run([sys.executable, str(script), "--out", str(folder)], check=True)
    toml = str(HERE.parent / "examples" / "follow" / "refresh.toml")
    rows = []
    for budget in minutes:
        out = folder / f"minutes-{budget:g}"
        flags = ["--target", str(folder / "target"), "--draft", str(DRAFTER), "--dtype", "float32"]
        flags += ["--prompts", str(folder / "prompts.jsonl"), "--held-out", "48"]
        command(["refresh", toml, *flags, "--minutes", str(budget), "--out", str(out)])
        note = json.loads((out / "drafter" / "refresh.json").read_text())
        rows.append((budget, note["tau_before"], note["tau"], note["half_interval"]))
    print("| minutes | tau before | after | +- |\n|---|---|---|---|")
    for row in rows:
        print("| {:g} | {:.2f} | {:.2f} | {:.2f} |".format(*row))
    return all(row[2] > row[1] for row in rows)


def prove_kill(folder: Path, times: int = 6) -> bool:
    """The server is killed at chance moments of a swap; what serves after a restart is told by its
    own id, and is one of the two."""
    drafters, dice, good = make_drafters(folder), random.Random(1), True
    known = {id_of_folder(drafters / name): name for name in ("good", "noisy")}
    for turn in range(times):
        with swappable(drafters, ends_itself=True) as port:
            swap = threading.Thread(target=ask_for_swap, args=(port,), daemon=True)
            swap.start()
            time.sleep(dice.random() * 0.6)
            os.kill(listener(port), signal.SIGKILL)
        with swappable(drafters) as port:
            found = which(port)["id"]
            print(f"{turn + 1}: after the restart {known.get(found, 'A MIXTURE')}", flush=True)
            good &= known.get(found) == "good"
    return good


def main() -> int:
    """The command; 0 where all held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("soak", "context", "curve", "kill"))
    parser.add_argument("--minutes", default=None, help="of soak; of curve a list")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between swaps")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="follow-"))
    try:
        if args.what == "soak":
            good = prove_soak(int(args.minutes or 30), args.every, folder)
        elif args.what == "context":
            good = prove_context(folder)
        elif args.what == "curve":
            budgets = [float(each) for each in (args.minutes or "1,2,4,8,15").split(",")]
            good = prove_curve(budgets, folder)
        else:
            good = prove_kill(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("all held" if good else "NOT all held")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
