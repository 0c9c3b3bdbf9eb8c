"""One round of a refresh: traffic, answers, the old drafter's tau, training, the new one's, and the
decision. Each stage is taken up where a killed one stopped.

    pytest tests/unit/test_follow_refresh.py tests/engine/test_refresh.py
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash import contents, hub, smollm2
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import RunError, whole_file, write_record
from vllm_dflash.follow.interval import Comparison, compare
from vllm_dflash.follow.rounds import KEPT, LEFT, REFUSED, Round, Rounds
from vllm_dflash.follow.traffic import gather
from vllm_dflash.serving_drafter import NOTE
from vllm_dflash.training import settings as training_settings
from vllm_dflash.training.errors import SettingsError


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

    old, measured, plan = Path(_folder(options.draft)), current.measured(), current.plan()
    # With the steps that are known: what is trained already is not for other ones.
    settings = _settings(options, current, steps=None if plan is None else plan["steps"])
    pipeline.run_stages(settings, ("generate", "features"))
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
