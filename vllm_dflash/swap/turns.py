"""A swap in an engine with several ranks: all look at the new drafter before any puts it in force,
and what they answer is one answer. Pure; the engine is an argument.

    pytest tests/unit/test_follow_endpoint.py
"""

import asyncio
import uuid
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PATH = "/v1/dflash/drafter"
"""Below /v1, as all of vLLM's paths that ask for the API key."""
_METHOD = "dflash_drafter"
"""``swap.worker.DrafterSwap``'s."""
_LOOK_S = 0.1
"""Between two questions whether all ranks have read the drafter, meanwhile they serve."""
CONTEXTS = RECOMPUTE, LEAVE = "recompute", "leave"
"""What becomes of the draft context that the old drafter wrote: requests in flight are computed
anew from their tokens; or drafts go on over it."""


@dataclass(frozen=True)
class Swap:
    """What is asked for."""

    folder: str
    context: str = RECOMPUTE


class EngineEndedError(RuntimeError):
    """The engine has ended before it answered."""

    def __init__(self) -> None:
        super().__init__("the engine has ended: start the server again")


async def which(engine: Any) -> dict[str, Any]:
    """What serves, as every rank says; ``refused`` where ranks disagree."""
    return agreed(await _ask(engine, "which"))


async def count_refusal(engine: Any) -> None:
    """Counts a swap that was refused before any rank was asked for it, on every rank."""
    await _ask(engine, "count_refusal")


async def swap_in(engine: Any, swap: Swap, target_files: str | None) -> dict[str, Any]:
    """Puts a drafter in force on every rank, or on none.

    Args:
        engine: vLLM's ``EngineClient``.
        target_files: as ``Swapping.stage``.

    Returns:
        What serves afterwards, with ``before``, the id of what served; or ``refused``.

    Raises:
        EngineEndedError: the engine has ended before it was done, so as ``which``.
    """
    now = await _ask(engine, "which")
    if any("refused" in answer for answer in now):
        return agreed(now)
    ticket = uuid.uuid4().hex
    looks = await _ask(engine, "stage", ticket, swap.folder, target_files)
    while any("pending" in answer for answer in looks):
        await asyncio.sleep(_LOOK_S)
        looks = await _ask(engine, "staged", ticket)
    staged = agreed(looks)
    if "refused" in staged:
        await _ask(engine, "drop", ticket)
        return staged
    found = agreed(await _ask(engine, "commit", ticket, staged["id"]))
    if "refused" in found:
        return found
    answer = found | {
        "before": ", ".join(sorted({answer["id"] for answer in now})),
        "context": swap.context,
    }
    if swap.context == RECOMPUTE:
        try:
            await _answer(engine, engine.reset_prefix_cache(reset_running_requests=True))
        except EngineEndedError:
            raise
        except Exception as error:  # a KV connector's requests cannot be preempted
            answer |= {"context": LEAVE, "context_note": f"left as it was: {error}"}
    return answer


def agreed(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One answer of all ranks; ``refused`` with each reason where one refuses or they differ."""
    reasons = dict.fromkeys(answer["refused"] for answer in answers if "refused" in answer)
    if reasons:
        return {"refused": "; ".join(reasons)}
    ids = {answer["id"] for answer in answers}
    if len(ids) != 1:
        return {
            "refused": f"ranks hold different drafters ({', '.join(sorted(ids))}): swap one in, or"
            " restart the server"
        }
    return dict(answers[0])


async def _ask(engine: Any, *call: Any) -> list[dict[str, Any]]:
    """The answers of every rank, of every data-parallel engine too, to a call of ``Swapping``'s."""
    core = getattr(engine, "engine_core", None)
    ask_all = getattr(core, "call_utility_all_async", None)
    if ask_all is not None:
        each = await _answer(engine, ask_all("collective_rpc", _METHOD, None, call, {}))
        return [answer for answers in each for answer in answers]
    return list(await _answer(engine, engine.collective_rpc(_METHOD, args=call)))


async def _answer(engine: Any, call: Awaitable[Any]) -> Any:
    """What a call comes to. vLLM leaves one open for ever whose engine ends meanwhile, and a server
    that then ends waits for its clients' answers.

    Raises:
        EngineEndedError: it has.
    """
    asked = asyncio.ensure_future(call)
    try:
        while not asked.done():
            await asyncio.wait({asked}, timeout=_LOOK_S)
            if not asked.done() and _has_ended(engine):
                raise EngineEndedError
        return asked.result()
    except Exception as error:
        if _has_ended(engine):
            raise EngineEndedError from error
        raise
    finally:
        asked.cancel()


def _has_ended(engine: Any) -> bool:
    return bool(getattr(engine, "errored", False))
