"""A soak over HTTP: what the processes of a server with drafts hold in memory, minutes long, beside
a server without.

Both servers (V1, float32, the embedded pair, the controller as it is by default) get the same
requests, round after round: chat and completions, greedy and with seeds, whole and as streams,
streams whose client hangs up, structured output, scrapes of ``/metrics``. Answers have to be equal.
Resident memory is read from /proc after each round: of the engine's process, its worker and the API
server. Ends with 1 at the first difference, and where a process of the server with drafts grows by
``--most`` megabytes more than the same one of the server without, from the second third of the run
to the last; the first third warms up.

More than the other, as either worker grows, by 417 MB without drafts and 461 with them in ten
minutes. Most likely it is oneDNN's compiled code: a matrix product of vLLM's by itself keeps 0.6 to
0.8 MB for each number of tokens that it has met. A leak as small as the other's growth may hide in
it. Fewer tokens a step would end it sooner, but cut prompts into chunks, and with a seed those end
vLLM's engine without a drafter on a CPU.

    python tests/soak_server.py --minutes 10       (make soak-server)
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from engine.feature_server import wait_until_idle
from engine.harness import DRAFTER, PROMPTS
from engine.test_serve import metric, request, server
from engine.test_server_twins import CHAT, COMPLETION, bare, descendants, root_of, user

ROUND = 24
"""Requests a round."""
CLIENTS = 8
MOST_MB = 30.0
SPECULATIVE = (
    "--speculative-config",
    json.dumps({"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}),
)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "private": {"type": "boolean"}},
    "required": ["private"],
}
KINDS = ("chat", "completion", "stream", "hang up", "seed", "schema", "scrape")


def draw_round(rng: random.Random, texts: list[str]) -> list[dict[str, Any]]:
    """``ROUND`` random requests: a kind, a path and a body."""
    requests = []
    for _ in range(ROUND):
        kind, text = rng.choice(KINDS), rng.choice(texts)[: rng.randint(8, 400)]
        body = {
            "model": "embedded",
            "temperature": 0.0,
            "max_tokens": rng.choice([1, 4, 16, 48, 96]),
            "ignore_eos": rng.random() < 0.5,
        }
        if kind == "seed":
            body |= {"temperature": 0.8, "seed": rng.randrange(1000), "n": rng.choice([1, 2])}
        if kind == "schema":
            body |= {"structured_outputs": {"json": SCHEMA}}
        if kind == "hang up":
            body |= {"max_tokens": 200, "ignore_eos": True}
        if kind in ("stream", "hang up"):
            body |= {"stream": True}
        chat = kind in ("chat", "stream", "hang up") or rng.random() < 0.5
        where = (
            {"path": CHAT, "body": body | {"messages": user(text)}}
            if chat
            else {"path": COMPLETION, "body": body | {"prompt": text}}
        )
        requests.append({"kind": kind, "bytes": rng.randint(1, 3000)} | where)
    return requests


def ask(port: int, one: dict[str, Any]) -> Any:
    """A request's answer, as far as it does not differ from one time to the next; None for scrapes
    and for who hangs up."""
    if one["kind"] == "scrape":
        assert "vllm:num_requests_running" in request(port, "/metrics")
        return None
    if one["kind"] == "hang up":
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request(
            "POST", one["path"], json.dumps(one["body"]), {"Content-Type": "application/json"}
        )
        connection.getresponse().read(one["bytes"])
        connection.close()
        return None
    answer = request(port, one["path"], one["body"])
    if one["kind"] != "stream":
        return bare(json.loads(answer))
    pieces = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    choices = [choice for piece in pieces for choice in piece["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices), [
        c["finish_reason"] for c in choices if c["finish_reason"]
    ]


def processes(port: int) -> dict[str, int]:
    """The server's processes by what they are: the one that was started, the engine's and its
    worker."""
    (engine,), (worker,) = descendants("EngineCore", port), descendants("Worker", port)
    return {"server": root_of(port), "engine": engine, "worker": worker}


def resident_mb(pids: dict[str, int]) -> dict[str, float]:
    """Each process's resident memory, in megabytes."""
    lines = {name: Path(f"/proc/{pid}/status").read_text() for name, pid in pids.items()}
    return {name: int(text.partition("VmRSS:")[2].split()[0]) / 1e3 for name, text in lines.items()}


@dataclass
class Memory:
    """What one server's processes held: when it was ready, and after each round."""

    pids: dict[str, int]
    ready: dict[str, float]
    rounds: list[dict[str, float]] = field(default_factory=list)

    def after_round(self) -> None:
        self.rounds.append(resident_mb(self.pids))

    def growth(self, name: str) -> float:
        """From the median of the second third of the rounds to that of the last, in megabytes."""
        held, third = [each[name] for each in self.rounds], len(self.rounds) // 3
        return statistics.median(held[-third:]) - statistics.median(held[third : 2 * third])

    def growth_beyond(self, other: "Memory", name: str) -> float:
        """What it grows by more than the other server's process, which may have shrunk."""
        return self.growth(name) - max(0.0, other.growth(name))

    def describe(self) -> str:
        third = len(self.rounds) // 3
        return "; ".join(
            f"{name} {self.ready[name]:.0f} MB at the start, {self.rounds[third - 1][name]:.0f}"
            f" warm, {self.rounds[-1][name]:.0f} at the end ({self.growth(name):+.1f})"
            for name in self.pids
        )


def soak(minutes: float, seed: int) -> tuple[dict[str, Memory], str]:
    """Runs for ``minutes``, at least three rounds; what was held by both servers, and what was
    asked."""
    from tqdm import tqdm

    rng, texts = (
        random.Random(seed),
        [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()],
    )
    kinds: Counter[str] = Counter()
    with (
        server() as plain,
        server(*SPECULATIVE) as drafted,
        ThreadPoolExecutor(2 * CLIENTS) as pool,
    ):
        memory = {
            name: Memory(pids := processes(port), resident_mb(pids))
            for name, port in (("plain", plain), ("drafts", drafted))
        }
        end = time.monotonic() + minutes * 60
        with tqdm(total=round(minutes * 60), unit="s", desc="soak") as bar:
            while time.monotonic() < end or len(memory["drafts"].rounds) < 3:
                requests = draw_round(rng, texts)
                asked = [
                    (one, *(pool.submit(ask, port, one) for port in (plain, drafted)))
                    for one in requests
                ]
                for one, theirs, ours in asked:
                    assert ours.result() == theirs.result(), (
                        f"not the answer of a server without a drafter: {one}"
                    )
                kinds.update(one["kind"] for one in requests)
                for port, each in ((plain, memory["plain"]), (drafted, memory["drafts"])):
                    wait_until_idle(port)
                    each.after_round()
                bar.update(round(minutes * 60 - max(0.0, end - time.monotonic())) - bar.n)
                bar.set_postfix(mb=round(memory["drafts"].rounds[-1]["worker"]))
        drafts = metric(drafted, "vllm:spec_decode_num_drafts_total")
        tau = 1 + metric(drafted, "vllm:spec_decode_num_accepted_tokens_total") / max(1, drafts)
    asked_for = (
        f"{sum(kinds.values())} requests"
        f" ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}), "
    )
    return memory, asked_for + f"{drafts:.0f} drafts, tau {tau:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most",
        type=float,
        default=MOST_MB,
        help="megabytes that a process may grow by more than without drafts (default: %(default)s)",
    )
    args = parser.parse_args()
    memory, asked_for = soak(args.minutes, args.seed)
    print(f"{asked_for}; all answers equal")
    for name, each in memory.items():
        print(f"{name}: {each.describe()}")
    drafts, plain = memory["drafts"], memory["plain"]
    grown = {
        name: growth
        for name in drafts.pids
        if (growth := drafts.growth_beyond(plain, name)) > args.most
    }
    if grown:
        print(
            f"memory grows by {args.most:g} MB more than without drafts:"
            f" {', '.join(f'{name} {mb:+.1f}' for name, mb in grown.items())}"
        )
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
