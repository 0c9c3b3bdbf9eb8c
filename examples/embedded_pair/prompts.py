r"""Cuts the embedded pair's prompts from CPython's standard library: those to train on, and the
held-out ones of ``prompts.jsonl``.

Stage two of three (see ``make.sh`` beside this file). Every prompt is the start of a random line of
a random file, always of the same length.

    python examples/embedded_pair/prompts.py --target examples/embedded_pair/target \
        --out /tmp/train.jsonl --count 8192
    python examples/embedded_pair/prompts.py --target examples/embedded_pair/target \
        --out prompts.jsonl --count 128 --held-out
"""

import argparse
import json
from pathlib import Path

import numpy as np
from corpus import read_files
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def cut_prompts(
    tokenizer: PreTrainedTokenizerFast, held_out: bool, count: int, length: int, seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids from one split; the same at every run."""
    rng = np.random.default_rng(seed)
    texts = [text for _, text in read_files(held_out)]
    prompts: list[list[int]] = []
    while len(prompts) < count:
        text = texts[rng.integers(len(texts))]
        start = text.find("\n", rng.integers(len(text))) + 1
        # No token of this vocabulary holds more than a dozen characters on average, so this is text
        # enough.
        ids = tokenizer(text[start : start + 12 * length])["input_ids"][:length]
        # A prompt must survive being sent as text, and be no run of blank or repeated lines.
        if (
            len(ids) == length
            and len(set(ids)) >= length // 4
            and tokenizer(tokenizer.decode(ids))["input_ids"] == ids
        ):
            prompts.append(ids)
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder of the target and its tokenizer")
    parser.add_argument(
        "--out", type=Path, required=True, help='JSON lines to write, {"prompt": text}'
    )
    parser.add_argument("--count", type=int, default=8192, help="prompts (default: 8192)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a prompt (default: 64)")
    parser.add_argument(
        "--held-out", action="store_true", help="from the files that no training sees"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.target, trust_remote_code=False)
    rows = cut_prompts(tokenizer, args.held_out, args.count, args.tokens)
    args.out.write_text(
        "".join(json.dumps({"prompt": tokenizer.decode(row)}) + "\n" for row in rows)
    )
    print(f"{len(rows)} {'held-out ' if args.held_out else ''}prompts in {args.out}")


if __name__ == "__main__":
    main()
