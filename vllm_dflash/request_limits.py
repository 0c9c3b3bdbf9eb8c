"""How many tokens may be drafted for a request, as its user says. Pure.

``SamplingParams(extra_args={"dflash": {"draft": False}})`` drafts nothing for it, ``{"max_draft":
3}`` at most three tokens a step. Over HTTP the field is ``vllm_xargs``, which holds no objects:
there the object is given as JSON text.

    pytest tests/unit/test_request_limits.py
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_dflash.adaptive.settings import SECTION
from vllm_dflash.log import logger
from vllm_dflash.records import object_of

_DRAFT, _MAX_DRAFT = "draft", "max_draft"
_GIVE = f'give {{"{_DRAFT}": false}}, or {{"{_MAX_DRAFT}": N}} with N from 0 to '


class RequestError(ValueError):
    """A request's setting that does not exist or has no such value; the message names the
    remedy."""


def most_drafts(extra_args: Any, k: int) -> int | None:
    """The draft tokens that a request may have in a step; None where its user says nothing.

    Args:
        extra_args: of its ``SamplingParams``, or None.
        k: the engine's ``num_speculative_tokens``.

    Raises:
        RequestError: on anything in our part of it that is not known.
    """
    given = extra_args.get(SECTION) if isinstance(extra_args, Mapping) else None
    if given is None:
        return None
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
    unknown = sorted(str(key) for key in given.keys() - {_DRAFT, _MAX_DRAFT})
    if unknown:
        raise RequestError(f"{SECTION}.{unknown[0]} is no setting of a request: {_GIVE}{k}")
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

    def learn(self, scheduled: Any) -> None:
        """Takes in which requests are new and which have ended, from vLLM's
        ``SchedulerOutput``."""
        if self.by_request:
            for request_id in scheduled.finished_req_ids:
                self.by_request.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            # A streaming session comes again, with the parameters of its next input.
            most = self._read(new.sampling_params)
            if most is None:
                self.by_request.pop(new.req_id, None)
            else:
                self.by_request[new.req_id] = most

    def most(self, request_id: str) -> int:
        """Draft tokens that a request may have."""
        return self.by_request.get(request_id, self._k)

    def most_of(self, request_ids: Iterable[str]) -> int:
        """Draft tokens that any of them may have."""
        return max(map(self.most, request_ids), default=self._k) if self.by_request else self._k

    def _read(self, params: Any) -> int | None:
        extra_args = getattr(params, "extra_args", None)
        if not extra_args:
            return None
        try:
            return most_drafts(extra_args, self._k)
        except RequestError as error:  # refused before it got here, but by a frontend of vLLM's
            logger.warning("a request's limit of drafts is not kept: %s", error)
            return None
