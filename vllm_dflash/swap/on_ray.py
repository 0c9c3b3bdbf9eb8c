"""A rolling swap on Ray: an actor that knows whose turn it is, a task in each replica that asks it,
and the endpoint in the ingress. Limits: where the actor's node is lost, so is what was asked for;
replicas keep what they have until the next swap.

    pytest tests/engine/test_cluster_swap.py
"""

import asyncio
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

import ray

from vllm_dflash import contents
from vllm_dflash.errors import printable
from vllm_dflash.log import logger
from vllm_dflash.swap.endpoint import (
    NO_JSON,
    Receive,
    Scope,
    Send,
    body_of,
    foreign,
    is_json,
    say,
    swap_of,
)
from vllm_dflash.swap.rollout import POLL_S, Rollout, UnderWayError, Want
from vllm_dflash.swap.turns import PATH, Swap, swap_in, which

NAMESPACE = "vllm-dflash"
_METHODS = ("GET", "POST")
_WAIT_S = 3600.0
"""For all replicas to take a drafter."""


@ray.remote(num_cpus=0)
class Turns:
    """``Rollout`` for all processes of a deployment."""

    def __init__(self, first: str) -> None:
        self._rollout = Rollout(first)

    def want(self, folder: str, context: str) -> int | str:
        """The swap's number, or why there is none."""
        try:
            return self._rollout.want(folder, context, time.monotonic())
        except UnderWayError as error:
            return str(error)

    def greet(self, replica: str, answer: dict[str, Any]) -> None:
        """``Rollout.greet``."""
        self._rollout.greet(replica, answer, time.monotonic())

    def beat(self, replica: str) -> None:
        """``Rollout.beat``."""
        self._rollout.beat(replica, time.monotonic())

    def turn(self, replica: str) -> Want | None:
        """``Rollout.turn``."""
        return self._rollout.turn(replica, time.monotonic())

    def done(self, replica: str, number: int, answer: dict[str, Any]) -> None:
        """``Rollout.done``."""
        self._rollout.done(replica, number, answer, time.monotonic())

    def state(self) -> dict[str, Any]:
        """``Rollout.state``."""
        return self._rollout.state(time.monotonic())


def turns_of(deployment: str, first: str) -> Any:
    """The deployment's actor, made where there is none; it outlives each of its users, and is ended
    by ``end_turns``."""
    actor: Any = Turns
    return actor.options(
        name=deployment, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(first)


def end_turns(deployment: str) -> None:
    """Ends the actor of a deployment that is taken down."""
    try:
        ray.kill(ray.get_actor(deployment, namespace=NAMESPACE))
    except ValueError:
        return


async def follow(engine: Any, deployment: str, first: str, replica: str) -> None:
    """In a replica, for as long as it lives: asks for its turn, and takes what it is told.

    Args:
        engine: vLLM's ``EngineClient``.
        first: the drafter that the replica was started with.
    """
    model, turns = str(engine.vllm_config.model_config.model), None
    target = await asyncio.to_thread(contents.of_folder, model)
    while True:
        try:
            if turns is None:
                turns = turns_of(deployment, first)
                await turns.greet.remote(replica, await which(engine))
            want = await turns.turn.remote(replica)
            if want is not None:
                number, folder, context = want
                swap = asyncio.ensure_future(swap_in(engine, Swap(folder, context), target))
                while not (await asyncio.wait({swap}, timeout=POLL_S))[0]:
                    await turns.beat.remote(replica)
                answer = swap.result()
                await turns.done.remote(replica, number, answer)
        except Exception as error:  # serving is not to suffer; the next question may be well
            turns = None
            logger.warning("the deployment's drafter is not known: %r", error)
        await asyncio.sleep(POLL_S)


class RolloutEndpoint:
    """ASGI middleware of the ingress: ``POST`` has all replicas take a drafter, one after another,
    and answers once all have, or all have gone back."""

    def __init__(
        self, app: Any, deployment: str, first: str, folder: str, *, has_key: bool
    ) -> None:
        self.app, self.folder = app, Path(folder)
        self._deployment, self._first, self._has_key = deployment, first, has_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] not in _METHODS:
            await self.app(scope, receive, send)
            return
        # One whose user gave a key has been asked for it before this.
        problem = foreign(scope, has_key=self._has_key)
        if problem is not None:
            await say(send, HTTPStatus.FORBIDDEN, refused=problem)
            return
        if scope["method"] == "GET":
            found = await turns_of(self._deployment, self._first).state.remote()
            await say(send, HTTPStatus.OK, **found)
            return
        try:
            if not is_json(scope):
                raise ValueError(NO_JSON)
            body = await body_of(receive)
            swap = await asyncio.to_thread(swap_of, body, self.folder)
        except ValueError as error:
            logger.warning("no drafter is swapped in: %s", printable(error))
            await say(send, HTTPStatus.BAD_REQUEST, refused=str(error))
            return
        turns = turns_of(self._deployment, self._first)
        number = await turns.want.remote(swap.folder, swap.context)
        if isinstance(number, str):
            logger.warning("no drafter is swapped in: %s", number)
            await say(send, HTTPStatus.CONFLICT, refused=number)
            return
        until = time.monotonic() + _WAIT_S
        found = await turns.state.remote()
        while (found["left"] or not found["replicas"]) and time.monotonic() < until:
            await asyncio.sleep(POLL_S / 2)
            found = await turns.state.remote()
        await say(send, HTTPStatus.CONFLICT if "refused" in found else HTTPStatus.OK, **found)
