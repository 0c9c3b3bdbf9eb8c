"""The methods of a benchmark, and what each engine is started with. Pure.

A method is KIND, KIND:K, KIND@DRAFTER or KIND@DRAFTER:K, with K the drafted tokens a step and
DRAFTER a name given to ``--draft``.

    pytest tests/unit/test_bench_methods.py
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dflash.adaptive.settings import SECTION
from vllm_dflash.formats import METHOD
from vllm_dflash.plugin import SWITCH

FIXED = "dflash"
"""The method that is this package with whole drafts."""
KINDS = {
    "plain": "decoding without a drafter",
    FIXED: "this package at a fixed K, whatever kind the drafter is",
    "adaptive": (
        "this package, with the controller: whether to draft, and how much of each draft to verify,"
        " chosen at each step"
    ),
    "native": "vLLM's own dflash",
    "ngram": "vLLM's n-gram lookup in the request's own text",
    "suffix": "vLLM's suffix decoding (needs arctic-inference)",
    "eagle3": "vLLM's EAGLE-3, with the head that --eagle3 names",
}
DEFAULT_METHODS = f"plain,{FIXED},native,ngram"
_OURS = frozenset({FIXED, "adaptive"})
_DRAFTED = frozenset({FIXED, "adaptive", "native"})
_DEFAULT_K = {"ngram": 5, "eagle3": 3}
_FORM = re.compile(r"(?P<kind>[a-z0-9]+)(@(?P<drafter>[^:@,]+))?(:(?P<k>\d+))?")


class UsageError(ValueError):
    """The command line asks for what cannot be done; the message says what to give instead."""


@dataclass(frozen=True)
class Drafter:
    """A drafter's folder or hub id, and the longest draft it is made for, in tokens."""

    path: str
    max_speculative_tokens: int


@dataclass(frozen=True)
class Method:
    """One row of the report, and what its engine is started with."""

    name: str
    """As on the command line."""
    kind: str
    drafter: str | None = None
    """The name that ``--draft`` gave."""
    num_speculative_tokens: int = 0
    """At most, where the method chooses; 0 where it sets its own limit."""
    speculative_config: dict[str, Any] | None = None
    additional_config: dict[str, Any] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Stock vLLM for all that is not ours, so that nothing of this package is in what it is
        compared with."""
        return {SWITCH: "1" if self.kind in _OURS else "0"}

    @property
    def engine_args(self) -> dict[str, Any]:
        """The arguments of ``LLM`` that this method has of its own."""
        given = {
            "speculative_config": self.speculative_config,
            "additional_config": self.additional_config,
        }
        return {name: value for name, value in given.items() if value is not None}


def parse_methods(
    text: str, drafters: Mapping[str, Drafter], eagle3: str | None = None
) -> list[Method]:
    """The methods of a comma-separated list.

    Args:
        text: for instance ``plain,dflash:7,native:7,ngram``.
        drafters: by name; the first is meant where a method names none.
        eagle3: path of an EAGLE-3 head, for a method that uses it.

    Raises:
        UsageError: with what to give instead.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names none: give some of " + ", ".join(KINDS))
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f"--methods names {', '.join(sorted(twice))} more than once: give each once"
        )
    methods = [_parse(name, drafters, eagle3) for name in names]
    if eagle3 is not None and not any(method.kind == "eagle3" for method in methods):
        raise UsageError(
            "--eagle3 names a head, and --methods has none that uses it: add eagle3:K, or leave it"
            " out"
        )
    return methods


def _parse(name: str, drafters: Mapping[str, Drafter], eagle3: str | None) -> Method:
    found = _FORM.fullmatch(name)
    if found is None or found["kind"] not in KINDS:
        raise UsageError(
            f"--methods: {name!r} is no method: give KIND, KIND:K or KIND@DRAFTER:K with a KIND of"
            f" {', '.join(KINDS)}"
        )
    kind, k = found["kind"], None if found["k"] is None else int(found["k"])
    if k == 0 or (k is not None and kind == "plain"):
        raise UsageError(
            f"--methods: {name}: K is 1 or more, and decoding without a drafter is `plain`"
        )
    if kind in _DRAFTED:
        return _drafted(name, kind, found["drafter"], k, drafters)
    if found["drafter"] is not None:
        raise UsageError(
            f"--methods: {name}: only {', '.join(sorted(_DRAFTED))} take a drafter by name"
        )
    if kind == "plain":
        return Method(name, kind)
    if kind == "eagle3" and eagle3 is None:
        raise UsageError(f"--methods: {name} needs a head: give --eagle3 PATH")
    if kind == "suffix":
        # Its memory of earlier answers would hold the very answers of the repeat before.
        config: dict[str, Any] = {"method": "suffix", "suffix_decoding_max_cached_requests": 0}
        return Method(
            name, kind, None, k or 0, config | ({"num_speculative_tokens": k} if k else {})
        )
    k = k or _DEFAULT_K[kind]
    if kind == "eagle3":
        return Method(
            name, kind, None, k, {"method": "eagle3", "model": eagle3, "num_speculative_tokens": k}
        )
    return Method(
        name,
        kind,
        None,
        k,
        {
            "method": "ngram",
            "num_speculative_tokens": k,
            "prompt_lookup_max": 5,
            "prompt_lookup_min": 2,
        },
    )


def _drafted(
    name: str, kind: str, drafter: str | None, k: int | None, drafters: Mapping[str, Drafter]
) -> Method:
    if not drafters:
        raise UsageError(f"--methods: {name} needs a drafter: give --draft PATH")
    drafter = drafter or next(iter(drafters))
    if drafter not in drafters:
        raise UsageError(
            f"--methods: {name}: no drafter is named {drafter}: give --draft {drafter}=PATH (there"
            f" are {', '.join(drafters)})"
        )
    k = k or drafters[drafter].max_speculative_tokens
    config = {"method": METHOD, "model": drafters[drafter].path, "num_speculative_tokens": k}
    additional = {SECTION: {"adaptive": kind == "adaptive"}} if kind in _OURS else None
    return Method(name, kind, drafter, k, config, additional)
