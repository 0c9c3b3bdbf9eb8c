"""User turns that a target writes itself: where its chat template has them, and which of them are
kept. Pure.

As Magpie does (Xu et al., 2024): an aligned model that is given its template up to the user's
header goes on with what a user might say. Limits: what is kept out are repeats, lengths and
scripts; nothing here judges what a turn asks for.

    pytest tests/unit/test_train_turns.py
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.tables import SelfPrompts

_SENTINELS = ("Wombat", "quartz", "73914")
"""Contents whose first characters no tokenizer puts into one token."""
_NGRAM = 4
_GIVE_FILES = "give files of prompts in place of self:N"


@dataclass(frozen=True)
class Turn:
    """Where a user's turn begins and ends in the target's chats."""

    header: list[int]
    """Token ids up to the turn."""
    rest: str
    """Text of the header that its tokens leave out, for it would become one token with the turn's
    first word."""
    stops: list[int]
    """Tokens that end it."""
    mark: str
    """Text that ends it, where that is no token of its own; else empty."""
    endless: bool
    """Whether the template marks no end, so that a turn that was cut is as good as any."""


def find_turn(tokenizer: Any, template_args: Mapping[str, Any], eos: Sequence[int]) -> Turn:
    """Reads it off the chat template, by messages that are known.

    Args:
        eos: the target's own end tokens.

    Raises:
        TrainingError: there is no template, it refuses a user's message alone, or it does not show
            the message.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        what = "no tokenizer" if tokenizer is None else "no chat template in its tokenizer"
        raise TrainingError(
            f"the target has {what}, so it cannot write a user's turn: {_GIVE_FILES}"
        )
    texts = [_around(tokenizer, template_args, word) for word in _SENTINELS]
    header, end = texts[0]
    if any(text != texts[0] for text in texts):
        raise TrainingError(
            f"the target's chat template writes another header for another message: {_GIVE_FILES}"
        )
    ids = _ids(tokenizer, header)
    # The tokens that are the same whatever the turn begins with.
    kept = len(ids)
    for word in _SENTINELS:
        whole = _ids(tokenizer, header + word)
        kept = min(
            kept,
            next(
                (i for i, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other),
                len(whole),
            ),
        )
    rest = _text(tokenizer, ids)[len(_text(tokenizer, ids[:kept])) :]
    marks, stops = _ids(tokenizer, end)[:1], list(eos)
    is_token = bool(marks) and marks[0] in _added(tokenizer)
    if is_token:
        stops.append(marks[0])
    begin = ids[:kept] or _first(tokenizer)
    return Turn(begin, rest, sorted(set(stops)), "" if is_token else end, not end)


def opening_ids(tokenizer: Any, turn: Turn, openings: Sequence[str]) -> list[list[int]]:
    """Token ids that follow ``turn.header`` where a turn begins with each text; none for an empty
    one.

    Spaces at a text's end are left out: they would be one token with the next word.

    Raises:
        TrainingError: a text holds a token that is not made of text.
    """
    found = []
    for text in (opening.rstrip(" ") for opening in openings):
        ids = _ids(tokenizer, turn.rest + text) if text else []
        if not _added(tokenizer).isdisjoint(ids):
            raise TrainingError(f"self_openings: {text!r} holds a special token: leave it out")
        found.append(ids)
    return found


def _around(tokenizer: Any, template_args: Mapping[str, Any], word: str) -> tuple[str, str]:
    """What the template writes before a user's message ``word``, and what after."""

    def render(**more: Any) -> str:
        message = [{"role": "user", "content": word}]
        return str(
            tokenizer.apply_chat_template(message, tokenize=False, **dict(template_args) | more)
        )

    try:
        text, asked = render(add_generation_prompt=False), render(add_generation_prompt=True)
    except (
        Exception
    ) as error:  # a template is a program of the target's author, and raises what it likes
        raise TrainingError(
            f"the target's chat template refuses a user's message alone ({error}): {_GIVE_FILES}"
        ) from None
    if text.count(word) != 1 or asked.count(word) != 1:
        raise TrainingError(
            "the target's chat template does not write a user's message once, as it is:"
            f" {_GIVE_FILES}"
        )
    header, end = text.split(word)
    # Some templates mark the end of a turn by the answer's header alone.
    return header, end.strip() or asked.split(word)[1].strip()


def _first(tokenizer: Any) -> list[int]:
    """What a text begins with where the template has no header: the token before it, or the one
    between two texts."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise TrainingError(
        "the target's chat template has no header for a user, and its tokenizer no first token:"
        f" {_GIVE_FILES}"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _added(tokenizer: Any) -> set[int]:
    """Tokens that are not made of text."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


class Sieve:
    """Keeps turns, in their order, and counts those that it leaves out by the reason."""

    def __init__(self, tokenizer: Any, turn: Turn, table: SelfPrompts) -> None:
        self.tokenizer, self.turn, self.table = tokenizer, turn, table
        self.left_out: Counter[str] = Counter()
        self._added = _added(tokenizer)
        self._seen: set[bytes] = set()

    def keep(self, tokens: Sequence[int]) -> str | None:
        """The text of a turn, what it was begun with and what was sampled, or None where it is left
        out."""
        text, why = self._judge(list(tokens))
        if why is not None:
            self.left_out[why] += 1
        return text if why is None else None

    def _judge(self, tokens: list[int]) -> tuple[str, str | None]:
        turn, table = self.turn, self.table
        end = next((i for i, token in enumerate(tokens) if token in turn.stops), None)
        text, ended = _text(self.tokenizer, tokens[:end]), end is not None
        if turn.mark and turn.mark in text:
            text, ended = text[: text.index(turn.mark)], True
        if not ended and not turn.endless:
            return "", "unfinished"
        text = text.removeprefix(turn.rest).strip()
        ids = _ids(self.tokenizer, text)
        if not self._added.isdisjoint(ids):
            return "", "with special tokens"
        if len(ids) < table.self_least_tokens:
            return "", "too short"
        if "\ufffd" in text:
            return "", "with broken characters"
        if ascii_share(text) < table.self_ascii_letters:
            return "", "in other letters"
        if repetition(ids) > table.self_repetition:
            return "", "repeating themselves"
        key = normal_form(text)
        if key in self._seen:
            return "", "repeated"
        self._seen.add(key)
        return text, None


def ascii_share(text: str) -> float:
    """The share of ASCII among the letters of ``text``; 1 where it has none. It tells scripts
    apart, not languages."""
    letters = [c for c in text if c.isalpha()]
    return sum(c.isascii() for c in letters) / len(letters) if letters else 1.0


def repetition(ids: Sequence[int]) -> float:
    """The share of four tokens in a row that were there before in the same text."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def normal_form(text: str) -> bytes:
    """The same for texts that differ in case, spaces, punctuation, accents' encoding and numbers
    only: eight bytes."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"[^\W\d_]+", plain) or [plain]
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
