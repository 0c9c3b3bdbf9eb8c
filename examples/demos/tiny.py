"""The demo on the embedded pair: held-out prompts, one request at a time, without and with the
drafter, in turn; then a completion over HTTP.

    .venv/bin/python examples/demo.py --pair tiny --prompts 16 --rounds 5
"""

import argparse
import json
import statistics
import time
from typing import Any

from . import engines, server
from .choice import EXAMPLES, Pair
from .ports import free_port

DEFAULTS = {"prompts": 12, "tokens": 128, "rounds": 3, "speculative_tokens": 7}
PROMPTS = EXAMPLES / "embedded_pair" / "prompts.jsonl"


def run(pair: Pair, args: argparse.Namespace) -> int:
    """Both parts; the exit status."""
    args = argparse.Namespace(
        **vars(args) | {n: getattr(args, n) or default for n, default in DEFAULTS.items()}
    )
    compare(pair, args)
    if not args.no_serve:
        serve(pair, args)
    return 0


def compare(pair: Pair, args: argparse.Namespace) -> None:
    """Part one: the same prompts, plain and with the drafter, in turn; prints text, speed, tau and
    whether outputs agree."""
    from tqdm import tqdm
    from vllm import SamplingParams

    prompts = [json.loads(line)["prompt"] for line in lines()[: args.prompts]]
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    bar = tqdm(total=2 + (args.rounds * 2 + 2) * len(prompts), desc="loading", unit=" prompts")
    drafted = engines.speculative_config(pair.drafter, args.speculative_tokens)
    llms = {}
    for name, speculative in (("plain", None), ("dflash", drafted)):
        llms[name] = engines.engine(pair.target, speculative, adaptive=False)
        bar.update()
    seconds: dict[str, list[float]] = {name: [] for name in llms}
    outputs: dict[str, list[Any]] = {}
    # Round 0 warms up; the two take turns within a round, so that a machine that slows down slows
    # down both.
    for round_ in range(args.rounds + 1):
        for name, llm in llms.items():
            bar.set_description(
                f"{name}, {'warming up' if round_ == 0 else f'round {round_} of {args.rounds}'}"
            )
            start, outputs[name] = time.perf_counter(), []
            for prompt in prompts:
                outputs[name] += llm.generate([prompt], params, use_tqdm=False)
                bar.update()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    bar.close()
    report(args, prompts, outputs, seconds, engines.counters(llms["dflash"]))


def lines() -> list[str]:
    """Of the file of held-out prompts."""
    return PROMPTS.read_text().splitlines()


def report(
    args: argparse.Namespace,
    prompts: list[str],
    outputs: dict[str, list[Any]],
    seconds: dict[str, list[float]],
    counters: dict[str, Any],
) -> None:
    """Prints what part one measured."""
    total = sum(len(o.outputs[0].token_ids) for o in outputs["plain"])
    ratios = [p / d for p, d in zip(seconds["plain"], seconds["dflash"], strict=True)]
    same = sum(
        p.outputs[0].token_ids == d.outputs[0].token_ids
        for p, d in zip(outputs["plain"], outputs["dflash"], strict=True)
    )
    drafts = counters["num_drafts"]
    print("\nA held-out prompt, and what the target writes after it:\n")
    text = prompts[0] + "\033[1m" + outputs["dflash"][0].outputs[0].text + "\033[0m"
    print("    " + text.replace("\n", "\n    "))
    print(
        f"\n{len(prompts)} held-out prompts x {args.tokens} tokens, one request at a time, float32,"
        f" greedy, median of {args.rounds} rounds:"
    )
    for name in ("plain", "dflash"):
        print(f"  {name:7} {total / statistics.median(seconds[name]):7.1f} tokens/s")
    print(
        f"  ratio   {statistics.median(ratios):7.2f} x     (rounds:"
        f" {', '.join(f'{r:.2f}' for r in ratios)})"
    )
    print(
        f"  tau     {1 + counters['num_accepted_tokens'] / drafts:7.2f} tokens per target forward,"
        f" of at most {args.speculative_tokens + 1}"
    )
    print(
        "  accepted at position "
        + "  ".join(
            f"{i + 1}: {n / drafts:.0%}"
            for i, n in enumerate(counters["num_accepted_tokens_per_pos"])
        )
    )
    print(f"  outputs identical: {same} of {len(prompts)}")
    if same != len(prompts):
        raise SystemExit(
            "outputs differ: speculation must be lossless in float32; please report this with the"
            " versions that `vllm-dflash status` prints"
        )
    if args.at_least and statistics.median(ratios) < args.at_least:
        raise SystemExit(f"the ratio is below {args.at_least}")


def serve(pair: Pair, args: argparse.Namespace) -> None:
    """Part two: a real server with the flag, a completion over HTTP, and its acceptance from
    ``/metrics``."""
    port = free_port()
    speculative = engines.speculative_config(pair.drafter, args.speculative_tokens)
    command = server.command(str(pair.target), speculative, port)
    shown = [f"'{c}'" if c.startswith("{") else c for c in ["vllm", *command[1:]]]
    print(
        "\nNow as a server:\n\n    "
        + " ".join(shown).replace(str(EXAMPLES.parent) + "/", "")
        + "\n"
    )
    with server.running(command, port):
        prompt = json.loads(lines()[1])["prompt"]
        body = {"model": server.NAME, "prompt": prompt, "max_tokens": args.tokens, "temperature": 0}
        answer = json.loads(server.fetch(port, "/v1/completions", body))
        text = prompt + "\033[1m" + answer["choices"][0]["text"] + "\033[0m"
        print("    " + text.replace("\n", "\n    "))
        drafts, accepted = server.drafts(port)
        print(
            f"\n  {answer['usage']['completion_tokens']} tokens in {drafts:.0f} drafts: tau"
            f" {1 + accepted / drafts:.2f}"
        )
