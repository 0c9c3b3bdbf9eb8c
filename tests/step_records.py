"""Just as much of vLLM's scheduler, of what it schedules and of what ran as a step is read from."""

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any


def scheduler_of(
    num_output_tokens: Mapping[str, int],
    *,
    ended: Iterable[str] = (),
    room: Mapping[str, int] | None = None,
    **attributes: Any,
) -> Any:
    """A scheduler whose requests have so many output tokens, after an empty prompt; ``room``: how
    many more one may have."""
    ended, room = set(ended), room or {}
    requests = {
        name: SimpleNamespace(
            num_output_tokens=count,
            num_tokens=count,
            num_computed_tokens=count,
            use_structured_output=False,
            is_finished=lambda name=name: name in ended,
        )
        for name, count in num_output_tokens.items()
    }

    def update(scheduled: Any, ran: Any) -> dict[int, Any]:
        rows = [
            (name, ran.sampled_token_ids[i][: room.get(name)])
            for name, i in ran.req_id_to_index.items()
            if name not in ended
        ]
        for name, tokens in rows:
            if name in requests:
                requests[name].num_output_tokens += len(tokens)
                requests[name].num_tokens += len(tokens)
        return {
            0: SimpleNamespace(
                outputs=[
                    SimpleNamespace(request_id=name, new_token_ids=tokens) for name, tokens in rows
                ]
            )
        }

    given = {
        "requests": requests,
        "connector": None,
        "running": list(requests),
        "waiting": [],
        "finished_req_ids": set(),
        "schedule": lambda: None,
        "shutdown": lambda: None,
        "update": update,
    }
    return SimpleNamespace(**given | attributes)


def scheduled_of(
    counts: Mapping[str, int],
    *,
    k: int,
    drafts: Mapping[str, Sequence[int]] | None = None,
    num_output_tokens: Sequence[int] = (),
    new: Iterable[str] = (),
    resumed: Iterable[str] = (),
    **attributes: Any,
) -> Any:
    """A ``SchedulerOutput`` with so many tokens a request; ``num_output_tokens`` and as many
    computed ones are of its cached requests."""
    given = {
        "num_scheduled_tokens": dict(counts),
        "total_num_scheduled_tokens": sum(counts.values()),
        "scheduled_spec_decode_tokens": dict(drafts or {}),
        "scheduled_new_reqs": [SimpleNamespace(req_id=name, num_computed_tokens=0) for name in new],
        "scheduled_cached_reqs": SimpleNamespace(
            req_ids=list(counts)[: len(num_output_tokens)],
            num_output_tokens=list(num_output_tokens),
            num_computed_tokens=list(num_output_tokens),
            resumed_req_ids=set(resumed),
        ),
        "num_spec_tokens_to_schedule": k,
        "num_invalid_spec_tokens": None,
        "finished_req_ids": set(),
    }
    return SimpleNamespace(**given | attributes)


def ran_of(sampled: Mapping[str, list[int]]) -> Any:
    """A ``ModelRunnerOutput`` with these tokens."""
    return SimpleNamespace(
        req_id_to_index={name: i for i, name in enumerate(sampled)},
        sampled_token_ids=list(sampled.values()),
    )
