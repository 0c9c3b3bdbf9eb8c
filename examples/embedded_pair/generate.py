"""Makes the drafter's training data: prompts from the training files, continued greedily by the target itself.

Stage two of three (see ``make.sh`` beside this file). All prompts have the same length and so have all responses, so
that waves of one batch start and end together. It runs vLLM's offline engine: on two cores that gave 1,296 tokens/s
where a Hugging Face loop with a static cache gave 196 (256 sequences, one thread each, on a machine busy with other work).

    python examples/embedded_pair/generate.py --target /tmp/pair/target --out /tmp/pair/data.npz --sequences 8192
    python examples/embedded_pair/generate.py --target /tmp/pair/target --prompts prompts.jsonl     # held-out prompts
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from corpus import read_files
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

_WAVE = 256
"""Sequences that run at once."""


def cut_prompts(tokenizer: PreTrainedTokenizerFast, held_out: bool, count: int, length: int, seed: int = 0) -> np.ndarray:
    """``count`` prompts int16 [count, length], each from the start of a random line of a random file of one split."""
    rng = np.random.default_rng(seed)
    texts = [text for _, text in read_files(held_out)]
    prompts = []
    while len(prompts) < count:
        text = texts[rng.integers(len(texts))]
        start = text.find("\n", rng.integers(len(text))) + 1
        # No token of this vocabulary holds more than a dozen characters on average, so this is text enough.
        ids = tokenizer(text[start : start + 12 * length])["input_ids"][:length]
        # A prompt must survive being sent as text, and be no run of blank or repeated lines.
        if len(ids) == length and len(set(ids)) >= length // 4 and tokenizer(tokenizer.decode(ids))["input_ids"] == ids:
            prompts.append(ids)
    return np.array(prompts, np.int16)


def write_held_out(tokenizer: PreTrainedTokenizerFast, path: Path, count: int, length: int) -> None:
    """Writes ``count`` prompts of the held-out files as JSON lines, {"prompt": text}; the same at every run."""
    rows = cut_prompts(tokenizer, True, count, length)
    path.write_text("".join(json.dumps({"prompt": tokenizer.decode(row.tolist())}) + "\n" for row in rows))
    print(f"{count} held-out prompts in {path}")


def generate(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
    """Continues the prompts greedily and writes ``prompts`` int16 [N, P], ``responses`` int16 [N, R] and settings."""
    # In this process: a second one would only copy every request on two cores.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    prompts = cut_prompts(tokenizer, False, args.sequences, args.prompt_tokens)
    llm = LLM(
        args.target, dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=_WAVE, kv_cache_memory_bytes=1 << 30,
        max_num_batched_tokens=_WAVE * args.prompt_tokens, skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    # After an end token the target goes on with another file, as it was trained to: every response has full length.
    params = SamplingParams(temperature=0, max_tokens=args.response_tokens, ignore_eos=True, detokenize=False)
    responses, start = [], time.time()
    for at in tqdm(range(0, len(prompts), _WAVE), desc="generate"):
        wave = [{"prompt_token_ids": row.tolist()} for row in prompts[at : at + _WAVE]]
        responses += [out.outputs[0].token_ids for out in llm.generate(wave, params, use_tqdm=False)]
        if args.minutes and time.time() - start > args.minutes * 60:
            break
    made = np.array(responses, np.int16)
    seconds = time.time() - start
    settings = {"sequences": len(made), "tokens_per_second": round(made.size / seconds), "seconds": round(seconds), "temperature": 0}
    np.savez(args.out, prompts=prompts[: len(made)], responses=made, settings=json.dumps(settings))
    print(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder of the target and its tokenizer")
    parser.add_argument("--out", help=".npz file for the training sequences")
    parser.add_argument("--sequences", type=int, default=8192, help="training sequences (default: 8192)")
    parser.add_argument("--minutes", type=float, help="stop after the wave that passes this budget (default: none)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens a prompt (default: 64)")
    parser.add_argument("--response-tokens", type=int, default=192, help="tokens a response (default: 192)")
    parser.add_argument("--prompts", help="write held-out prompts to this .jsonl file instead")
    parser.add_argument("--prompts-count", type=int, default=128, help="held-out prompts (default: 128)")
    args = parser.parse_args()
    if not args.out and not args.prompts:
        parser.error("give --out for training sequences, --prompts for held-out prompts, or both")
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    if args.prompts:
        write_held_out(tokenizer, Path(args.prompts), args.prompts_count, args.prompt_tokens)
    if args.out:
        generate(args, tokenizer)


if __name__ == "__main__":
    main()
