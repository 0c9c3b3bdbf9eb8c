"""One round of a refresh: traffic, answers, the old drafter's tau, training, the new one's, and the
decision. Each stage is taken up where a killed one stopped.

    pytest tests/unit/test_follow_refresh.py tests/unit/test_follow_kills.py
    pytest tests/engine/test_refresh.py
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash import contents, hub, smollm2
from vllm_dflash.acceptance import tau
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import RunError, remove, whole_file, write_record
from vllm_dflash.follow.interval import compare
from vllm_dflash.follow.rounds import KEPT, LEFT, REFUSED, Round, Rounds
from vllm_dflash.follow.traffic import gather
from vllm_dflash.serving_drafter import NOTE, WEIGHTS
from vllm_dflash.training import settings as training_settings
from vllm_dflash.training.errors import SettingsError, TrainingError
from vllm_dflash.training.pipeline import how_to_serve

_DAY_S = 86400.0


@dataclass(frozen=True)
class Options:
    """What a refresh is asked for."""

    target: str
    draft: str
    """The drafter that serves: a folder, or a hub id that is downloaded."""
    sources: tuple[Path, ...]
    """The recorder's folders, and files of prompts."""
    settings: str | None
    """A TOML file of ``vllm-dflash train``'s."""
    minutes: float | None
    """Of training; or ``tokens``."""
    tokens: int | None
    """Drafted tokens that are learned from."""
    held_out: int
    most_prompts: int
    dtype: str | None
    """Of the target, as it is served; None: the settings'."""
    days: float | None = None
    """How long users' texts are kept for; None: as long as the round runs."""

    def asked(self) -> dict[str, Any]:
        """What a round is begun with and has to go on with, by names that a user knows."""
        return {
            "--traffic and --prompts": [str(source.absolute()) for source in self.sources],
            "--minutes": self.minutes,
            "--tokens": self.tokens,
            "--held-out": self.held_out,
            "--most-prompts": self.most_prompts,
            "--dtype": self.dtype,
            "the settings": training_settings.digest(self.settings),
        }


Look = Callable[[], str | None]
"""At the server, before the decision: the id of a drafter that has come into it meanwhile."""


def refresh(options: Options, rounds: Rounds, open_round: Round | None, look: Look) -> bool:
    """Takes a round to its decision, one that was begun before or a new one; whether the new
    drafter is kept.

    Raises:
        SettingsError: the target or the settings cannot be used, or an open round was begun with
            other flags; no round is begun, and none is left.
        RunError: a stage cannot go on; the same command does from there.
    """
    _check_target(options, rounds)
    about = _about(options)
    if open_round is not None:
        begun = open_round.notes()
        if any(begun[name] != about[name] for name in ("target_files", "draft_id")):
            _decide(rounds, open_round, LEFT, "it was for another target or drafter")
            open_round = None
        elif _is_old(open_round, options.days):
            _decide(rounds, open_round, LEFT, f"its texts are older than {options.days:g} days")
            open_round = None
        else:
            _check_asked(begun, about, open_round)
            rounds.say(f"{open_round.name} goes on where it was stopped")
    current = open_round or _begin(options, rounds, about)
    try:
        decision, line = _take(options, rounds, current)
    except RunError as error:
        raise _of_the_users_file(current, error) from None
    if decision == KEPT and (other := look()) is not None:
        current.note(meanwhile=other)
        line += (
            f". The server has had drafter {other} put in meanwhile, from which this one was not"
            " trained and against which it was not measured: it is not swapped in. Put it in"
            f" by hand (vllm-dflash swap --server URL {rounds.link.absolute()}), or refresh again,"
            " from what serves now"
        )
    _decide(rounds, current, decision, line)
    if decision == KEPT:
        print(how_to_serve(smollm2.resolve(options.target), rounds.link))
    return decision == KEPT


def _check_target(options: Options, rounds: Rounds) -> None:
    from vllm_dflash.training.target import find_target

    try:
        find_target(_settings(options, Round(rounds.out / "rounds" / "0"), None))
    except TrainingError as error:
        raise SettingsError(str(error)) from None


def _check_asked(begun: Mapping[str, Any], about: Mapping[str, Any], open_round: Round) -> None:
    """An open round is not for other texts, and not learned from in another way."""
    asked = begun.get("asked", {})
    other = [name for name, value in about["asked"].items() if asked.get(name, value) != value]
    if other:
        raise SettingsError(
            f"{open_round.name} was stopped, and was begun with other {', '.join(other)}: give the"
            f" flags that it was begun with, or remove {open_round.folder} to begin anew"
        )


def _is_old(left: Round, days: float | None) -> bool:
    """Whether a round that was stopped holds texts for too long by now."""
    if days is None or not left.traffic.is_file():
        return False
    return time.time() - left.traffic.stat().st_mtime > days * _DAY_S


def _of_the_users_file(current: Round, error: RunError) -> RunError:
    """A refusal of a line of the copy, as one of the line that was copied. The round is removed, so
    that the next takes the file as it was mended."""
    found = re.search(rf"{re.escape(str(current.traffic))}, line (\d+)", str(error))
    if found is None or not current.origins.is_file():
        return error
    origins = current.origins.read_text().split("\n")
    said = str(error).replace(found[0], origins[int(found[1]) - 1])
    remove(current.folder)
    return type(error)(said)


def _decide(rounds: Rounds, current: Round, decision: str, line: str) -> None:
    current.note(decision=decision, line=line)
    rounds.say(f"{current.name}, {decision}: {line}")
    rounds.settle()


def _begin(options: Options, rounds: Rounds, about: Mapping[str, Any]) -> Round:
    found = gather(options.sources, about["target_files"], options.most_prompts)
    new = rounds.new()
    for path, lines in ((new.origins, found.origins), (new.traffic, found.lines)):
        with whole_file(path, 0o600) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    new.note(**about)
    rounds.say(f"{new.name}: {found}; begins from drafter {about['draft_id']} ({about['draft']})")
    return new


def _take(options: Options, rounds: Rounds, current: Round) -> tuple[str, str]:
    """A round's stages: its decision, and a line about it."""
    from vllm_dflash.training import learned, pipeline
    from vllm_dflash.weights.identity import id_of_folder

    notes = current.notes()
    # With the steps that are known: what is trained already is not for other ones.
    settings = _settings(options, current, notes.get("steps"))
    pipeline.run_stages(settings, ("generate", "features"))
    if "steps" not in notes:
        notes = _before(options, rounds, current, settings)
    settings = _settings(options, current, notes["steps"])
    pipeline.run_stages(settings, ("train",), minutes=options.minutes)
    if "new" not in notes:
        done = learned.result(settings)["steps"]
        if done < notes["steps"]:
            rounds.say(
                f"{current.name}: {done} of {notes['steps']} steps, then the {options.minutes:g}"
                " minutes were over: goes on with what was learned"
            )
        from vllm_dflash.follow.measure import Measure

        measure = Measure(settings)
        notes = current.note(new=measure.counts(learned.trained_folder(measure.settings)))
    compared = compare(notes["old"], notes["new"])
    if not compared.is_better:
        return REFUSED, f"{compared}: not better by more than its interval"
    if not pipeline.run_stages(settings, ("prove", "export"), says_how_to_serve=False):
        return REFUSED, f"{compared}, but vLLM does not serve it as training said (prove.json)"
    note = {
        "tau": compared.new,
        "tau_before": compared.old,
        "half_interval": compared.half,
        "prompts": compared.prompts,
        "target": options.target,
        "target_files": notes["target_files"],
        "from": options.draft,
        WEIGHTS: id_of_folder(current.drafter),
    }
    write_record(current.drafter / NOTE, note)
    return KEPT, f"{compared}: {rounds.link} leads to it"


def _before(options: Options, rounds: Rounds, current: Round, settings: Any) -> dict[str, Any]:
    """Notes the old drafter's counts, and how many steps there are to be."""
    from vllm_dflash.follow.measure import Measure

    measure = Measure(settings)
    old = measure.counts(Path(_folder(options.draft)))
    found = tau(sum(count[1] for count in old), sum(count[0] for count in old))
    if found is None:
        raise RunError(
            f"{current.name}: its held-out answers are too short to draft for; set prove_tokens in"
            " the table [prove] of the settings, and remove the round's folder"
        )
    if len(old) < options.held_out:
        rounds.say(
            f"{current.name}: {len(old)} prompts are held out, not {options.held_out}: at most half"
            " of those that are left without repeats"
        )
    rounds.say(f"{current.name}: the old drafter has tau {found:.2f} on this traffic")
    if options.tokens is None:
        assert options.minutes is not None
        in_time, most = measure.steps_in(options.minutes)
        steps, budget = min(in_time, most), f"{options.minutes:g} minutes"
        if in_time > most:
            budget += (
                f", which has time for {in_time}: more than {settings.train.epochs:g} passes over"
                " these answers teach little (epochs in the table [train])"
            )
    else:
        steps, budget = measure.steps_for(options.tokens), f"{options.tokens} tokens"
    rounds.say(f"{current.name}: {steps} steps for the budget of {budget}")
    return current.note(old=old, steps=steps)


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
    decided = {*flags, "steps", "head", "held_out_prompts"}
    flags |= {} if steps is None else {"steps": steps}
    flags |= {} if options.dtype is None else {"dtype": options.dtype}
    found = training_settings.load(options.settings, flags, decided)
    if found.train.workers > 1 and options.minutes is not None:
        raise SettingsError(
            f"workers is {found.train.workers}, and minutes are counted in steps of one process:"
            " give --tokens in place of --minutes"
        )
    return found


def _about(options: Options) -> dict[str, Any]:
    from vllm_dflash.weights.identity import id_of_folder

    return {
        "target": options.target,
        "target_files": contents.of_folder(smollm2.resolve(options.target)),
        "draft": options.draft,
        "draft_id": id_of_folder(Path(_folder(options.draft))),
        "minutes": options.minutes,
        "tokens": options.tokens,
        "asked": options.asked(),
    }


def _folder(draft: str) -> str:
    """The drafter's folder, with no link in its place, which may lead elsewhere later."""
    found = hub.drafter_folder(draft, None)
    if found is None:
        raise hub.no_drafter_at(draft)
    return str(found.resolve())
