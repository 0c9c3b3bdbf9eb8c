"""Asks a server prompts, several at a time, and says what was accepted meanwhile. Standard library
only.

    python examples/follow/ask.py http://127.0.0.1:8000 prompts.jsonl --first 100
"""

import argparse
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", help="its address")
    parser.add_argument("prompts", type=Path, help="JSON lines with prompt_token_ids")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="skip so many lines")
    parser.add_argument("--count", type=int, default=64, help="prompts (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=96, help="of an answer (default: %(default)s)"
    )
    parser.add_argument("--at-once", type=int, default=4, help="requests (default: %(default)s)")
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="answers of full length, which a recorder leaves out: for measuring",
    )
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    rows = rows[args.first : args.first + args.count]
    before = counts(args.server)

    def ask(row: dict[str, list[int]]) -> None:
        body = {
            "model": "followed",
            "prompt": row["prompt_token_ids"],
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "ignore_eos": args.ignore_eos,
        }
        request = urllib.request.Request(
            f"{args.server}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            response.read()

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(ask, rows))
    drafts, accepted = (now - then for now, then in zip(counts(args.server), before))
    print(f"tau {1 + accepted / max(1, drafts):.2f} ({len(rows)} requests)")


def counts(server: str) -> tuple[float, float]:
    """Drafts, and their accepted tokens, since the server began."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    found = [
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))
        for name in (f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "accepted_tokens"))
    ]
    return found[0], found[1]


if __name__ == "__main__":
    main()
