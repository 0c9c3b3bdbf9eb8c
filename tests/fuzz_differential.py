"""Random requests of every parameter that vLLM's V1 engine takes: plain decoding against drafts,
float32, all of every answer.

An engine without a drafter gets each round of requests whole and at once. The other, with settings
drawn anew every few rounds (K, the controller or dice in its place, chunks, pages, prefix cache,
priorities, AsyncLLM, an engine core in its own process, a prefix cache that is dropped), gets them
as they arrive, aborts among them. Token ids, texts, finish and stop reasons, log-probabilities and
token counts have to be alike for greedy requests and for those with a seed; requests without one
are their neighbours. A difference that noise of at most 1e-4 on plain decoding's logits makes too
is a tie; every other is shrunk and printed with a command that shows it again. Ends with 1 if there
is one. What ends the engine without a drafter too is vLLM's own: it is said, and not drawn again.

    python tests/fuzz_differential.py --pair embedded --minutes 30 --seed 1
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing.draw import KNOWN
from fuzzing.fuzzer import METHODS, Fuzzer
from fuzzing.pairs import PAIRS
from fuzzing.tally import Tally


def _until(minutes: float, tally: Tally) -> Iterable[int]:
    """Round numbers until the time is over, with a bar."""
    from tqdm import tqdm

    end, number, total = time.monotonic() + minutes * 60, 0, round(minutes * 60)
    with tqdm(total=total, unit="s", desc="fuzz", mininterval=10) as bar:
        while (left := end - time.monotonic()) > 0:
            bar.update(round(total - left) - bar.n)
            bar.set_postfix(
                requests=tally.requests, ties=len(tally.ties), differences=len(tally.differences)
            )
            yield number
            number += 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=PAIRS, default="embedded")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--drafts", choices=METHODS, default="ours", help="who drafts (default: ours)"
    )
    parser.add_argument(
        "--include",
        choices=KNOWN,
        action="append",
        default=[],
        help="also draw what is known to be answered wrongly",
    )
    parser.add_argument("--replay", metavar="JSON", help="one case, as it was printed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fuzzer = Fuzzer(
            args.pair, PAIRS[args.pair](folder), folder, args.seed, args.drafts, args.include
        )
        try:
            if args.replay:
                case = json.loads(args.replay)
                fuzzer.start(case["common"], case["settings"])
                found = fuzzer.replay(case["requests"])
                print(
                    "\n".join(f"request {i}: {words}" for i, words in found.items())
                    or "no difference"
                )
                return bool(found)
            print(fuzzer.run(_until(args.minutes, fuzzer.tally)))
            return bool(fuzzer.tally.differences)
        finally:
            fuzzer.end()


if __name__ == "__main__":
    sys.exit(main())
