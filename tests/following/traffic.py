"""Clients without a pause, and mixed requests with what a server without a drafter answers."""

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients import Clients
from engine.harness import PROMPTS
from engine.test_serve import server
from engine.test_server_twins import COMPLETION
from soak_server import ask, draw_round

POOL, AT_ONCE = 144, 8
PROBES, PROBE_TOKENS = 16, 96
NOT_COMPARED = ("seed", "hang up", "scrape")
"""Kinds of ``soak_server``; those with a seed go without it here."""


class Traffic(Clients):
    """Clients that each ask the next request of a round that never ends, but those of kind
    ``probe``, which are asked by themselves."""

    def __init__(
        self, count: int, ask: Callable[[int], Any], expected: Sequence[Any], kinds: Sequence[str]
    ) -> None:
        """``ask`` sends the request at an index; an answer is compared where one is
        ``expected``."""
        super().__init__(count)
        self.counts: Counter[str] = Counter()
        self.failed: list[Any] = []
        self.differing: list[Any] = []
        self.longest_s = 0.0
        self._ask, self._expected, self._kinds = ask, expected, kinds
        self._probes = [at for at, kind in enumerate(kinds) if kind == "probe"]
        self._next = itertools.cycle(sorted({*range(len(kinds))} - {*self._probes}))
        self._lock, self._going, self._running = threading.Condition(), True, 0

    def ask_one(self, number: int) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._going)
            at, self._running = next(self._next), self._running + 1
        self._ask_at(at)
        with self._lock:
            self._running -= 1
            self._lock.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No client asks meanwhile; what they have asked is answered before."""
        with self._lock:
            self._going = False
            self._lock.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._lock:
                self._going = True
                self._lock.notify_all()

    def probe(self) -> None:
        """The probes, one after the other."""
        for at in self._probes:
            self._ask_at(at)

    def _ask_at(self, at: int) -> None:
        began, answer, error = time.monotonic(), None, None
        try:
            answer = self._ask(at)
        except Exception as problem:
            error = {"request": at, "kind": self._kinds[at], "error": repr(problem)}
            time.sleep(0.5)  # of a server that has ended there would be thousands
        with self._lock:
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.counts[self._kinds[at]] += 1
            if error is not None:
                self.failed.append(error)
            elif self._expected[at] is not None:
                self.counts["compared"] += 1
                if answer != self._expected[at]:
                    self.differing.append({"request": at, "got": answer})

    def take(self) -> dict[str, Any]:
        """What came since it was asked last."""
        with self._lock:
            found = {
                "counts": dict(self.counts),
                "longest_s": round(self.longest_s, 2),
                "failed": self.failed,
                "differing": self.differing,
            }
            self.counts, self.longest_s, self.failed, self.differing = Counter(), 0.0, [], []
        return found


@dataclass(frozen=True)
class Mixed:
    """Requests, and what a server without a drafter answers; None where that is not compared."""

    pool: Sequence[dict[str, Any]]
    expected: Sequence[Any]

    @classmethod
    def made(cls, path: Path, *flags: str) -> "Mixed":
        """Draws the requests, and has a server with these flags answer them once; ``path`` keeps
        the answers."""
        rng, pool = random.Random(0), []
        texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
        while len(pool) < POOL:
            pool += draw_round(rng, texts)
        for one in pool:
            one["body"].pop("seed", None)
        for text in texts[:: len(texts) // PROBES][:PROBES]:
            body = {"model": "embedded", "prompt": text, "temperature": 0.0, "ignore_eos": True}
            body["max_tokens"] = PROBE_TOKENS
            pool.append({"kind": "probe", "path": COMPLETION, "body": body})
        if not path.exists():
            print("a server without a drafter answers each greedy request", flush=True)
            greedy = [one for one in pool if one["kind"] not in NOT_COMPARED]
            with server(*flags) as port, ThreadPoolExecutor(AT_ONCE) as workers:
                answers = workers.map(lambda one: ask(port, one), greedy)
                found = [None if one["kind"] in NOT_COMPARED else next(answers) for one in pool]
            path.write_text(json.dumps(found))
        return cls(pool, json.loads(path.read_text()))

    def to(self, port: int) -> Traffic:
        """Clients of a server."""

        def one(at: int) -> Any:
            return json.loads(json.dumps(ask(port, self.pool[at])))  # JSON has no tuples

        return Traffic(AT_ONCE, one, self.expected, [each["kind"] for each in self.pool])
