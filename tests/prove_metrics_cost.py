"""What our metrics cost in a step: one server under load, its metrics switched off and on every few
steps, neighbours compared.

A window's median step is compared with the mean of those of the windows before and after it, as
steps grow with the contexts; all three have as many requests in every step. The figure is the
median of the differences, with an interval that holds the true one in 95 of 100 runs (bootstrap).
Traffic is ``vllm bench serve``'s, and /metrics is read once a second all the while.

    python tests/prove_metrics_cost.py --concurrency 8 --minutes 4
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from engine.harness import DRAFTER, TARGET  # noqa: E402
from engine.test_serve import request, server  # noqa: E402
from metrics_cost.metrics_cost import VARIABLE, WINDOW  # noqa: E402

SETTINGS = {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
LIMIT = 0.005


def load(port: int, concurrency: int, minutes: float) -> None:
    """Batches of requests of one length, so that as many run in every step but the first and last
    of a batch."""
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "bench",
        "serve",
        "--backend",
        "openai",
        "--base-url",
        f"http://127.0.0.1:{port}",
        "--model",
        "embedded",
        "--tokenizer",
        str(TARGET),
        "--dataset-name",
        "random",
        "--random-input-len",
        "32",
        "--random-output-len",
        "400",
        "--ignore-eos",
        "--num-prompts",
        str(40 * concurrency),
        "--max-concurrency",
        str(concurrency),
        "--temperature",
        "0",
    ]
    deadline = time.monotonic() + 60 * minutes
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while client.poll() is None and time.monotonic() < deadline:
            request(port, "/metrics")
            left = deadline - time.monotonic()
            sys.stderr.write(f"\r{left:4.0f} s left ")
            time.sleep(1)
    finally:
        client.kill()
        client.wait()


def pairs(lines: list[str]) -> list[tuple[float, float]]:
    """(seconds with, seconds without) of a window and its two neighbours, for windows of as many
    requests."""
    steps = [
        (on == "1", int(requests), float(seconds))
        for on, requests, seconds in map(str.split, lines)
    ]
    windows = [(on, list(group)) for on, group in groupby(steps, key=lambda step: step[0])]
    found = []
    for three in zip(windows, windows[1:], windows[2:], strict=False):
        together = [step for _, window in three for step in window]
        if (
            len(together) == 3 * WINDOW
            and len({requests for _, requests, _ in together}) == 1
            and together[0][1]
        ):
            before, here, after = (
                statistics.median(seconds for *_, seconds in window) for _, window in three
            )
            around = (before + after) / 2
            found.append((here, around) if three[1][0] else (around, here))
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95 of 100."""
    chosen = random.Random(0)
    medians = sorted(statistics.median(chosen.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[975]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--adaptive", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder, "steps.txt")
        path = os.pathsep.join(str(Path(__file__).parent / part) for part in ("", "metrics_cost"))
        flags = [
            "--speculative-config",
            json.dumps(SETTINGS),
            "--max-num-seqs",
            str(args.concurrency),
        ]
        if args.adaptive:
            flags += ["--additional-config", json.dumps({"dflash": {"adaptive": True}})]
        with server(
            *flags, env={VARIABLE: str(steps), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        ) as port:
            load(port, args.concurrency, args.minutes)
        found = pairs(steps.read_text().splitlines())
    if len(found) < 20:
        sys.exit(f"only {len(found)} pairs of windows: run for longer")
    differences = [with_ / without - 1 for with_, without in found]
    low, high = interval(differences)
    step = statistics.median(without for _, without in found)
    middle = statistics.median(differences)
    print(
        f"\n{args.concurrency} requests, {len(found)} windows of {WINDOW} steps, a step"
        f" {1000 * step:.2f} ms without metrics"
    )
    print(
        f"with metrics: {middle:+.2%} ({low:+.2%} to {high:+.2%}), {1e6 * middle * step:+.0f} us;"
        f" allowed {LIMIT:.1%}"
    )
    sys.exit(middle >= LIMIT)


if __name__ == "__main__":
    main()
