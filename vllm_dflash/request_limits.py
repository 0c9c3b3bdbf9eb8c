"""What a request's user says of its drafts: how many tokens may be drafted, and of which class its
prompt is. Pure.

``SamplingParams(extra_args={"dflash": {"draft": False}})`` drafts nothing for it, ``{"max_draft":
3}`` at most three tokens a step; ``{"prompt_class": "code"}`` has the metrics tell its acceptance
apart. Over HTTP the field is ``vllm_xargs``, which holds no objects:
there the object is given as JSON text.

    pytest tests/unit/test_request_limits.py
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dflash.adaptive.settings import SECTION
from vllm_dflash.log import logger
from vllm_dflash.records import object_of

_DRAFT, _MAX_DRAFT, _CLASS = "draft", "max_draft", "prompt_class"
_GIVE = (
    f'give {{"{_DRAFT}": false}}, {{"{_CLASS}": NAME}}, or {{"{_MAX_DRAFT}": N}} with N from 0 to '
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


class RequestError(ValueError):
    """A request's setting that does not exist or has no such value; the message names the
    remedy."""


@dataclass(frozen=True)
class Said:
    """Of one request."""

    most: int | None = None
    """The draft tokens that it may have in a step; None: its user says nothing."""
    prompt_class: str | None = None
    """Its prompt's, by the user's own name for it."""


def said_of(extra_args: Any, k: int) -> Said:
    """What a request's user says.

    Args:
        extra_args: of its ``SamplingParams``, or None.
        k: the engine's ``num_speculative_tokens``.

    Raises:
        RequestError: on anything in our part of it that is not known.
    """
    given = extra_args.get(SECTION) if isinstance(extra_args, Mapping) else None
    if given is None:
        return Said()
    if isinstance(given, str):
        try:
            given = object_of(given)
        except ValueError as error:
            raise RequestError(
                f"{SECTION} is text that is no JSON object ({error}): {_GIVE}{k}"
            ) from None
    if not isinstance(given, Mapping):
        raise RequestError(
            f"{SECTION} is {given!r}: {_GIVE}{k}, over HTTP as text:"
            f' "vllm_xargs": {{"{SECTION}": "{{\\"{_DRAFT}\\": false}}"}}'
        )
    # A row of Parquet has all the fields that any row has, null where it has none.
    given = {key: value for key, value in given.items() if value is not None}
    unknown = sorted(str(key) for key in given.keys() - {_DRAFT, _MAX_DRAFT, _CLASS})
    if unknown:
        raise RequestError(f"{SECTION}.{unknown[0]} is no setting of a request: {_GIVE}{k}")
    name = given.get(_CLASS)
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RequestError(
            f"{SECTION}.{_CLASS} is {name!r:.80}: give a name of at most 40 letters, digits, dots,"
            " dashes and underscores, such as code"
        )
    return Said(_most(given, k), name)


def _most(given: Mapping[Any, Any], k: int) -> int | None:
    draft, most = given.get(_DRAFT, True), given.get(_MAX_DRAFT)
    if not isinstance(draft, bool):
        raise RequestError(f"{SECTION}.{_DRAFT} is {draft!r}: give true or false")
    if most is None:
        return None if draft else 0
    if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= k:
        raise RequestError(
            f"{SECTION}.{_MAX_DRAFT} is {most!r}: give a whole number from 0 to {k}, the server's"
            " num_speculative_tokens"
        )
    if not draft and most:
        raise RequestError(
            f"{SECTION} says both {_DRAFT} false and {_MAX_DRAFT} {most}: leave one of the two out"
        )
    return most


class Limits:
    """Those of the requests that a scheduler has in work; ``k`` tokens for all others."""

    def __init__(self, k: int) -> None:
        self._k = k
        self.by_request: dict[str, int] = {}
        """Only of requests whose users said one."""
        self.classes: dict[str, str] = {}
        """The prompts' classes, likewise."""

    def learn(self, scheduled: Any) -> None:
        """Takes in which requests are new and which have ended, from vLLM's
        ``SchedulerOutput``."""
        if self.by_request or self.classes:
            for request_id in scheduled.finished_req_ids:
                self._put(request_id, Said())
        for new in scheduled.scheduled_new_reqs:
            # A streaming session comes again, with the parameters of its next input.
            self._put(new.req_id, self._read(new.sampling_params))

    def most(self, request_id: str) -> int:
        """Draft tokens that a request may have."""
        return self.by_request.get(request_id, self._k)

    def most_of(self, request_ids: Iterable[str]) -> int:
        """Draft tokens that any of them may have."""
        return max(map(self.most, request_ids), default=self._k) if self.by_request else self._k

    def _put(self, request_id: str, said: Said) -> None:
        self.by_request.pop(request_id, None)
        self.classes.pop(request_id, None)
        if said.most is not None:
            self.by_request[request_id] = said.most
        if said.prompt_class is not None:
            self.classes[request_id] = said.prompt_class

    def _read(self, params: Any) -> Said:
        extra_args = getattr(params, "extra_args", None)
        if not extra_args:
            return Said()
        try:
            return said_of(extra_args, self._k)
        except RequestError as error:  # refused before it got here, but by a frontend of vLLM's
            logger.warning("a request's limit of drafts is not kept: %s", error)
            return Said()
