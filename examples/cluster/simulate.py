r"""Throughput and tail latency of 1 to 1,000 replicas under a stated load, without a drafter, with
one, and choosing step by step.

Fed with what `vllm-dflash bench` measured of one engine, so it says what copies of *that* engine
would do behind one router, and nothing of another model or device. What it knows: a step's time and
committed tokens by the number of requests in it (measured, lines between), the time of a prompt
(measured at one request), Poisson arrivals, output lengths (geometric), a queue and a batch limit a
replica, and Ray Serve's
router: of two replicas drawn at random the one with fewer requests. What it leaves out: the
network, the router's own time and limits, replicas that die or start, the KV cache's limit and
prompts of different lengths. Where the benchmark has no method adaptive, "adaptive" is the better
of the two kinds of step at each batch size: an upper bound, for a controller has to learn.

    vllm-dflash bench --target T --draft D --methods plain,dflash,adaptive \
        --concurrency 1,2,4,8,16,32 --out bench
    python examples/cluster/simulate.py bench/results.json
"""

import argparse
import bisect
import heapq
import json
import random
import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

METHODS = ("off", "on", "adaptive")


@dataclass(frozen=True)
class Steps:
    """One kind of step, by the number of requests in it."""

    sizes: list[int]
    seconds: list[float]
    tokens: list[float]
    """Committed, a request."""

    def at(self, size: int) -> tuple[float, float]:
        """Seconds and committed tokens a request, on the line between the two nearest sizes that
        were measured."""
        right = min(max(bisect.bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        left = right - 1
        share = (size - self.sizes[left]) / (self.sizes[right] - self.sizes[left])
        seconds, tokens = (
            values[left] + share * (values[right] - values[left])
            for values in (self.seconds, self.tokens)
        )
        return seconds, tokens


def read(results: dict) -> tuple[dict[str, Steps], float]:
    """The kinds of step by method, greedy, and the seconds that a prompt takes, from a benchmark's
    results.json.

    Of several K the largest is taken, and of several sets or lengths of prompts the first.
    """
    found, prompt = {}, 0.0
    for name, kind in (("off", "plain"), ("on", "dflash"), ("adaptive", "adaptive")):
        rows = _rows(results, kind)
        if len(rows) < 2 and name == "adaptive":
            continue
        if len(rows) < 2:
            raise SystemExit(
                f"results.json has fewer than two concurrencies of the method {kind}: measure at"
                " least two"
            )
        committed = [
            (row["committed_per_request_step"] or {"median": 1.0})["median"]
            for row in rows.values()
        ]
        found[name] = Steps(
            list(rows), [row["step_ms"]["median"] / 1000 for row in rows.values()], committed
        )
        if name == "off":
            prompt = max(
                rows[min(rows)]["ttft_p50_ms"]["median"] / 1000 - found[name].seconds[0], 0.0
            )
    return found, prompt


def _rows(results: dict, kind: str) -> dict[int, dict]:
    """By concurrency, ascending."""
    points = results["points"]
    first = next(point for point in points if point["temperature"] == 0)
    names = {row["method"] for row in results["rows"] if re.split("[:@]", row["method"])[0] == kind}
    method = max(
        names, key=lambda name: int((re.findall(r":(\d+)", name) or ["99"])[0]), default=None
    )
    rows = {}
    for row in results["rows"]:
        point = points[row["point"]]
        same = all(
            point[field] == first[field] for field in ("prompt_set", "prompt_tokens", "temperature")
        )
        if row["method"] == method and same and row["step_ms"]:
            rows[point["concurrency"]] = row
    return dict(sorted(rows.items()))


def chosen(steps: dict[str, Steps], method: str, size: int) -> tuple[float, float]:
    """Seconds and committed tokens a request of the step that the method takes."""
    if method in steps:
        return steps[method].at(size)
    return min((steps[name].at(size) for name in ("off", "on")), key=lambda step: step[0] / step[1])


@dataclass
class Replica:
    """One engine."""

    waiting: deque = field(default_factory=deque)
    active: list = field(default_factory=list)
    """[arrival, tokens left] of each request in the batch."""
    busy: bool = False

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.active)


def simulate(
    steps: dict[str, Steps],
    prompt: float,
    method: str,
    replicas: int,
    rate: float,
    tokens: int,
    requests: int,
    seed: int,
) -> dict:
    """``requests`` arrivals at ``rate`` a second over all replicas, until the last is answered;
    latencies in seconds. The first half is not counted."""
    draw = random.Random(seed)
    most = steps["off"].sizes[-1]
    table = [(0.0, 0.0), *(chosen(steps, method, size) for size in range(1, most + 1))]
    pool, events, latencies = (
        [Replica() for _ in range(replicas)],
        [(draw.expovariate(rate), -1)],
        [],
    )
    # What is measured lies between half of the arrivals and the last: before, queues fill;
    # afterwards, replicas run empty.
    arrived, answered, first, now, halfway, window = 0, 0, 0, 0.0, float("inf"), (0, 1.0)

    def step(index: int) -> None:
        replica, new = pool[index], 0
        while replica.waiting and len(replica.active) < most:
            replica.active.append(replica.waiting.popleft())
            new += 1
        replica.busy = bool(replica.active)
        if replica.busy:
            heapq.heappush(events, (now + table[len(replica.active)][0] + new * prompt, index))

    while events:
        now, index = heapq.heappop(events)
        if index < 0:
            a, b = draw.randrange(replicas), draw.randrange(replicas)
            index = a if pool[a].load <= pool[b].load else b
            pool[index].waiting.append([now, 1 + int(draw.expovariate(1 / max(tokens - 1, 1)))])
            arrived += 1
            halfway = now if arrived == requests // 2 else halfway
            first = answered if arrived == requests // 2 else first
            window = (answered - first, now - halfway)
            if arrived < requests:
                heapq.heappush(events, (now + draw.expovariate(rate), -1))
            if not pool[index].busy:
                step(index)
            continue
        replica = pool[index]
        committed = table[len(replica.active)][1]
        for request in replica.active:
            request[1] -= int(committed) + (draw.random() < committed % 1)
        done = [(request[0], now - request[0]) for request in replica.active if request[1] <= 0]
        answered += len(done)
        latencies += [took for began, took in done if halfway <= began]
        replica.active = [request for request in replica.active if request[1] > 0]
        step(index)
    latencies.sort()
    return {
        "requests_per_second": window[0] / window[1],
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[int(0.99 * len(latencies))],
    }


def main() -> None:
    """Prints a table: a row for each number of replicas, with throughput, median and 99th
    percentile of latency by method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results",
        type=Path,
        help="results.json of `vllm-dflash bench` with the methods plain and dflash",
    )
    parser.add_argument("--replicas", default="1,10,100,1000")
    parser.add_argument(
        "--load",
        default="0.5,1.0",
        help="arrivals as shares of what plain decoding can do with full batches",
    )
    parser.add_argument(
        "--output-tokens",
        type=int,
        default=128,
        help="mean of a geometric distribution (default: 128)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=3000,
        help="at least, and 100 a replica; the first half is not counted (default: 3000)",
    )
    args = parser.parse_args()
    steps, prompt = read(json.loads(args.results.read_text()))
    most = steps["off"].sizes[-1]
    seconds, committed = steps["off"].at(most)
    capacity = most / (prompt * most + args.output_tokens / committed * seconds)
    print(
        f"one replica without a drafter, {most} requests in the batch: {capacity:.2f} requests/s of"
        f" {args.output_tokens} tokens\n"
    )
    header = [
        "load",
        "replicas",
        *(f"{method}: requests/s a replica, p50, p99 (s)" for method in METHODS),
    ]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for load in map(float, args.load.split(",")):
        for replicas in map(int, args.replicas.split(",")):
            cells = []
            for method in METHODS:
                count = max(args.requests, 100 * replicas)
                done = simulate(
                    steps,
                    prompt,
                    method,
                    replicas,
                    load * capacity * replicas,
                    args.output_tokens,
                    count,
                    seed=0,
                )
                cells.append(
                    f"{done['requests_per_second'] / replicas:.2f}, {done['p50']:.2f},"
                    f" {done['p99']:.2f}"
                )
            print(f"| {load:g} | {replicas} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
