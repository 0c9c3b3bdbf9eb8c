"""Plain decoding against DFlash on the embedded pair, then the same through ``vllm serve``: the
whole thing in one command.

    make demo                                   # or: .venv/bin/python examples/demo.py
    python examples/demo.py --prompts 16 --rounds 5

Part one runs vLLM's ``LLM`` class on held-out prompts, one request at a time, without and with the
drafter, in turn, and compares speed and outputs. Part two starts a real server with
``--speculative-config`` and asks it over HTTP.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

PAIR = Path(__file__).resolve().parent / "embedded_pair"
COUNTERS = ("num_drafts", "num_accepted_tokens", "num_accepted_tokens_per_pos")
# One process: on two cores a second one costs more than it brings. Before vLLM is imported.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def engine(speculative_tokens: int) -> Any:
    """An engine for the embedded target in float32, with the drafter unless ``speculative_tokens``
    is 0."""
    from vllm import LLM

    speculative = {
        "method": "dflash",
        "model": str(PAIR / "dflash"),
        "num_speculative_tokens": speculative_tokens,
    }
    return LLM(
        str(PAIR / "target"),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=False,
        generation_config="vllm",
        use_tqdm_on_load=False,
        additional_config={"dflash": {"adaptive": False}},
        **({"speculative_config": speculative} if speculative_tokens else {}),
    )


def speculation_counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of drafts and accepted tokens."""
    values = {m.name.removeprefix("vllm:spec_decode_"): m for m in llm.get_metrics()}
    return {
        name: getattr(values[name], "value", getattr(values[name], "values", None))
        for name in COUNTERS
        if name in values
    }


def compare(args: argparse.Namespace) -> None:
    """Part one: the same prompts, plain and with the drafter, in turn; prints text, speed, tau and
    whether outputs agree."""
    os.environ.update(ENGINE_ENV)
    warnings.filterwarnings("ignore")
    from tqdm import tqdm
    from vllm import SamplingParams

    prompts = [
        json.loads(line)["prompt"]
        for line in (PAIR / "prompts.jsonl").read_text().splitlines()[: args.prompts]
    ]
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    bar = tqdm(total=2 + (args.rounds * 2 + 2) * len(prompts), desc="loading", unit=" prompts")
    engines = {}
    for name, tokens in (("plain", 0), ("dflash", args.speculative_tokens)):
        engines[name] = engine(tokens)
        bar.update()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    outputs: dict[str, list[Any]] = {}
    # Round 0 warms up; the two take turns within a round, so that a machine that slows down slows
    # down both.
    for round_ in range(args.rounds + 1):
        for name, llm in engines.items():
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
    report(args, prompts, outputs, seconds, speculation_counters(engines["dflash"]))


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


def serve(args: argparse.Namespace) -> None:
    """Part two: a real server with the flag, a completion over HTTP, and its acceptance from
    ``/metrics``."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    speculative = json.dumps(
        {
            "method": "dflash",
            "model": str(PAIR / "dflash"),
            "num_speculative_tokens": args.speculative_tokens,
        }
    )
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(PAIR / "target"),
        "--served-model-name",
        "demo",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--speculative-config",
        speculative,
        "--enforce-eager",
        "--max-model-len",
        "1024",
        "--kv-cache-memory-bytes",
        str(1 << 28),
    ]
    shown = [f"'{c}'" if c.startswith("{") else c for c in ["vllm", *command[1:]]]
    print(
        "\nNow as a server:\n\n    "
        + " ".join(shown).replace(str(PAIR.parents[1]) + "/", "")
        + "\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ENGINE_ENV} | {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            wait_until_ready(server, port)
            prompt = json.loads((PAIR / "prompts.jsonl").read_text().splitlines()[1])["prompt"]
            body = {"model": "demo", "prompt": prompt, "max_tokens": args.tokens, "temperature": 0}
            answer = json.loads(fetch(port, "/v1/completions", body))
            print(
                "    "
                + (prompt + "\033[1m" + answer["choices"][0]["text"] + "\033[0m").replace(
                    "\n", "\n    "
                )
            )
            metrics = prometheus(fetch(port, "/metrics"))
            drafts, accepted = (
                metrics["vllm:spec_decode_num_drafts_total"],
                metrics["vllm:spec_decode_num_accepted_tokens_total"],
            )
            print(
                f"\n  {answer['usage']['completion_tokens']} tokens in {drafts:.0f} drafts: tau"
                f" {1 + accepted / drafts:.2f}"
            )
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_ready(server: subprocess.Popen[str], port: int) -> None:
    """Waits for ``/health``; shows a bar, and the server's own words if it ends first."""
    from tqdm import tqdm

    with tqdm(
        desc="starting the server (imports take most of it)",
        bar_format="{desc}: {elapsed}",
        mininterval=1,
    ) as bar:
        while True:
            try:
                fetch(port, "/health")
                return
            except (urllib.error.URLError, ConnectionError):
                pass
            if server.poll() is not None:
                raise SystemExit(
                    "the server ended with status"
                    f" {server.returncode}:\n{server.stdout.read() if server.stdout else ''}"
                )
            time.sleep(0.5)
            bar.update()


def fetch(port: int, path: str, body: dict[str, Any] | None = None) -> str:
    """One request to the local server; POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def prometheus(text: str) -> dict[str, float]:
    """Metric name to the sum over its labels."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            values[name] = values.get(name, 0.0) + float(line.rpartition(" ")[2])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts (default: 12)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a prompt (default: 128)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds to take the median of (default: 3)"
    )
    parser.add_argument(
        "--speculative-tokens",
        type=int,
        default=7,
        help="drafted tokens a step, 1 to 7 (default: 7)",
    )
    parser.add_argument(
        "--at-least",
        type=float,
        default=0.0,
        help="fail if the ratio is below this (default: never)",
    )
    parser.add_argument("--no-serve", action="store_true", help="part one only")
    args = parser.parse_args()
    compare(args)
    if not args.no_serve:
        serve(args)


if __name__ == "__main__":
    main()
