"""The actor of a batch run: one vLLM engine that answers parts, several at a time so that it never
runs dry. Started by ``batch``.

A row that cannot be answered costs itself alone. One that ends the engine is found by asking, one
at a time, every row that was in flight when it ended; they wait for each other, and new rows for
them.

    pytest tests/engine/test_cluster_batch.py
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from vllm_dflash.cluster.orphans import Tie
from vllm_dflash.cluster.parts import Part, read, write
from vllm_dflash.cluster.rows import (
    answered,
    check_sampling,
    failed,
    params_of,
    prompt_of,
    sampling_of,
)
from vllm_dflash.cluster.settings import ClusterError


class RowError(ValueError):
    """A row that cannot be answered, and why."""


class Completer:
    """What Ray Data calls for each part."""

    def __init__(
        self, engine_args: Mapping[str, Any], sampling: Mapping[str, Any], folder: str
    ) -> None:
        """``engine_args`` as of ``settings.engine_args``; answers are written to ``folder``.

        The engine starts with the first part: that there is a process for it is then known at once,
        however long the engine takes.
        """
        self._engine_args, self._sampling, self._folder = (
            dict(engine_args),
            dict(sampling),
            Path(folder),
        )
        self._engine: Any = None
        self._names = itertools.count()
        self._alone, self._calm, self._suspects = asyncio.Lock(), asyncio.Event(), 0
        self._calm.set()

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        """Answers and writes the parts of a batch (of one); yields the sums over each, as of
        ``count``."""
        if self._engine is None:
            check_sampling(self._sampling)  # where the command ran there may be no vLLM
            # It blocks this actor's loop, so that no other part comes here meanwhile.
            self._engine = self._started()
        for values in zip(*batch.values(), strict=True):
            given = {
                name: value.item() if hasattr(value, "item") else value
                for name, value in zip(batch, values, strict=True)
            }
            part = Part(**given)
            rows = await asyncio.gather(*(self._row(row, problem) for row, problem in read(part)))
            write(part, self._folder, rows)
            yield {name: [value] for name, value in count(rows).items()}

    def _started(self) -> Any:
        self._tied = Tie()
        try:
            return self._start()
        finally:
            self._tied.all_started()

    def _start(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**self._engine_args))

    async def _row(self, row: dict[str, Any], problem: str | None) -> dict[str, Any]:
        if problem is not None:
            return row | failed(problem)
        try:
            return row | answered(await self._answer(row))
        except ClusterError:
            raise
        except Exception as error:  # whatever vLLM refuses a request with
            return row | failed(f"{type(error).__name__}: {error}")

    async def _answer(self, row: dict[str, Any]) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        await self._calm.wait()
        try:
            return await self._ask(row)
        except EngineDeadError:
            self._calm.clear()
            self._suspects += 1
        try:
            async with self._alone:
                self._revive()
                return await self._ask(row)
        except EngineDeadError:
            raise RowError("the engine ended while it answered this row alone") from None
        finally:
            self._suspects -= 1
            if not self._suspects:
                self._calm.set()

    async def _ask(self, row: dict[str, Any]) -> Any:
        config = self._engine.vllm_config.model_config
        ids = prompt_of(row, self._engine.get_tokenizer(), config.get_vocab_size())
        params = params_of(sampling_of(row, self._sampling))
        # FINAL_ONLY: there is but one.
        outputs = [
            output
            async for output in self._engine.generate(
                {"prompt_token_ids": ids}, params, f"row-{next(self._names)}"
            )
        ]
        return outputs[-1]

    def _revive(self) -> None:
        """A new engine where the last one has ended."""
        if not self._engine.errored:
            return
        self._engine.shutdown()
        self._tied.cut()
        try:
            self._engine = self._started()
        except Exception as error:
            raise ClusterError(
                f"the engine ended and does not start again ({error}): run the command again when"
                " it is mended"
            ) from error


COUNTED = ("prompt_tokens", "completion_tokens", "drafts", "draft_tokens", "accepted_tokens")


def count(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The sums over answered rows: ``rows``, ``failed``, and those of ``COUNTED``."""
    sums = {name: sum(row[name] or 0 for row in rows) for name in COUNTED}
    return {"rows": len(rows), "failed": sum(row["error"] is not None for row in rows)} | sums
