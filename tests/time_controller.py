"""What the controller's Python takes in a step that drafts, beside another version of it: a
simulated large GPU, drafts with confidences, all calls of ``plan``, ``observe`` and ``lengths``.

Each version runs in a process of its own, in turns; medians of the rounds. A version is a folder
that holds the repository, as ``git worktree add /tmp/before b83a7f8`` makes one.

    python tests/time_controller.py --tree /tmp/before
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
REQUESTS = (1, 8, 32, 128)
STEPS = 1500
RATES = [0.93, 0.9, 0.88, 0.85, 0.82, 0.8, 0.78]


def timed(tree: Path) -> dict[int, float]:
    """Microseconds a step by requests, of the version in ``tree``, which this process imports."""
    sys.path[:0] = [str(tree), str(tree / "tests")]
    from simulation import Server, large_gpu  # type: ignore[import-not-found]
    from vllm_dflash.adaptive.controller import Controller

    spent, inside = 0.0, False

    def clocked(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent, inside
            if inside:
                return method(*args, **kwargs)
            # The simulation's seconds may be NumPy's, an engine's are Python's.
            args = tuple(float(x) if type(x).__name__ == "float64" else x for x in args)
            began, inside = time.perf_counter(), True
            try:
                return method(*args, **kwargs)
            finally:
                spent, inside = spent + time.perf_counter() - began, False

        return call

    for name in ("observe", "plan", "lengths"):
        setattr(Controller, name, clocked(getattr(Controller, name)))
    found = {}
    for count in REQUESTS:
        spent = 0.0
        batch = dict.fromkeys((f"r{i}" for i in range(count)), RATES)
        Server(large_gpu, spread=0.5, confident=True).adaptive([batch] * STEPS)
        found[count] = spent / STEPS * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, help="the other version's folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(timed(args.only)))
        return
    trees = [tree for tree in (args.tree, HERE) if tree]
    rounds: dict[Path, list[dict[str, float]]] = {tree: [] for tree in trees}
    for done in range(args.rounds):
        for tree in trees:
            command = [sys.executable, __file__, "--only", str(tree)]
            rounds[tree].append(json.loads(subprocess.check_output(command, text=True)))
        print(f"round {done + 1} of {args.rounds}", file=sys.stderr, flush=True)
    print("| requests | " + " | ".join(str(tree) for tree in trees) + " | ratio |")
    print("|" + "---|" * (len(trees) + 2))
    for count in REQUESTS:
        took = [statistics.median(each[str(count)] for each in rounds[tree]) for tree in trees]
        cells = [f"{each:.1f} us" for each in took] + [f"{took[-1] / took[0]:.2f}"]
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
