"""Plain decoding, vLLM's own dflash and this package on the same checkpoint, in one run: step time,
tau, throughput.

    .venv/bin/python examples/side_by_side.py --batch 1 8 --rounds 3

Each method has an engine in a process of its own; the methods take turns within a round, so that a
machine that slows down slows down all, and the process that waits uses no processor. Medians over
the rounds; a step is one target forward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

PAIR = Path(__file__).resolve().parent / "embedded_pair"
METHODS = {"plain": {}, "native": {"VLLM_DFLASH": "0"}, "ours": {"VLLM_DFLASH": "1"}}
"""Method to what its process has in the environment."""


class Engine:
    """A child process with one engine; commands and answers are JSON lines."""

    def __init__(self, method: str, args: argparse.Namespace) -> None:
        env = (
            os.environ
            | METHODS[method]
            | {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_LOGGING_LEVEL": "ERROR",
            }
        )
        speculative = (
            {}
            if method == "plain"
            else {
                "method": "dflash",
                "model": str(args.drafter),
                "num_speculative_tokens": args.speculative_tokens,
            }
        )
        settings = {
            "target": str(args.target),
            "dtype": args.dtype,
            "speculative": speculative,
            "batch": max(args.batch),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--engine", json.dumps(settings)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(
            f"an engine ended with status {self.process.wait()}; its own words are above"
        )

    def run(self, prompts: list[str], batch: int, tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(
            json.dumps({"prompts": prompts, "batch": batch, "tokens": tokens}) + "\n"
        )
        self.process.stdin.flush()
        return self.answer()


def run_child(settings: dict[str, Any]) -> None:
    """The child's side: answers each command with seconds, steps, tokens, drafts and accepted
    tokens."""
    from vllm import LLM, SamplingParams

    speculative = {"speculative_config": settings["speculative"]} if settings["speculative"] else {}
    speculative["additional_config"] = {
        "dflash": {"adaptive": False}
    }  # whole drafts, as vLLM's own
    llm = LLM(
        settings["target"],
        dtype=settings["dtype"],
        enforce_eager=True,
        max_num_seqs=settings["batch"],
        max_model_len=1024,
        use_tqdm_on_load=False,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=False,
        generation_config="vllm",
        enable_prefix_caching=False,
        **speculative,
    )
    steps = 0
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    execute = model.execute_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return execute(*args, **kwargs)

    model.execute_model = counted
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
        before, steps, start, tokens = counters(llm), 0, time.perf_counter(), 0
        for at in range(0, len(job["prompts"]), job["batch"]):
            outputs = llm.generate(job["prompts"][at : at + job["batch"]], params, use_tqdm=False)
            tokens += sum(len(o.outputs[0].token_ids) for o in outputs)
        seconds, after = time.perf_counter() - start, counters(llm)
        delta = {name: after[name] - before[name] for name in after}
        print(
            json.dumps({"seconds": seconds, "steps": steps, "tokens": tokens, **delta}), flush=True
        )


def counters(llm: Any) -> dict[str, int]:
    metrics = {m.name: m for m in llm.get_metrics()}
    names = {
        "drafts": "vllm:spec_decode_num_drafts",
        "accepted": "vllm:spec_decode_num_accepted_tokens",
    }
    return {key: metrics[name].value for key, name in names.items() if name in metrics}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a batch size and method: medians over the rounds, and ratios taken within each
    round."""
    prompts = [
        json.loads(line)["prompt"]
        for line in args.prompts.read_text().strip().split("\n")[: args.count]
    ]
    engines = {method: Engine(method, args) for method in tqdm(METHODS, desc="starting engines")}
    rows = []
    bar = tqdm(total=len(args.batch) * (args.rounds + 1) * len(engines), desc="rounds")
    for batch in args.batch:
        results: dict[str, list[dict[str, Any]]] = {method: [] for method in engines}
        for round_ in range(args.rounds + 1):
            for method, engine in engines.items():
                result = engine.run(prompts, batch, args.tokens)
                bar.update()
                if round_:  # round 0 warms up
                    results[method].append(result)
        for method, runs in results.items():
            drafts = sum(r.get("drafts", 0) for r in runs)
            against = {
                other: statistics.median(
                    o["seconds"] / r["seconds"] for o, r in zip(results[other], runs, strict=True)
                )
                for other in engines
            }
            rows.append(
                {
                    "batch": batch,
                    "method": method,
                    "step_ms": statistics.median(1000 * r["seconds"] / r["steps"] for r in runs),
                    "tokens_per_second": statistics.median(
                        r["tokens"] / r["seconds"] for r in runs
                    ),
                    "tau": 1 + sum(r["accepted"] for r in runs) / drafts if drafts else 1.0,
                    "speed_up_over": against,
                }
            )
    bar.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=PAIR / "target",
        help="the target's folder (default: the embedded one)",
    )
    parser.add_argument(
        "--drafter",
        type=Path,
        default=PAIR / "dflash",
        help="the drafter's folder (default: the embedded one)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PAIR / "prompts.jsonl",
        help='JSON lines {"prompt": text} (default: the held-out ones)',
    )
    parser.add_argument("--count", type=int, default=16, help="prompts a round (default: 16)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="requests at a time (default: 1 8)"
    )
    parser.add_argument("--tokens", type=int, default=96, help="tokens a prompt (default: 96)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds to take medians of (default: 3)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    parser.add_argument(
        "--speculative-tokens", type=int, default=7, help="drafted tokens a step (default: 7)"
    )
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_child(args.engine)
        return
    print(
        f"{'batch':>5}  {'method':7} {'step, ms':>9} {'tau':>6} {'tokens/s':>9} {'x plain':>8}"
        f" {'x native':>9}"
    )
    for row in measure(args):
        ratio = row["speed_up_over"]
        print(
            f"{row['batch']:5}  {row['method']:7} {row['step_ms']:9.2f} {row['tau']:6.2f}"
            f" {row['tokens_per_second']:9.1f} {ratio['plain']:8.2f} {ratio['native']:9.2f}"
        )


if __name__ == "__main__":
    main()
