"""Holds the controller under asynchronous scheduling on a large GPU, simulated (an H200's roofline,
``simulation_async.py``), against plain decoding, every fixed K and vLLM's adaptive verification, in
a grid of requests, acceptance and contexts. From the first step on, so a cold start counts.

What the controller begins with: the profile that V2's warm-up measures of that server
(``fake_worker.py``; it imports vLLM), one of the cell's own contexts, or the guess.

Python on one core, some six minutes a seed. A line every half minute, then the lowest cell of
each ratio and a table by requests; fails where a cell is below its bound.

    python tests/prove_async.py
    python tests/prove_async.py --requests 256 --rates 0.3 --contexts 1024,131072 --seeds 3
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from simulation_async import AsyncServer, h200  # noqa: E402
from vllm_dflash.cost_profile import GUESS, Profile  # noqa: E402

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
CONTEXTS = tuple(1 << i for i in range(10, 18))
EVERY_S, MOST_NAMED = 30.0, 20
RATIOS: dict[str, tuple[float, Callable[[AsyncServer], float]]] = {
    "plain decoding": (0.98, lambda server: server.fixed(0)),
    "the best fixed K of 3, 7, 15": (0.95, lambda server: max(map(server.fixed, (3, 7, 15)))),
    "the best fixed K of 1 to 15": (0.95, lambda server: max(map(server.fixed, range(1, 16)))),
    "vLLM's adaptive verification": (0.95, lambda server: server.adaptive_verification()),
}
"""What the controller is held against, with its bound."""


@dataclass(frozen=True)
class Cell:
    """A server, and what the controller reached of each of ``RATIOS`` on it."""

    num_reqs: int
    rate: float
    context: int
    seed: int
    ratios: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.num_reqs} requests, acceptance {self.rate:g}, {self.context} positions,"
            f" seed {self.seed}"
        )


def run(
    num_reqs: int, rate: float, context: int, seed: int, steps: int, profile: Profile | None
) -> Cell:
    server = AsyncServer(num_reqs, rate, context, seed=seed)
    reached = server.adaptive(steps, profile)
    ratios = tuple(reached / other(server) for _, other in RATIOS.values())
    return Cell(num_reqs, rate, context, seed, ratios)


def _profile(kind: str, seed: int) -> Profile | None:
    """None: each cell's own."""
    if kind != "measured":
        return GUESS if kind == "guess" else None
    from fake_worker import profile_of_gpu

    return profile_of_gpu(h200, AsyncServer.noise, seed)


def lowest(cells: Sequence[Cell], ratio: int) -> Cell:
    return min(cells, key=lambda cell: cell.ratios[ratio])


def summary(cells: Sequence[Cell]) -> bool:
    """Prints it; whether every cell is above its bounds."""
    holds = True
    for i, (name, (bound, _)) in enumerate(RATIOS.items()):
        worst = lowest(cells, i)
        below = sorted((c for c in cells if c.ratios[i] < bound), key=lambda c: c.ratios[i])
        holds &= not below
        print(
            f"over {name}: {worst.ratios[i]:.3f} at the lowest ({worst}); {len(below)} of"
            f" {len(cells)} cells below {bound}"
        )
        for cell in below[:MOST_NAMED]:
            print(f"    {cell.ratios[i]:.4f}: {cell}")
    print("\n| requests | " + " | ".join(f"over {name}" for name in RATIOS) + " |")
    print("|---" * (1 + len(RATIOS)) + "|")
    for num_reqs in sorted({cell.num_reqs for cell in cells}):
        of = [cell for cell in cells if cell.num_reqs == num_reqs]
        worst_of = (lowest(of, i) for i in range(len(RATIOS)))
        figures = (
            f"{cell.ratios[i]:.3f} ({cell.rate:g}, {cell.context // 1024}k)"
            for i, cell in enumerate(worst_of)
        )
        print(f"| {num_reqs} | " + " | ".join(figures) + " |")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )

    def numbers(of: type) -> Callable[[str], list]:
        return lambda text: [of(part) for part in text.split(",")]

    parser.add_argument("--requests", type=numbers(int), default=REQUESTS)
    parser.add_argument("--rates", type=numbers(float), default=RATES)
    parser.add_argument("--contexts", type=numbers(int), default=CONTEXTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="of each cell (500)")
    parser.add_argument("--profile", choices=["measured", "own", "guess"], default="measured")
    asked = parser.parse_args()
    if min(asked.seeds, asked.steps, *asked.requests, *asked.contexts) < 1:
        parser.error("--seeds, --steps, --requests and --contexts are 1 or more")
    if not all(0 < rate < 1 for rate in asked.rates):
        parser.error("--rates are between 0 and 1")
    places = list(product(range(asked.seeds), asked.contexts, asked.rates, asked.requests))
    profiles = [_profile(asked.profile, seed) for seed in range(asked.seeds)]
    cells: list[Cell] = []
    began = said = time.monotonic()
    for seed, context, rate, num_reqs in places:
        cells.append(run(num_reqs, rate, context, seed, asked.steps, profiles[seed]))
        if time.monotonic() - said >= EVERY_S:
            said = time.monotonic()
            worst = ", ".join(f"{lowest(cells, i).ratios[i]:.3f}" for i in range(len(RATIOS)))
            took = said - began
            print(f"{len(cells)} of {len(places)} cells, {took:.0f} s; lowest {worst}", flush=True)
    print(f"{len(cells)} cells of {asked.steps} steps, {time.monotonic() - began:.0f} s\n")
    raise SystemExit(not summary(cells))


if __name__ == "__main__":
    main()
