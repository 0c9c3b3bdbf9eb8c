"""A drafter that follows its target (docs/follow.md): the long proofs, by hand, on one machine with
nothing beside it.

    python tests/prove_follow.py --part soak --out /tmp/proof
    python tests/prove_follow.py --part curve --out /tmp/proof --minutes 15
    python tests/prove_follow.py --part kill --out /tmp/proof --only stages

Parts, and about how many minutes they take on two cores:
  soak       mixed traffic on a real server (float32), --minutes long, a swap every --every seconds
             between two drafters, with the controller off and on: no request fails, no greedy
             answer differs from the one of a server without a drafter, resident memory does not
             grow, and tau after each swap is, on the same requests and within 3 %, that of a
             server which was started with the drafter          (2 x --minutes + 14, so 74 with 30)
  curve      the target learns another kind of text (LoRA, merged): tau of its drafter before,
             after, and as a refresh of --minutes goes on; half of what was lost has to be back, by
             the whole of its interval. Writes curve-15.csv, .json and .png; follow_plot.py takes
             the .json into docs/follow.md                                      (--minutes + 10)
  quantized  the same with the fine-tuned target's layers in 8 bits             (--minutes + 5)
  kill       kill -9 of a refresh in each of its stages, of a server in its swaps, and a full disk:
             the old or the new drafter serves afterwards, never a mixture. --only takes a part of
             it: stages, swaps, disk, mixture                                               (20)
  ray        three replicas under load, one swap after the other of all of them, a bad one among
             them: none fails. Needs pip install 'vllm-dflash[ray]'                         (10)

A line is said every half minute. What was measured is a line of OUT/PART-....jsonl at once. The
same command goes on where it was interrupted, and without anything left to do it says what was
found. Ends with 0 where everything holds, 1 where something does not. What more of the same would
decide is `open`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from following.record import FAILS, Lines  # noqa: E402
from vllm_dflash.lock import hold  # noqa: E402

Said = Callable[[], Sequence[str]]
CONTROLLER = {"off": (False,), "on": (True,), "both": (False, True)}


def soak(args: argparse.Namespace) -> Said:
    from following import soak

    lines = lines_of(args, f"{args.minutes:g}x{args.every:g}")
    settings = CONTROLLER[args.controller]
    soak.run(args.out, lines, args.minutes, args.every, settings)
    return lambda: soak.verdicts(lines.rows, settings)


def curve(args: argparse.Namespace) -> Said:
    from following import curve

    lines, quantized = lines_of(args, f"{args.minutes:g}"), args.part == "quantized"
    curve.run(args.out, lines, args.minutes, args.steps, args.held_out, quantized)
    curve.write(lines.rows, lines.path)
    return lambda: curve.verdicts(lines.rows)


def kill(args: argparse.Namespace) -> Said:
    from following import kill

    lines = lines_of(args, "")
    kill.run(args.out, lines, args.kills, args.only)
    return lambda: kill.verdicts(lines.rows)


def ray(args: argparse.Namespace) -> Said:
    from following import rolling

    lines = lines_of(args, "")
    rolling.run(args.out, lines, args.swaps)
    return lambda: rolling.verdicts(lines.rows)


def lines_of(args: argparse.Namespace, what: str) -> Lines:
    """Of a part with these numbers: others have a file of their own."""
    return Lines(args.out / f"{'-'.join(filter(None, (args.part, what)))}.jsonl")


PARTS = {"soak": soak, "curve": curve, "quantized": curve, "kill": kill, "ray": ray}
MINUTES = {"soak": 30.0, "curve": 15.0, "quantized": 15.0}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of lines and models")
    parser.add_argument(
        "--minutes", type=float, help="soak: of swaps (30); curve, quantized: of the refresh (15)"
    )
    parser.add_argument(
        "--every", type=float, default=60.0, metavar="S", help="soak: between two swaps (60)"
    )
    parser.add_argument(
        "--controller", choices=CONTROLLER, default="both", help="soak: adaptive drafting (both)"
    )
    parser.add_argument(
        "--steps", type=int, default=240, help="curve, quantized: of the fine-tuning (240)"
    )
    parser.add_argument(
        "--held-out", type=int, default=128, metavar="N", help="curve, quantized: prompts (128)"
    )
    parser.add_argument("--kills", type=int, default=9, help="kill: of servers in a swap (9)")
    parser.add_argument("--only", default="", help="kill: cases with this in their name")
    parser.add_argument("--swaps", type=int, default=9, help="ray: one after the other (9)")
    args = parser.parse_args()
    if args.minutes is not None and args.part not in MINUTES:
        parser.error(f"--part {args.part} takes no --minutes: leave it out")
    args.minutes = args.minutes or MINUTES.get(args.part)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with hold(args.out, "prove_follow.py"):
        found = PARTS[args.part](args)()
    print("\n".join(["", f"{args.part}, {(time.monotonic() - began) / 60:.1f} minutes:", *found]))
    failed = sum(line.startswith(FAILS) for line in found)
    print(f"{failed} do not hold" if failed else "everything holds or is open")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
