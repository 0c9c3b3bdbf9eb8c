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
import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash import contents, hub, smollm2
from vllm_dflash.config import DrafterConfig, DrafterConfigError
from vllm_dflash.files import RunError, read_record, whole_file, write_record
from vllm_dflash.follow.interval import Comparison, compare
from vllm_dflash.follow.rounds import KEPT, LEFT, REFUSED, Round, Rounds
from vllm_dflash.follow.traffic import gather
from vllm_dflash.follow.watch import SHAPE, Counted, look, threshold
from vllm_dflash.lock import hold
from vllm_dflash.metrics.top import address, fetch
from vllm_dflash.serving_drafter import NOTE
from vllm_dflash.swap import client
from vllm_dflash.swap.turns import RECOMPUTE
from vllm_dflash.training import settings as training_settings
from vllm_dflash.training.errors import SettingsError

KEPT_STATUS, FAILED, USAGE, NOT_BETTER = 0, 1, 2, 3


@dataclass(frozen=True)
class Options:
    """What a refresh is asked for."""

    target: str
    draft: str
    """The drafter that serves: a folder, or a hub id that is downloaded."""
    out: Path
    sources: tuple[Path, ...]
    """The recorder's folder, and files of prompts."""
    settings: str | None = None
    """A TOML file of ``vllm-dflash train``'s."""
    minutes: float | None = None
    """Of training; or ``tokens``."""
    tokens: int | None = None
    """Drafted tokens that are learned from."""
    held_out: int = 64
    most_prompts: int = 20000
    days: float | None = None
    dtype: str | None = None
    """Of the target, as it is served; None: the settings'."""


def run(args: argparse.Namespace) -> int:
    """The command; see its ``--help`` for what it ends with."""
    try:
        return _run(args)
    except (SettingsError, client.ServerError, _UsageError) as error:
        print(f"vllm-dflash refresh: {error}", file=sys.stderr)
        return USAGE
    except (RunError, DrafterConfigError) as error:
        print(f"vllm-dflash refresh: {error}", file=sys.stderr)
        return FAILED


class _UsageError(RunError):
    """What is asked for cannot be done as it is asked."""


def _run(args: argparse.Namespace) -> int:
    rounds, key = Rounds(args.out), client.key_of(args.api_key)
    serving = Counted.of(_scrape(args.server)) if args.server else None
    options = _options(args, serving, rounds)
    with hold(args.out, "vllm-dflash refresh"):
        open_round = rounds.settle()
        if args.swap and _catches_up(rounds, args.server, key):
            return KEPT_STATUS
        if args.when_below is not None and open_round is None:
            assert serving is not None, "the flags' check sees to it"
            if not _has_fallen(rounds, serving, args.when_below):
                return KEPT_STATUS
        kept = refresh(options, rounds, open_round)
        if kept and args.swap:
            _swap(rounds, args.server, key)
    return KEPT_STATUS if kept else NOT_BETTER


def refresh(options: Options, rounds: Rounds, open_round: Round | None) -> bool:
    """Takes a round to its decision, one that was begun before or a new one; whether the new
    drafter is kept.

    Raises:
        RunError: a stage cannot go on; the same command does from there.
    """
    now = _about(options)
    if open_round is not None:
        begun = open_round.asked()
        assert begun is not None, "settle has looked"
        if any(begun[name] != now[name] for name in ("target_files", "draft_id")):
            line = f"{open_round.name} was for another target or drafter: it is left"
            open_round.decide(LEFT, line)
            rounds.say(line)
            rounds.settle()
            open_round = None
        else:
            rounds.say(f"{open_round.name} goes on where it was stopped")
            options = dataclasses.replace(options, minutes=begun["minutes"], tokens=begun["tokens"])
    current = open_round or _begin(options, rounds, now)
    decision, line, tau = _take(options, rounds, current)
    current.decide(decision, line, tau=tau)
    rounds.say(f"{current.name}, {decision}: {line}")
    rounds.settle()
    return decision == KEPT


def _begin(options: Options, rounds: Rounds, about: Mapping[str, Any]) -> Round:
    found = gather(options.sources, about["target_files"], options.most_prompts, options.days)
    new = rounds.new()
    with whole_file(new.traffic) as file:
        new.traffic.parent.chmod(0o700)
        file.write("".join(f"{line}\n" for line in found.lines).encode())
    new.begin(about)
    rounds.say(f"{new.name}: {found}; begins from drafter {about['draft_id']} ({about['draft']})")
    return new


def _take(options: Options, rounds: Rounds, current: Round) -> tuple[str, str, float | None]:
    """A round's stages: its decision, a line about it, and the new drafter's tau."""
    from vllm_dflash.training import pipeline

    old, settings = Path(_folder(options.draft)), _settings(options, current, steps=None)
    pipeline.run_stages(settings, ("generate", "features"))
    measured = current.measured()
    plan = current.plan()
    if "old" not in measured or plan is None:
        measured, plan = _before(options, rounds, current, settings, old)
    settings = _settings(options, current, steps=plan["steps"])
    pipeline.run_stages(settings, ("train",))
    if "new" not in measured:
        from vllm_dflash.training import learned

        fitted, found, model = _loaded(settings)
        measured = measured | {"new": _counts(fitted, found, model, learned.trained_folder(fitted))}
        current.note_measured(measured)
    try:
        compared = compare(measured["old"], measured["new"])
    except ValueError as error:
        raise RunError(
            f"{current.name} measured nothing ({error}): its held-out answers are too short; set"
            " prove_tokens in the table [prove] of the settings, and remove the round's folder"
        ) from None
    if not compared.is_better:
        return REFUSED, f"{compared}: not better by more than its interval", compared.new
    if not pipeline.run_stages(settings, ("prove", "export")):
        line = f"{compared}, but vLLM does not serve it as training said (prove.json)"
        return REFUSED, line, compared.new
    _note(options, current, compared)
    return KEPT, f"{compared}: {rounds.link} leads to it", compared.new


def _before(
    options: Options, rounds: Rounds, current: Round, settings: Any, old: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known before training: the old drafter's counts, and how many steps there are to
    be."""
    fitted, found, model = _loaded(settings)
    measured = current.measured()
    if "old" not in measured:
        measured = measured | {"old": _counts(fitted, found, model, old)}
        current.note_measured(measured)
    tau = 1 + sum(c[1] for c in measured["old"]) / max(1, sum(c[0] for c in measured["old"]))
    rounds.say(f"{current.name}: the old drafter has tau {tau:.2f} on this traffic")
    seconds = None
    if options.tokens is not None:
        steps = _steps_for(options.tokens, fitted)
    else:
        from vllm_dflash.follow.measure import seconds_a_step, steps_in
        from vllm_dflash.training import pipeline

        assert options.minutes is not None
        _, _, config, _ = pipeline.plan(settings)
        seconds = seconds_a_step(fitted, config, found, model)
        steps = steps_in(options.minutes, seconds)
    current.note_plan(steps, seconds)
    budget = f"{options.tokens} tokens" if seconds is None else f"{options.minutes:g} minutes"
    each = "" if seconds is None else f" of {seconds:.2f} s"
    rounds.say(f"{current.name}: {steps} steps{each} for the budget of {budget}")
    plan = current.plan()
    assert plan is not None, "it was written just now"
    return measured, plan


def _steps_for(tokens: int, settings: Any) -> int:
    table = settings.train
    return max(
        1, tokens // (table.batch_size * table.anchors * max(1, settings.drafter.block_size - 1))
    )


def _counts(settings: Any, found: Any, model: Any, drafter: Path) -> list[list[int]]:
    from vllm_dflash.follow.measure import counts

    return counts(settings, found, model, drafter)


def _loaded(settings: Any) -> tuple[Any, Any, Any]:
    """The settings with what was left open, the target, and its model."""
    from vllm_dflash.training import pipeline, target

    fitted, found, _, _ = pipeline.plan(settings)
    return fitted, found, target.load_target(found, fitted, target.device())


def _settings(options: Options, current: Round, steps: int | None) -> Any:
    """The training's: the user's file, and what a refresh decides."""
    folder = _folder(options.draft)
    config = DrafterConfig.from_pretrained(folder)
    flags: dict[str, Any] = {
        "target": options.target,
        "out": str(current.run),
        "prompts": [str(current.traffic)],
        "held_out": options.held_out,
        "prove_prompts": options.held_out,
        "kind": config.kind,
        "block_size": config.block_size,
        "init": folder,
    }
    if steps is not None:
        flags["steps"] = steps
    if options.dtype is not None:
        flags["dtype"] = options.dtype
    found = training_settings.load(options.settings, flags)
    if found.train.workers > 1 and options.minutes is not None:
        raise SettingsError(
            f"workers is {found.train.workers}, and minutes are counted in steps of one process:"
            " give --tokens in place of --minutes"
        )
    return found


def _note(options: Options, current: Round, compared: Comparison) -> None:
    """Notes in the new drafter's folder what it was proved at, and for which target."""
    write_record(
        current.drafter / NOTE,
        {
            "tau": compared.new,
            "tau_before": compared.old,
            "half_interval": compared.half,
            "prompts": compared.prompts,
            "target": options.target,
            "target_files": _target_files(options),
            "from": options.draft,
            "made": time.time(),
        },
    )


def _about(options: Options) -> dict[str, Any]:
    from vllm_dflash.follow.folders import id_of_folder

    return {
        "target": options.target,
        "target_files": _target_files(options),
        "draft": options.draft,
        "draft_id": id_of_folder(Path(_folder(options.draft))),
        "minutes": options.minutes,
        "tokens": options.tokens,
    }


def _target_files(options: Options) -> str | None:
    return contents.of_folder(smollm2.resolve(options.target))


def _folder(draft: str) -> str:
    """The drafter's folder, with no link in its place, which may lead elsewhere later."""
    found = hub.drafter_folder(draft, None)
    if found is None:
        raise hub.no_drafter_at(draft)
    return str(found.resolve())


def _options(args: argparse.Namespace, serving: Counted | None, rounds: Rounds) -> Options:
    """What the flags and the server say.

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
    target = args.target or (_target_of(args.server) if args.server else None)
    if target is None:
        raise _UsageError("give the target with --target, or a server that has it with --server")
    draft = args.draft
    if draft is None and serving is not None and serving.drafter:
        if ", " in serving.drafter:
            raise _UsageError(
                f"the server's engines have different drafters ({serving.drafter}): swap one in,"
                " or give --draft"
            )
        draft = serving.drafter
    if draft is None and rounds.link.exists():
        draft = str(rounds.link)
    if draft is None:
        raise _UsageError("give the drafter that serves with --draft, or its server with --server")
    minutes = args.minutes if args.minutes is not None or args.tokens is not None else 15.0
    return Options(
        target,
        draft,
        args.out,
        sources,
        args.settings,
        minutes if args.tokens is None else None,
        args.tokens,
        args.held_out,
        args.most_prompts,
        args.newer_than,
        args.dtype,
    )


def _target_of(server: str) -> str:
    from vllm_dflash.evaluation.methods import UsageError
    from vllm_dflash.evaluation.server import connect

    try:
        return connect(server if "://" in server else f"http://{server}")[1]
    except UsageError as error:
        raise _UsageError(str(error)) from None


def _scrape(server: str) -> Any:
    try:
        scrape = fetch(address(server))
    except (OSError, ValueError) as error:
        raise client.ServerError(f"{server} does not answer with metrics ({error})") from None
    if not scrape.engines():
        raise client.ServerError(f"{server} has no metrics of a drafter of vllm-dflash")
    return scrape


def _has_fallen(rounds: Rounds, now: Counted, when_below: float) -> bool:
    """Whether acceptance is below, over the time since the last look; says what was seen, and
    leaves it for the next look."""
    before = read_record(rounds.watch, SHAPE, "remove it: the next look begins anew")
    limit = threshold(when_below, now.proved)
    if limit is None:
        raise _UsageError(
            f"--when-below {when_below:g} is a share of what the drafter was proved at, and its"
            " folder does not say that: give a tau above 1"
        )
    found = look(now, before)
    below = found is not None and found.is_below(limit)
    since = (before or {}).get("below_since") if below else None
    since = (since or time.time()) if below else None
    write_record(
        rounds.watch,
        {"seconds": time.time(), "id": now.id, "counts": now.as_record(), "below_since": since},
    )
    if found is None:
        rounds.say(f"drafter {now.id} is new since the last look: the next one judges it")
        return False
    verdict = f"below {limit:.2f}: a refresh" if below else f"not below {limit:.2f}: nothing to do"
    rounds.say(f"{found}; {verdict}")
    return below


def _catches_up(rounds: Rounds, server: str, key: str | None) -> bool:
    """Has the server put the drafter in force that was kept last, where it has another: it was
    started anew, or a refresh was stopped before its swap. Not where a person has swapped another
    in since."""
    from vllm_dflash.follow.folders import id_of_folder

    kept = rounds.kept()
    if not kept:
        return False
    found = client.which(server, key)
    is_other = found["id"] != id_of_folder(kept[-1].drafter)
    if not is_other or (kept[-1].was_swapped_in() and found.get("swapped")):
        return False
    rounds.say(f"{server} does not serve {rounds.link}, which was kept last")
    _swap(rounds, server, key)
    return True


def _swap(rounds: Rounds, server: str, key: str | None) -> None:
    from vllm_dflash.swap.command import swapped

    newest = rounds.kept()[-1]
    found = client.swap(server, key, str(newest.drafter.resolve()), RECOMPUTE)
    newest.note_swapped_in(server)
    rounds.say(f"{server}: {swapped(found)}")
