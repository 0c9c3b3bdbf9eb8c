"""Mixed traffic on a real server, and a swap every minute between two drafters.

The same requests go round and round: chat and completions, greedy and sampled, whole and as
streams, streams whose client hangs up, structured output, scrapes of /metrics. What a server
without a drafter answers to each greedy one is asked once, before. What tau each drafter has on
this traffic is measured on servers that are started with it and never swapped. Prompts are computed
in pieces, so that a step has few sizes: each new one costs memory once (tests/soak_server.py).

tau after a swap is measured on probes: the traffic waits, and the same greedy requests are asked
one after the other. So two windows differ by the drafter alone, and not by which requests of the
traffic fell into them, or by which of them the controller drafts for. tau of the traffic is said
and not judged.
"""

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.feature_server import wait_until_idle
from engine.test_serve import request
from engine.test_swap import swappable, which
from following.made import two_drafters
from following.record import FAILS, HOLDS, OPEN, Lines, none_of, told
from following.traffic import AT_ONCE, Mixed, Traffic
from soak_server import processes, resident_mb
from vllm_dflash.cli import main as command
from vllm_dflash.follow.interval import students_t
from vllm_dflash.metrics.figures import Scrape
from vllm_dflash.weights.identity import id_of_folder

NAMES = ("good", "noisy")
WITHIN = 0.03
"""Of the drafter's own tau, after a swap."""
MOST_MB = 1.0
"""A minute, of resident memory."""
WARM_MINUTES = 10.0
"""Of swaps, before which memory grows with the sizes of steps that are met for the first time."""
SAMPLE_S, SETTLE_S, PROBE_S, REFERENCES, Z = 5.0, 1.0, 12.0, 2, 1.96
FEW_SIZES = ("--max-num-batched-tokens", "128", "--max-num-seqs", str(AT_ONCE))


def counted(port: int) -> dict[float, float]:
    """Verifications by how many tokens each committed at most: the histogram's, exact here."""
    found: dict[float, float] = {}
    for (sample, labels), value in Scrape.parse(request(port, "/metrics"), 0.0).samples.items():
        if sample == "vllm_dflash_accepted_length_bucket":
            at = float(dict(labels)["le"])
            found[at] = found.get(at, 0.0) + value
    return found


def tau_of(before: Mapping[float, float], now: Mapping[float, float]) -> dict[str, Any]:
    """tau between two such histograms, with half its interval, verifications taken for independent;
    None where nothing was drafted."""
    grown = [(at, now[at] - before.get(at, 0.0)) for at in sorted(now) if math.isfinite(at)]
    each = [(at, n - below) for (at, n), (_, below) in zip(grown, [(0.0, 0.0), *grown])]
    count = sum(n for _, n in each)
    if count < 2:
        return {"tau": None, "half": None, "verifications": count}
    mean = sum(at * n for at, n in each) / count
    variance = sum(n * (at - mean) ** 2 for at, n in each) / (count - 1)
    return {"tau": mean, "half": Z * math.sqrt(variance / count), "verifications": count}


def window(port: int, traffic: Traffic, pids: dict[str, int], until: float) -> dict[str, Any]:
    """What is seen up to a time: tau of the traffic and, at the end, of the probes, memory, and the
    answers."""
    time.sleep(SETTLE_S)
    before, memory = counted(port), [resident_mb(pids)]
    while (left := until - PROBE_S - time.monotonic()) > 0:
        time.sleep(min(SAMPLE_S, left))
        memory.append(resident_mb(pids))
    seen = tau_of(before, counted(port))
    with traffic.paused():
        wait_until_idle(port)
        time.sleep(SETTLE_S)
        before = counted(port)
        traffic.probe()
        time.sleep(SETTLE_S)
        seen["probes"] = tau_of(before, counted(port))
    time.sleep(max(0.0, until - time.monotonic()))
    held = {name: statistics.median(each[name] for each in memory) for name in pids}
    return seen | traffic.take() | {"memory_mb": held}


@contextmanager
def noted(lines: Lines, traffic: Traffic, adaptive: bool) -> Iterator[None]:
    """Has what ends the part within in ``lines``, as a failure; the same command goes on."""
    try:
        yield
    except Exception as error:
        found = traffic.take()
        found["failed"] += [{"error": f"the part ended: {error!r}"}]
        lines.add(adaptive=adaptive, **found)
        raise


@contextmanager
def serving(drafters: Path, name: str, adaptive: bool) -> Iterator[int]:
    speculative = json.dumps({"method": "dflash", "model": str(drafters / name)})
    more = ("--additional-config", json.dumps({"dflash": {"adaptive": adaptive}}))
    with swappable(drafters, *FEW_SIZES, "--speculative-config", speculative, *more) as port:
        yield port


def run(out: Path, lines: Lines, minutes: float, every: float, settings: Sequence[bool]) -> None:
    """Measures what is not in ``lines`` yet."""
    folder, mixed = two_drafters(out), Mixed.made(out / "soak-twin.json", *FEW_SIZES)
    for adaptive in settings:
        for name in NAMES:
            _reference(lines, folder, name, adaptive, every, mixed)
        _swaps(lines, folder, adaptive, round(60 * minutes / every), every, mixed)


def _reference(
    lines: Lines, folder: Path, name: str, adaptive: bool, every: float, mixed: Mixed
) -> None:
    """tau of a drafter that a server was started with."""
    seen = {"adaptive": adaptive, "reference": name}
    if len(lines.of(**seen)) >= REFERENCES:
        return
    print(f"{_setting(adaptive)}: a server that is started with {name}", flush=True)
    with (
        serving(folder, name, adaptive) as port,
        mixed.to(port) as traffic,
        noted(lines, traffic, adaptive),
    ):
        pids = processes(port)
        time.sleep(min(10.0, every))  # the profile, the controller, the first prompts
        for _ in range(REFERENCES - len(lines.of(**seen))):
            found = window(port, traffic, pids, time.monotonic() + every)
            lines.add(**seen, **found)
            print(f"  {_said(found)}", flush=True)


def _swaps(
    lines: Lines, folder: Path, adaptive: bool, turns: int, every: float, mixed: Mixed
) -> None:
    done = [row for row in lines.of(adaptive=adaptive) if "turn" in row]
    if len(done) >= turns:
        return
    print(f"{_setting(adaptive)}: {turns - len(done)} swaps", flush=True)
    ids = {name: id_of_folder(folder / name) for name in NAMES}
    session = 1 + max((row["session"] for row in done), default=0)
    with (
        serving(folder, NAMES[0], adaptive) as port,
        mixed.to(port) as traffic,
        noted(lines, traffic, adaptive),
    ):
        pids, began = processes(port), time.monotonic()
        time.sleep(min(10.0, every))
        for turn in range(len(done), turns):
            name, asked = NAMES[(turn + 1) % 2], time.monotonic()
            status = command(["swap", name, "--server", f"http://127.0.0.1:{port}"])
            took = time.monotonic() - asked
            with told(f"swap {turn + 1} of {turns}"):
                found = window(port, traffic, pids, asked + every)
            row = {"adaptive": adaptive, "turn": turn, "session": session, "drafter": name}
            row |= {"seconds": round(took, 3), "status": status}
            row |= {"in_force": which(port)["id"] == ids[name]}
            row |= {"minutes": round((time.monotonic() - began) / 60, 3)}
            lines.add(**row, **found)
            print(f"  {turn + 1} of {turns}, {name} in {took:.2f} s: {_said(found)}", flush=True)


def _setting(adaptive: Any) -> str:
    return f"controller {'on' if adaptive else 'off'}"


def _said(found: Mapping[str, Any]) -> str:
    tau = "nothing drafted"
    if found["tau"] is not None:
        tau = f"tau {found['tau']:.3f} +- {found['half']:.3f} ({found['verifications']:,.0f})"
    memory, probes = sum(found["memory_mb"].values()), found["probes"]
    tau += f"; of the probes {probes['tau'] or math.nan:.4f} ({probes['verifications']:,.0f})"
    return (
        f"{tau}, {memory:.0f} MB, {sum(found['counts'].values())} requests,"
        f" {len(found['failed'])} failed, {len(found['differing'])} differ"
    )


def verdicts(rows: Sequence[Mapping[str, Any]], settings: Sequence[bool]) -> list[str]:
    """What holds."""
    found: list[str] = []
    for adaptive in settings:
        own = [row for row in rows if row["adaptive"] == adaptive]
        swaps = [row for row in own if "turn" in row]
        if not swaps:
            continue
        found.append(f"{_setting(adaptive)}, {len(swaps)} swaps")
        counts: Counter[str] = sum((Counter(row["counts"]) for row in own), Counter())
        compared = counts.pop("compared", 0)
        failed = [each for row in own for each in row["failed"]]
        differing = [each for row in own for each in row["differing"]]
        found.append(none_of("requests failed", len(failed), counts.total(), failed[:3]))
        found.append(
            none_of(
                "greedy answers differ from the twin's", len(differing), compared, differing[:1]
            )
        )
        lost = [row["turn"] for row in swaps if row["status"] or not row["in_force"]]
        found.append(none_of("swaps without the new drafter's id", len(lost), len(swaps), lost))
        seconds = [row["seconds"] for row in swaps]
        found.append(
            f"      a swap takes {statistics.median(seconds):.2f} s, at most {max(seconds)}"
        )
        for name in NAMES:
            found += _taus(own, name)
        found += _memory(swaps)
    return found


def _pooled(rows: Sequence[Mapping[str, Any]]) -> str:
    """tau over all windows, with half its interval."""
    each = [(row["tau"], row["half"], row["verifications"]) for row in rows if row["tau"]]
    if not each:
        return "none, as nothing was drafted"
    count = sum(n for *_, n in each)
    half = math.sqrt(sum((half * n) ** 2 for _, half, n in each)) / count
    return f"{sum(tau * n for tau, _, n in each) / count:.3f} +- {half:.3f}"


def _taus(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Whether tau on the probes after each swap is the drafter's, and tau of the traffic."""
    known = [row for row in rows if row.get("reference") == name]
    swaps = [row for row in rows if row.get("drafter") == name and "turn" in row]
    began, after = ([row["probes"]["tau"] for row in part] for part in (known, swaps))
    if not began or not after or not all([*began, *after]):
        return [f"{OPEN} {name}: no swap, no server that began with it, or probes without drafts"]
    own = statistics.mean(began)
    furthest = max(abs(tau - own) for tau in after) / own
    state = HOLDS if max(furthest, (max(began) - min(began)) / own) <= WITHIN else FAILS
    return [
        f"{state} {name}: tau on the probes {own:.4f} ({min(began):.4f} to {max(began):.4f}) where"
        f" the server began with it, {statistics.mean(after):.4f} ({min(after):.4f} to"
        f" {max(after):.4f}) after {len(after)} swaps, at most {furthest:.2%} from it, asked"
        f" {WITHIN:.0%}",
        f"      {name}: tau of the traffic {_pooled(known)} and {_pooled(swaps)}",
    ]


def _memory(swaps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The slope of resident memory over the last two thirds, all sessions about their own means."""
    pairs: list[tuple[float, float]] = []
    sessions = 0
    for session in sorted({row["session"] for row in swaps}):
        own = [row for row in swaps if row["session"] == session]
        own = own[len(own) // 3 :]
        if len(own) < 2:
            continue
        held = [sum(row["memory_mb"].values()) for row in own]
        at, level = statistics.mean(r["minutes"] for r in own), statistics.mean(held)
        pairs += [(r["minutes"] - at, mb - level) for r, mb in zip(own, held, strict=True)]
        sessions += 1
    freedom = len(pairs) - sessions - 1
    if freedom < 1:
        return [f"{OPEN} memory: too few swaps to say"]
    spread = sum(t * t for t, _ in pairs)
    slope = sum(t * mb for t, mb in pairs) / spread
    left = sum((mb - slope * t) ** 2 for t, mb in pairs) / freedom
    half = students_t(freedom) * math.sqrt(left / spread)
    state = HOLDS if slope + half <= MOST_MB else FAILS if slope - half > MOST_MB else OPEN
    if max(row["minutes"] for row in swaps) < WARM_MINUTES:
        state = OPEN
    first, last = (sum(swaps[i]["memory_mb"].values()) for i in (0, -1))
    return [
        f"{state} memory: {slope:+.2f} +- {half:.2f} MB a minute over the last two thirds, asked"
        f" {MOST_MB:g}; {first:.0f} MB after the first swap, {last:.0f} after the last"
    ]
