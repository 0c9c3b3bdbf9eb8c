"""The types of flags' values, one set for all commands: each says what is wrong, and what to give.

pytest tests/unit/test_flags.py
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_dflash.api_keys import without_secrets

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""That a model runs in; auto is its own."""
MOST_TOKENS = 1 << 24
"""Of a prompt or an answer: more positions than any model has."""
MOST_AT_ONCE = 1 << 16
"""Requests in flight, and replicas: more than any machine or cluster takes."""
MOST_DEVICES = 1 << 10
"""Of one engine."""
MOST_SECONDS = 86400.0
_MOST = (1 << 31) - 1
_LARGEST_PORT = (1 << 16) - 1
_Flag = argparse.ArgumentTypeError


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """The type of a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        # Python refuses to read numbers of thousands of digits.
        try:
            value = int(text)
        except ValueError:
            raise _Flag(f"{_short(text)} is no whole number: give one from {least}") from None
        if value < least:
            raise _Flag(f"{_short(value)} is less than {least}")
        if value > most:
            raise _Flag(f"{_short(value)} is more than {most}")
        return value

    return parse


count = whole(1)
port = whole(1, _LARGEST_PORT)


def real(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of a number from ``least``, or ``above`` it, to ``most``."""
    said = f"give one {'above' if above else 'from'} {least:g}, up to {most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _Flag(f"{_short(text)} is no number: {said}") from None
        if not least <= value <= most or (above and value == least):  # NaN is not, either
            raise _Flag(f"{_short(text)} cannot be: {said}")
        return value

    return parse


seconds = real(0, MOST_SECONDS, above=True)
temperature = real(0, 1000)


def given(text: str) -> str:
    """The type of a name or an address: not empty."""
    if not text.strip():
        raise _Flag("it is empty: give a value, or leave the flag out")
    return text


def address(text: str) -> str:
    """The type of a server's address, by http or https; without a scheme it is http."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_one = False
    if not is_one:
        raise _Flag(
            f"{_short(without_secrets(text))} is no address of a server: give one such as"
            " http://127.0.0.1:8000"
        )
    return text


def path(text: str) -> Path:
    """The type of a path; an empty one would be the current folder."""
    return Path(given(text))


def list_of(kind: Callable[[str], Any], *, once: bool = True) -> Callable[[str], list[Any]]:
    """The type of a comma-separated list, of which each entry counts ``once``."""

    def parse(text: str) -> list[Any]:
        try:
            entries = [kind(entry) for entry in text.split(",")]
        except _Flag as error:
            raise _Flag(f"{_short(text)} is no list of numbers, such as 1,8: {error}") from None
        return list(dict.fromkeys(entries)) if once else entries

    return parse


def _short(value: Any) -> str:
    # Python writes no number of thousands of digits, either.
    if isinstance(value, int):
        return str(value) if value.bit_length() < 128 else "a number of many digits"
    return repr(value if len(value) <= 40 else value[:40] + "...")
