"""A rolling swap of three replicas on Ray under load: which requests failed, whether any greedy
answer differs from plain decoding's, and that a drafter that is refused leaves all with the old.

Needs ``pip install 'vllm-dflash[ray]'``.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.cluster_harness import ray_cluster
from engine.harness import TARGET, held_out_prompts, run_engine
from following.made import two_drafters
from following.record import Lines, none_of, told
from following.traffic import Traffic
from prove_serve import BODY, ask, deployment
from vllm_dflash.swap import client
from vllm_dflash.swap.turns import RECOMPUTE
from vllm_dflash.weights.identity import id_of_folder

REPLICAS, CLIENTS, PROMPTS = 3, 6, 12
SETTLE_S = 10.0
"""Of load between two swaps."""
SWAPS = ("noisy", "good", "nan")
"""In turn; the last is refused."""


@contextmanager
def three_replicas(drafters: Path) -> Iterator[str]:
    """The address of a deployment, on a cluster that is given a core for each, real or not."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="up-", dir="/tmp"))
    before = os.environ.get("RAY_ADDRESS")
    try:
        with ray_cluster(num_cpus=REPLICAS + 1):
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            with deployment(folder, str(REPLICAS), "--swap-from", str(drafters)) as url:
                yield url
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
        shutil.rmtree(folder, ignore_errors=True)


def run(out: Path, lines: Lines, swaps: int) -> None:
    """Swaps what is not in ``lines`` yet."""
    if len(lines.rows) >= swaps:
        return
    drafters, prompts = two_drafters(out), held_out_prompts(PROMPTS)
    ids = {name: id_of_folder(drafters / name) for name in ("good", "noisy")}
    expected = run_engine(TARGET, None, prompts, max_tokens=BODY["max_tokens"])[0].tokens

    def one(at: int) -> Any:
        body = BODY | {"prompt": prompts[at], "return_token_ids": True}
        return ask(url, body)["choices"][0]["token_ids"]

    kinds = ["completion"] * PROMPTS
    with three_replicas(drafters) as url, Traffic(CLIENTS, one, expected, kinds) as load:
        _until_known(url)
        time.sleep(SETTLE_S)
        for turn in range(len(lines.rows), swaps):
            name, began = SWAPS[turn % len(SWAPS)], time.monotonic()
            said, refused = {}, None
            with told(f"swap {turn + 1} of {swaps}"):
                try:
                    said = client.swap(url, None, name, RECOMPUTE)
                except client.RefusedError as error:
                    refused = str(error)
                except client.ServerError as error:
                    said = {"error": str(error)}
                took = time.monotonic() - began
                time.sleep(SETTLE_S)
            row = {"turn": turn, "drafter": name, "seconds": round(took, 2), "refused": refused}
            if refused is not None:  # the one before is to be in force on all of them
                name, said = SWAPS[(turn - 1) % len(SWAPS)], client.which(url, None)
            row |= {"in_force": said.get("id") == ids.get(name), "replicas": said.get("replicas")}
            row |= {"left": said.get("left"), "error": said.get("error")}
            found = load.take()
            lines.add(**row, **found)
            print(
                f"  {turn + 1} of {swaps}, {row['drafter']} in {took:.1f} s: {_said(found)}",
                flush=True,
            )


def _until_known(url: str) -> None:
    """All replicas have said what they serve."""
    until = time.monotonic() + 120
    while client.which(url, None).get("replicas") != REPLICAS:
        assert time.monotonic() < until, client.which(url, None)
        time.sleep(1)


def _said(found: Mapping[str, Any]) -> str:
    return (
        f"{found['counts'].get('completion', 0)} requests, {len(found['failed'])} failed,"
        f" {len(found['differing'])} differ, the longest {found['longest_s']} s"
    )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What holds."""
    if not rows:
        return []
    good = [row for row in rows if row["drafter"] in ("good", "noisy")]
    bad = [row for row in rows if row["drafter"] not in ("good", "noisy")]
    failed = [each for row in rows for each in row["failed"]]
    count = sum(row["counts"].get("completion", 0) for row in rows)
    found = [none_of("requests failed", len(failed), count, failed[:3])]
    differing = [each for row in rows for each in row["differing"]]
    what = "greedy answers differ from plain decoding's"
    found.append(none_of(what, len(differing), count - len(failed), differing[:3]))
    lost = [
        r["turn"] for r in rows if not r["in_force"] or (r["replicas"], r["left"]) != (REPLICAS, 0)
    ]
    what = "swaps do not end with the right drafter on three replicas"
    found.append(none_of(what, len(lost), len(rows), lost))
    taken = [row["turn"] for row in bad if row["refused"] is None]
    found.append(none_of("bad drafters are not refused", len(taken), len(bad), taken))
    if good:
        seconds = statistics.median(row["seconds"] for row in good)
        longest = max(row["longest_s"] for row in rows)
        found.append(f"      a rolling swap takes {seconds:.1f} s; the longest request {longest} s")
    return found
