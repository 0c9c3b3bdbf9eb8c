"""One run of the fuzzer: two engines, rounds of requests, and what is done with a difference.

``tests/fuzz_differential.py`` says what is compared.
"""

import json
import random
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fuzzing.child import BothEnded, Child, Crash
from fuzzing.compare import difference, first_difference
from fuzzing.deaths import cause
from fuzzing.draw import (
    ADAPTERS,
    REFUSED,
    draw_common,
    draw_round,
    draw_settings,
    is_compared,
    ordinary,
    without,
)
from fuzzing.engines import draft_args, kinds, plain_args, shared_args
from fuzzing.pairs import Pair
from fuzzing.shrink import shrink
from fuzzing.tally import Tally
from lora import make_adapter

NOISE = (1e-6, 1e-5, 1e-4)
"""What plain decoding's logits are shaken by to see whether a difference is a tie; the last is the
largest that counts."""
ROUNDS = 8
"""Rounds that an engine gets."""
SHRUNK = 3
"""Differences of a kind that are shrunk: a fault comes again and again."""
METHODS = {"ours": {}, "native": {"VLLM_DFLASH": "0"}, "ngram": {"VLLM_DFLASH": "0"}}
"""Who drafts, with its environment: this package, vLLM's own dflash, vLLM's own ngram. The others
tell whose fault a difference is."""


class Fuzzer:
    """One pair; ``method`` is one of ``METHODS``, and ``include`` names fields of ``draw.KNOWN`` to
    draw all the same."""

    def __init__(
        self,
        name: str,
        pair: Pair,
        folder: Path,
        seed: int = 0,
        method: str = "ours",
        include: Sequence[str] = (),
    ) -> None:
        self.name, self.pair, self.folder, self.method, self.include = (
            name,
            pair,
            folder,
            method,
            include,
        )
        self.most_shrunk = SHRUNK
        self.rng, self.tally = random.Random(seed), Tally()
        self.plain, self.ours = Child("plain", folder), Child("drafts", folder, METHODS[method])
        self.common: dict[str, Any] = {}
        self.left_out = set(pair.left_out)
        """Fields that end vLLM's own engine: not drawn."""
        self._kinds: Counter[str] = Counter()
        self.settings: dict[str, Any] = {}

    def start(self, common: dict[str, Any], settings: dict[str, Any]) -> None:
        """Both engines; that without a drafter only where it has to differ from the one before."""
        shared = shared_args(self.pair, common, self.include)
        adapters = self._adapters() if common["enable_lora"] else []
        if common != self.common:
            self.common = {}
            try:
                self.plain.start(args=plain_args(shared), adapters=adapters)
            except Crash as crash:
                raise BothEnded(f"did not start: {crash}") from crash
        self.common, self.settings = common, settings
        by_dice = settings["plan"] == "random" and self.method == "ours"
        self.ours.start(
            args=draft_args(shared, settings, self.pair.drafter, self.method),
            asynchronous=settings["asynchronous"],
            plan_seed=settings["plan_seed"] if by_dice else None,
            adapters=adapters,
            fault=settings.get("fault"),
            own_process=settings.get("own_process", False),
            resets=settings.get("resets", ()),
        )
        self.tally.engines.update(kinds(common, settings))

    def _adapters(self) -> list[str]:
        folders = [self.folder / f"adapter{n}" for n in range(ADAPTERS)]
        return [
            str(folder if folder.exists() else make_adapter(folder, self.pair.target, seed=3 + n))
            for n, folder in enumerate(folders)
        ]

    def run(self, rounds: Iterable[int]) -> Tally:
        """As many rounds as there are in ``rounds``."""
        runs = False
        for number in rounds:
            if number % ROUNDS == 0 or not runs or not self.common:
                runs = self._start_drawn()
            if runs:
                drawn = draw_round(
                    self.rng, self.pair.corpus, self.common | self.settings, self.include
                )
                self.round(without(drawn, self.left_out))
        self.end()
        return self.tally

    def _start_drawn(self) -> bool:
        """Engines as the dice say; False where one did not start."""
        common = self.common
        if not common or self.rng.random() >= 0.4:
            common = draw_common(self.rng, list(self.pair.overrides))
        common = ordinary(common, self.left_out)
        settings = draw_settings(self.rng, common["override"])
        try:
            self.start(common, settings)
        except BothEnded as crash:
            self.common, self.settings = common, settings
            self._learn([], crash)
            return False
        except Crash as crash:
            self._print(f"an engine did not start: {crash}", [])
            return False
        return True

    def end(self) -> None:
        self.plain.end()
        self.ours.end()

    def round(self, requests: list[dict[str, Any]]) -> None:
        self.tally.requests += len(requests)
        for request in requests:
            self.tally.fields.update(
                {*request, *request["params"], *request["params"].get("structured_outputs", ())}
            )
        try:
            plain, ours = self.ask(requests)
            for request in requests:
                self._judge(request, requests, plain, ours)
        except Crash as crash:
            self._crashed(requests, crash)

    def ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Both engines' answers by request."""
        wanted = [self._as_plain(r) for r in requests if is_compared(r, self.settings)]
        self.plain.send(do="run", requests=wanted)
        self.ours.send(do="run", requests=requests)
        crashes, answers = [], []
        for child in (self.plain, self.ours):
            try:
                answers.append(child.read())
            except Crash as found:
                crashes.append(f"{'plain' if child is self.plain else 'drafts'}: {found}")
                child.restart()
        if crashes:
            raise (BothEnded if len(crashes) == 2 else Crash)("\n".join(crashes))
        self.tally.counters.update(answers[1]["counters"])
        return [answer["answers"] for answer in answers]

    @staticmethod
    def _as_plain(request: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in request.items() if k != "aborted_after"} | {
            "arrives": 0,
            "stream": "final",
        }

    def _judge(
        self,
        request: dict[str, Any],
        requests: list[dict[str, Any]],
        plain: dict[str, Any],
        ours: dict[str, Any],
    ) -> None:
        answer = ours.get(str(request["id"]), {"completions": {}, "finished": False})
        if "error" in answer and any(name in request["params"] for name in REFUSED):
            self.tally.outcomes["refused by vLLM beside a drafter"] += 1
        elif not is_compared(request, self.settings):
            self.tally.outcomes["sampled without a seed"] += 1
            if (
                not answer.get("finished")
                and "aborted_after" not in request
                and "error" not in answer
            ):
                self._report("never finished", request, requests)
        else:
            twin = plain[str(request["id"])]
            found = difference(request, twin, answer)
            if found is None:
                kind = (
                    "refused by both"
                    if "error" in answer
                    else "aborted, alike so far"
                    if not answer["finished"]
                    else "alike"
                )
                self.tally.outcomes[kind] += 1
            elif (tie := self._tie(request, twin, answer)) is not None:
                self.tally.outcomes["tied"] += 1
                self.tally.ties.append(
                    f"tie: {found}; plain decoding writes the same with {tie:.0e} of noise on its"
                    " logits"
                )
            else:
                self._report(found, request, requests)

    def _tie(
        self, request: dict[str, Any], plain: dict[str, Any], ours: dict[str, Any]
    ) -> float | None:
        """The noise on the target's logits with which plain decoding parts from itself just so;
        None where it does not, in any completion."""
        if "error" in plain or "error" in ours:
            return None
        found = []
        for index, completion in ours["completions"].items():
            tokens, other = plain["completions"][index]["token_ids"], completion["token_ids"]
            at = first_difference(tokens, other)
            if at is not None and at < len(other):
                found.append(self._noise(request, index, other[: at + 1]))
        return (
            None
            if not found or None in found
            else max(noise for noise in found if noise is not None)
        )

    def _noise(self, request: dict[str, Any], index: str, beginning: list[int]) -> float | None:
        """The least noise with which plain decoding of the request alone begins so."""
        for noise in NOISE:
            copies = [self._as_plain(request) | {"id": i} for i in range(12)]
            self.plain.send(do="run", requests=copies, noise=noise)
            shaken = [
                answer["completions"][index]["token_ids"]
                for answer in self.plain.read()["answers"].values()
            ]
            if beginning in [tokens[: len(beginning)] for tokens in shaken]:
                return noise
        return None

    def _crashed(self, requests: list[dict[str, Any]], crash: Crash) -> None:
        """Looks for a request that ends the engine alone. Where both engines ended, the round is
        asked again without what ended them."""
        alone = requests
        for request in requests:
            try:
                self.ask([request | {"arrives": 0}])
            except Crash as again:
                if type(again) is type(crash):
                    alone, crash = [request], again
                    break
        if not isinstance(crash, BothEnded):
            self._print(f"an engine ended: {crash}", alone)
        elif self._learn(alone, crash):
            self.round(without(requests, self.left_out))

    def _learn(self, requests: list[dict[str, Any]], crash: BothEnded) -> bool:
        """What ended both engines is vLLM's own: says so, and leaves its cause out from now on.
        True where one was found and both engines run without it."""
        common, settings = self.common, self.settings

        def lives(tried: dict[str, Any], asked: list[dict[str, Any]]) -> bool:
            shared = shared_args(self.pair, tried, self.include)
            adapters = self._adapters() if tried["enable_lora"] else []
            try:
                self.plain.start(args=plain_args(shared), adapters=adapters)
                self.plain.send(do="run", requests=[self._as_plain(r) for r in asked])
                self.plain.read()
            except Crash:
                return False
            return True

        found = cause(common, requests, lives)
        self.common = {}  # The engine without a drafter is another now.
        # Of each engine's log the last line.
        ends = [part.strip().splitlines()[-1] for part in str(crash).split("\ndrafts: ")]
        self.tally.deaths.append(
            f"vLLM's own: both engines ended ({'; '.join(ends)}); left out from now on:"
            f" {found or 'nothing, no single cause'}"
        )
        self.tally.outcomes["ended both engines"] += len(requests)
        case = self._replay_command(common, settings, requests)
        print(f"\n{self.tally.deaths[-1]}\n{crash}\n    {case}\n", flush=True)
        if found is None or found in self.left_out:
            return False
        self.left_out.add(found)
        self.settings = settings
        try:
            self.start(ordinary(common, self.left_out), settings)
        except BothEnded as again:
            self.common = ordinary(common, self.left_out)
            return self._learn([], again)
        except Crash as again:
            self._print(f"an engine did not start: {again}", [])
            return False
        return True

    def _report(self, found: str, request: dict[str, Any], requests: list[dict[str, Any]]) -> None:
        self.tally.outcomes["different"] += 1

        def differs(tried: list[dict[str, Any]], wanted: int) -> bool:
            return self.replay(tried).get(wanted) is not None

        kind = found.split()[0]
        self._kinds[kind] += 1
        if self._kinds[kind] > self.most_shrunk:
            self._print(found, requests)
            return
        small = shrink(requests, request["id"], differs)
        again = self.replay(small).get(request["id"])
        self._print(f"{found}; shrunk: {again or 'not seen again, the whole round follows'}", small)

    def replay(self, requests: list[dict[str, Any]]) -> dict[int, str]:
        """What differs, by request."""
        try:
            plain, ours = self.ask(requests)
        except BothEnded as crash:
            print(f"vLLM's own: both engines ended: {crash}", flush=True)
            return {}
        except Crash as crash:
            return {r["id"]: f"an engine ended: {crash}" for r in requests}
        found = {}
        for request in requests:
            if is_compared(request, self.settings):
                twin, answer = (
                    plain[str(request["id"])],
                    ours.get(str(request["id"]), {"completions": {}, "finished": False}),
                )
                words = difference(request, twin, answer)
                if words is not None and self._tie(request, twin, answer) is None:
                    found[request["id"]] = words
        return found

    def _replay_command(
        self, common: dict[str, Any], settings: dict[str, Any], requests: list[dict[str, Any]]
    ) -> str:
        case = json.dumps({"common": common, "settings": settings, "requests": requests})
        include = "".join(f" --include {name}" for name in self.include)
        return (
            f"python tests/fuzz_differential.py --pair {self.name}{include} --replay"
            f" {shlex.quote(case)}"
        )

    def _print(self, found: str, requests: list[dict[str, Any]]) -> None:
        text = f"{found}\n    {self._replay_command(self.common, self.settings, requests)}"
        self.tally.differences.append(text)
        print(f"\nDIFFERENCE {len(self.tally.differences)}: {text}\n", flush=True)
