"""``vllm-dflash refresh``: a drafter for what is served now, from the one that serves.

A round takes the newest traffic, lets the target answer what has no answer, measures the old
drafter on a held-out part, goes on training it within a budget, measures the new one on the same
part, and keeps it only where it is better by more than its interval and vLLM serves it as training
said. The trainer, its stages and its proof are ``vllm-dflash train``'s. A round that is refused
changes nothing.

    vllm-dflash refresh --server http://127.0.0.1:8000 --traffic traffic --out refreshed
    pytest tests/unit/test_follow_refresh.py tests/engine/test_refresh.py
"""

import argparse
import os
import sys
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path

from vllm_dflash import hub
from vllm_dflash.api_keys import refused_key, without_secrets
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.files import RunError, read_record, write_record
from vllm_dflash.follow.rounds import Rounds
from vllm_dflash.follow.take import Options, refresh
from vllm_dflash.follow.watch import SHAPE, Serving, look, record_of, threshold, utc
from vllm_dflash.lock import hold
from vllm_dflash.metrics.figures import Scrape
from vllm_dflash.metrics.top import address, fetch
from vllm_dflash.regular import is_folder
from vllm_dflash.swap import client
from vllm_dflash.swap.turns import RECOMPUTE
from vllm_dflash.training.errors import SettingsError
from vllm_dflash.training.line_writer import MAX_DAYS, age_of
from vllm_dflash.training.pipeline import INTERRUPTED, STOPPED

KEPT_STATUS, FAILED, USAGE, NOT_BETTER = 0, 1, 2, 3
_SHOWN_IN_HUNDREDTHS = 0.1
"""From there on; tau is 1 at least, a limit is anything."""


def run(args: argparse.Namespace) -> int:
    """The command; see its ``--help`` for what it ends with."""
    try:
        return _run(args)
    except (SettingsError, DrafterConfigError, client.ServerError, _UsageError) as error:
        print(f"vllm-dflash refresh: {error}", file=sys.stderr)
        return USAGE
    except RunError as error:
        print(f"vllm-dflash refresh: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\nvllm-dflash refresh: {STOPPED}", file=sys.stderr)
        return INTERRUPTED


class _UsageError(RunError):
    """What is asked for cannot be done as it is asked."""


def _run(args: argparse.Namespace) -> int:
    rounds, key = Rounds(args.out), client.key_of(args.api_key)
    scrape = _scrape(args.server, key) if args.server else None
    if args.swap and args.server:
        client.which(args.server, key)  # before the work: a key that is wrong, or no endpoint
    options = _options(args, Serving.of(scrape).drafters if scrape else (), rounds)

    def look_again() -> str | None:
        return _meanwhile(args.server, key, scrape) if scrape else None

    with hold(args.out, "vllm-dflash refresh"):
        open_round = rounds.settle()
        if args.swap and _catches_up(rounds, args.server, key):
            return KEPT_STATUS
        if args.when_below is not None and open_round is None:
            assert scrape is not None, "the flags' check sees to it"
            if not _has_fallen(rounds, scrape, args.when_below):
                return KEPT_STATUS
        kept = refresh(options, rounds, open_round, look_again)
        if kept and args.swap and "meanwhile" not in rounds.kept()[-1].notes():
            _swap(rounds, args.server, key)
    return KEPT_STATUS if kept else NOT_BETTER


def _options(args: argparse.Namespace, serving: Sequence[str], rounds: Rounds) -> Options:
    """What the flags and the server, with the drafters that its engines have, say.

    Raises:
        _UsageError: neither says what is needed, or flags contradict each other.
    """
    for flag in ("when_below", "swap"):
        if getattr(args, flag) and args.server is None:
            raise _UsageError(f"--{flag.replace('_', '-')} asks a server: give it with --server")
    sources = tuple(Path(each) for each in (*(args.traffic or ()), *(args.prompts or ())))
    if not sources:
        raise _UsageError(
            "nothing to learn from: give the recorder's folder with --traffic, or files with"
            " --prompts"
        )
    key = client.key_of(args.api_key)
    target = args.target or (_target_of(args.server, key) if args.server else None)
    if args.target is None and target is not None:
        _check_here(target, "--target")
    if target is None:
        raise _UsageError("give the target with --target, or a server that has it with --server")
    if len(serving) > 1 and args.draft is None:
        raise _UsageError(
            f"the server's engines have different drafters ({', '.join(serving)}): swap one in, or"
            " give --draft"
        )
    if args.draft is None and serving:
        _check_here(serving[0], "--draft")
    draft = args.draft or next(iter(serving), str(rounds.link) if rounds.link.exists() else None)
    if draft is None:
        raise _UsageError("give the drafter that serves with --draft, or its server with --server")
    return Options(
        target,
        draft,
        sources,
        args.settings,
        args.minutes if args.tokens is None else None,
        args.tokens,
        args.held_out,
        args.most_prompts,
        args.dtype,
        _days(),
    )


def _days() -> float | None:
    try:
        return age_of(os.environ.get(MAX_DAYS))
    except RunError as error:
        raise _UsageError(str(error)) from None


def _check_here(path: str, flag: str) -> None:
    """What a server calls by a path that leads nowhere from here cannot be meant.

    Raises:
        _UsageError: it is a path of another folder, or of another machine.
    """
    if hub.is_path(path) and not is_folder(path):
        raise _UsageError(
            f"the server calls it {path}, and there is no such folder here: give it with {flag}, or"
            " start this command in the folder that the server was started in"
        )


def _target_of(server: str, key: str | None) -> str:
    from vllm_dflash.evaluation.methods import UsageError
    from vllm_dflash.evaluation.server import connect

    try:
        return connect(server if "://" in server else f"http://{server}", key)[1]
    except UsageError as error:
        raise _UsageError(str(error)) from None


def _scrape(server: str, key: str | None) -> Scrape:
    shown = without_secrets(server)
    try:
        scrape = fetch(address(server), key)
    except urllib.error.HTTPError as error:
        why = f"does not answer with metrics ({error})"
        said = refused_key(key) if error.code in (401, 403) else why
        raise client.ServerError(f"{shown} {said}") from None
    except (OSError, ValueError) as error:
        why = client.why_not(server, error)
        raise client.ServerError(
            f"{shown} does not answer with metrics ({why}): {client.GIVE_ONE}"
        ) from None
    if not scrape.engines():
        raise client.ServerError(f"{shown} has no metrics of a drafter of vllm-dflash")
    return scrape


def _meanwhile(server: str, key: str | None, before: Scrape) -> str | None:
    """The id of a drafter that came into the server since ``before``; None where there is none, or
    the server does not answer any more."""
    try:
        now = Serving.of(_scrape(server, key)).id
    except client.ServerError:
        return None
    return now if now != Serving.of(before).id else None


def _has_fallen(rounds: Rounds, now: Scrape, when_below: float) -> bool:
    """Whether acceptance is below, over the time since the last look; says what was seen, and
    leaves it for the next look."""
    before = read_record(rounds.watch, SHAPE, "remove it: the next look begins anew")
    limit = threshold(when_below, Serving.of(now).proved)
    if limit is None:
        raise _UsageError(
            f"--when-below {when_below:g} is a share of what the drafter was proved at, and its"
            " folder does not say that: give a tau above 1"
        )
    found = look(now, before)
    below = found is not None and found.is_below(limit)
    since = (before or {}).get("below_since") if below else None
    since = (since or time.time()) if below else None
    record = record_of(now, time.time())
    write_record(rounds.watch, record | {"below_since": since})
    if found is None:
        said = (
            "has come into the server since it began, and this is the first look"
            if before is None
            else "is new since the last look"
        )
        rounds.say(f"drafter {record['id']} {said}: the next one judges it")
        return False
    shown = f"{limit:.2f}" if limit >= _SHOWN_IN_HUNDREDTHS else f"{limit:.2g}"
    if since is None:
        rounds.say(f"{found}; not below {shown}: nothing to do")
    else:
        rounds.say(f"{found}; below {shown} since {utc(since)}: a refresh")
    return below


def _catches_up(rounds: Rounds, server: str, key: str | None) -> bool:
    """Has the server put the drafter in force that was kept last, where it has another: it was
    started anew, or a refresh was stopped before its swap. Not where a person has swapped another
    in since."""
    from vllm_dflash.weights.identity import id_of_folder

    if not (kept := rounds.kept()):
        return False
    found = client.which(server, key)
    is_other, notes = found["id"] != id_of_folder(kept[-1].drafter), kept[-1].notes()
    if not is_other or ("swapped_into" in notes and found["swaps"]):
        return False
    if notes.get("meanwhile") == found["id"]:
        return False
    rounds.say(f"{server} does not serve {rounds.link}, which was kept last")
    _swap(rounds, server, key)
    return True


def _swap(rounds: Rounds, server: str, key: str | None) -> None:
    from vllm_dflash.swap.command import swapped

    newest = rounds.kept()[-1]
    shown = without_secrets(server)
    try:
        found = client.swap(server, key, str(newest.drafter.resolve()), RECOMPUTE)
    except RunError as error:
        rounds.say(
            f"{newest.name} is kept, and not swapped in: {error}; the same command tries again"
        )
        raise RunError(f"{shown} does not serve {rounds.link}, which was kept") from None
    newest.note(swapped_into=shown)
    rounds.say(f"{shown}: {swapped(found)}")
