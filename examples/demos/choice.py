"""Which pair the demo runs, and why.

pytest tests/unit/test_demo.py
"""

from dataclasses import dataclass
from pathlib import Path

from vllm_dflash import smollm2

SMOLLM2, TINY = PAIRS = ("smollm2", "tiny")
EXAMPLES = Path(__file__).resolve().parents[1]
CHAT = EXAMPLES / SMOLLM2
DRAFTERS = ("dflash", "dflare")
"""Folders in ``CHAT`` that may hold a drafter; the first that does is taken."""


class ChoiceError(RuntimeError):
    """What was asked for cannot be run; the message says what to do."""


@dataclass(frozen=True)
class Pair:
    """A target and its drafter."""

    name: str
    target: Path
    drafter: Path
    why: str = ""
    """For the user, where it is not plain why this pair was taken."""


def choose(asked: str | None, draft: Path | None) -> Pair:
    """The pair to run; SmolLM2 is fetched here.

    Args:
        asked: one of ``PAIRS``; None: SmolLM2 where there is a drafter for it.
        draft: a drafter for SmolLM2 in place of that in ``CHAT``.

    Raises:
        ChoiceError: SmolLM2 was asked for, and there is no drafter for it; ``draft`` is none, or
            not for the pair that was asked for.
    """
    if asked == TINY:
        if draft is not None:
            raise ChoiceError("--draft is for the pair smollm2: leave out one of the two")
        return _tiny("")
    drafter = _drafter(draft)
    if drafter is None:
        missing = f"no drafter for SmolLM2 stands in examples/{SMOLLM2}"
        if asked == SMOLLM2:
            raise ChoiceError(
                f"{missing}: name one by --draft FOLDER (`vllm-dflash train --target smollm2"
                " --prompts self:20000 --out RUN` makes one, in RUN/drafter), or take PAIR=tiny"
            )
        return _tiny(f"This is the embedded pair: {missing} yet.")
    try:
        return Pair(SMOLLM2, Path(smollm2.resolve(smollm2.NAME)), drafter)
    except smollm2.SmolLM2Error as error:
        return _tiny(f"This is the embedded pair, for SmolLM2 cannot be had: {error}.")


def _tiny(why: str) -> Pair:
    pair = EXAMPLES / "embedded_pair"
    return Pair(TINY, pair / "target", pair / "dflash", why)


def _drafter(draft: Path | None) -> Path | None:
    if draft is not None and not (draft / "config.json").is_file():
        raise ChoiceError(f"--draft {draft} holds no drafter: give a folder with a config.json")
    folders = [draft] if draft is not None else [CHAT / name for name in DRAFTERS]
    return next((path for path in folders if (path / "config.json").is_file()), None)
