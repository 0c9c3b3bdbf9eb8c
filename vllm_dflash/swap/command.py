"""``vllm-dflash swap``: another drafter into running servers, one after another; or, without a
drafter, which one serves.

    vllm-dflash swap --server http://127.0.0.1:8000 DRAFTER
    pytest tests/unit/test_follow_client.py tests/engine/test_swap.py
"""

import argparse
import sys
import time
from typing import Any

from vllm_dflash.api_keys import without_secrets
from vllm_dflash.errors import printable
from vllm_dflash.swap import client


def run(args: argparse.Namespace) -> int:
    """The command; 0 where every server serves the drafter, 1 where one refused it (those after it
    were not asked), 2 where one cannot be asked."""
    key, done = client.key_of(args.api_key), list[str]()
    for i, server in enumerate(args.server):
        shown = without_secrets(server)
        try:
            if args.drafter is None:
                print(f"{shown}: {described(client.which(server, key))}")
                continue
            found = client.swap(server, key, args.drafter, args.context)
        except client.RefusedError as error:
            said = "" if args.drafter is None else "refused, the old drafter serves on: "
            print(f"vllm-dflash swap: {said}{error}", file=sys.stderr)
            _say_each(args, done, "it refused, and has the one from before", i)
            return 1
        except client.ServerError as error:
            print(f"vllm-dflash swap: {error}", file=sys.stderr)
            _say_each(args, done, "not known, it could not be asked", i)
            return 2
        done.append(f"{shown}: {found['id']}, the new one")
        print(f"{shown}: {swapped(found)}")
    return 0


def _say_each(args: argparse.Namespace, done: list[str], failed: str, at: int) -> None:
    """Which drafter each of several servers has, where the one ``at`` has not taken the new one."""
    if args.drafter is None or len(args.server) == 1:
        return
    names = [without_secrets(each) for each in args.server[at:]]
    lines = [*done, f"{names[0]}: {failed}"]
    lines += [f"{name}: the one from before, it was not asked" for name in names[1:]]
    print("\n  ".join(["the drafter of each server now:", *lines]), file=sys.stderr)


def described(found: dict[str, Any]) -> str:
    """What serves, in a line."""
    tau = found.get("proved_tau")
    proved = "no proved tau" if tau is None else f"proved tau {tau:.2f}"
    age = _age(time.time() - found.get("since", time.time()))
    said = (
        f"drafter {found['id']} ({printable(found.get('drafter'))}, {proved}), in force for {age};"
        f" {found['swaps']} swaps, {found['refusals']} refused"
    )
    if "replicas" in found:
        said += f"; {found['replicas']} replicas, of which {found['left']} are to take it yet"
    return said


def swapped(found: dict[str, Any]) -> str:
    """What a swap did, in a line."""
    note = f" ({found['context_note']})" if "context_note" in found else ""
    said = f"{found['before']} -> {found['id']}"
    if "replicas" in found:
        return f"{said} on {found['replicas']} replicas, one after another"
    return f"{said} ({printable(found.get('drafter'))}), context: {found['context']}{note}"


def _age(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.0f} seconds"
