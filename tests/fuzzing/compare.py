"""Whether two engines answered a request alike. Pure; answers are ``serving.py``'s."""

from typing import Any

LOGPROB = 2e-3
"""Nats by which a log-probability may differ, as in ``test_features.py``: float32, in batches of
other shapes."""
RANKED = 1e-4
"""Tokens whose log-probabilities are nearer to each other may change ranks."""


def difference(request: dict[str, Any], plain: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What is not alike, in words; None where all is. Of an aborted request what came is the
    beginning of plain's."""
    if "error" in plain or "error" in ours:
        errors = plain.get("error"), ours.get("error")
        return (
            None
            if errors[0] == errors[1]
            else f"refused: plain {errors[0]!r}, with drafts {errors[1]!r}"
        )
    if not ours["finished"] and "aborted_after" not in request:
        return "never finished"
    if not ours["finished"] and not ours["completions"]:
        return None  # aborted before anything came
    if plain.get("num_prompt_tokens") != ours.get("num_prompt_tokens"):
        return (
            f"prompt tokens: plain {plain.get('num_prompt_tokens')}, with drafts"
            f" {ours.get('num_prompt_tokens')}"
        )
    if ours["finished"] and plain["completions"].keys() != ours["completions"].keys():
        return (
            f"completions: plain {sorted(plain['completions'])}, with drafts"
            f" {sorted(ours['completions'])}"
        )
    for index, completion in ours["completions"].items():
        found = _in_completion(
            plain["completions"][index], completion, completion["finish_reason"] in (None, "abort")
        )
        if found:
            return found if len(plain["completions"]) == 1 else f"completion {index}: {found}"
    if ours.get("prompt_logprobs") is not None or (
        ours["finished"] and plain.get("prompt_logprobs") is not None
    ):
        return _in_logprobs(
            "prompt_logprobs", plain.get("prompt_logprobs"), ours.get("prompt_logprobs")
        )
    return None


def first_difference(plain: list[int], ours: list[int]) -> int | None:
    """The place of the first token that is not alike."""
    return next(
        (i for i in range(max(len(plain), len(ours))) if plain[i : i + 1] != ours[i : i + 1]), None
    )


def _in_completion(plain: dict[str, Any], ours: dict[str, Any], is_part: bool) -> str | None:
    """``is_part``: ours may end early."""
    length = len(ours["token_ids"]) if is_part else None
    at = first_difference(plain["token_ids"][:length], ours["token_ids"])
    if at is not None:
        pair = [
            c["token_ids"][at] if at < len(c["token_ids"]) else f"the end ({c['finish_reason']})"
            for c in (plain, ours)
        ]
        return f"token {at}: plain {pair[0]}, with drafts {pair[1]}"
    found = _in_logprobs(
        "logprobs", plain["logprobs"] and plain["logprobs"][:length], ours["logprobs"]
    )
    if found:
        return found
    if is_part:
        return (
            None
            if plain["text"].startswith(ours["text"])
            else f"text: plain {plain['text']!r}, with drafts {ours['text']!r}"
        )
    for name in ("text", "finish_reason", "stop_reason"):
        if plain[name] != ours[name]:
            return f"{name}: plain {plain[name]!r}, with drafts {ours[name]!r}"
    sums = plain["cumulative_logprob"], ours["cumulative_logprob"]
    if (sums[0] is None) != (sums[1] is None) or (
        sums[0] is not None
        and abs(sums[0] - sums[1]) > LOGPROB * (1 + len(ours["token_ids"]) ** 0.5)
    ):
        return f"cumulative_logprob: plain {sums[0]}, with drafts {sums[1]}"
    return None


def _in_logprobs(name: str, plain: list[Any] | None, ours: list[Any] | None) -> str | None:
    if not plain or not ours:
        return (
            None
            if not plain and not ours
            else f"{name}: plain {bool(plain)}, with drafts {bool(ours)}"
        )
    if len(plain) != len(ours):
        return f"{name}: plain has {len(plain)} positions, with drafts {len(ours)}"
    for at, (a, b) in enumerate(zip(plain, ours, strict=True)):
        found = a != b and _in_step(a, b)
        if found:
            return f"{name} at {at}: {found}"
    return None


def _in_step(plain: dict[str, list[Any]] | None, ours: dict[str, list[Any]] | None) -> str | None:
    if plain is None or ours is None:
        return f"plain {plain}, with drafts {ours}"
    # Of nearly equal ones at the end of the list either may be in it.
    for a, b, name in ((plain, ours, "plain"), (ours, plain, "with drafts")):
        for token in a.keys() - b.keys():
            if not b or a[token][0] - min(logprob for logprob, *_ in b.values()) > LOGPROB:
                return f"token {token} only {name}: plain {plain}, with drafts {ours}"
    for token in plain.keys() & ours.keys():
        (logprob, rank, text), (other, other_rank, other_text) = plain[token], ours[token]
        if abs(logprob - other) > LOGPROB * max(1.0, abs(logprob) / 10):
            return f"token {token}: plain {logprob}, with drafts {other}"
        # A rank counts the tokens above: far down many are nearly equal.
        near = sum(abs(value - logprob) < RANKED for value, *_ in plain.values()) - 1
        if rank != other_rank and abs((rank or 0) - (other_rank or 0)) > near + (rank or 0) // 20:
            return f"token {token}: plain's rank {rank}, with drafts {other_rank}"
        # Bytes of a character that is not whole are decoded with their neighbours.
        if text != other_text and "\N{REPLACEMENT CHARACTER}" not in f"{text}{other_text}":
            return f"token {token}: plain's text {text!r}, with drafts {other_text!r}"
    return None
