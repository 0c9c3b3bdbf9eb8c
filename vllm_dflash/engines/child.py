"""The child's side of an engine's process: the protocol, and an ``LLM`` with settings that fit a
CPU too.

Commands are JSON lines on standard input: first the settings, then a job each. Answers are JSON
lines on
a file descriptor of their own, so that nothing that vLLM prints gets among them: ``ready``;
``done`` with
how many more parts of a job are; ``paused`` until any line comes; ``result``; ``refused`` with why.
A child ends with the end of its input: after its last job, or at once where it is in the middle of
one,
for then its parent is gone.

    python -m MODULE FD             pytest tests/unit/test_engine_process.py
"""

import io
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

CPU_CACHE_BYTES = 1 << 30
"""Of keys and values, where the settings do not say."""


class RefusedError(RuntimeError):
    """A job, or the settings, that this engine cannot do; the message says what to do instead."""


class Parent:
    """What a job may tell its parent meanwhile."""

    def __init__(self, descriptor: int) -> None:
        # A process that vLLM starts must not hold it open: its end is how the parent learns of
        # ours.
        os.set_inheritable(descriptor, False)
        self._answers = os.fdopen(descriptor, "w")
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._waits = True
        threading.Thread(target=self._read, daemon=True).start()

    def done(self, count: int = 1) -> None:
        """So many more parts of the job are done."""
        self.say(done=count)

    def pause(self) -> None:
        """Waits until the parent lets it go on."""
        self.say(paused=1)
        self.next_line()

    def say(self, **message: Any) -> None:
        """Sends one answer."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def next_line(self) -> str:
        """The next command; empty at their end."""
        self._waits = True
        line = self._lines.get()
        self._waits = False
        return line

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        if not self._waits:
            os._exit(1)
        self._lines.put("")


class Work(Protocol):
    """What a child does with its engine."""

    def __call__(self, job: dict[str, Any], parent: Parent) -> Any:
        """A job's result, as JSON has it.

        Raises:
            RefusedError: the job cannot be done.
        """


def serve(begin: Callable[[dict[str, Any]], tuple[Work, Any]]) -> None:
    """Does jobs until there are no more.

    Args:
        begin: takes the settings, starts the engine, and returns what does a job and what the
            engine says of itself.
    """
    parent = Parent(int(sys.argv[1]))
    try:
        work, ready = begin(json.loads(parent.next_line()))
        parent.say(ready=ready)
        while line := parent.next_line():
            parent.say(result=work(json.loads(line), parent))
    except RefusedError as refusal:
        parent.say(refused=str(refusal))
        sys.exit(1)


def start_llm(engine_args: Mapping[str, Any], gpu_defaults: Mapping[str, Any] | None = None) -> Any:
    """An ``LLM``; ``gpu_defaults`` are for any device but a CPU."""
    from vllm import LLM
    from vllm.platforms import current_platform

    defaults: dict[str, Any] = dict(gpu_defaults or {})
    if current_platform.is_cpu():
        # Its cache would take a share of the machine's memory, which other work needs; compiling
        # takes minutes.
        defaults = {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
    return LLM(**defaults | dict(engine_args))


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], params: Any, parent: Parent | None = None
) -> list[Any]:
    """``LLM.generate``'s outputs, in the prompts' order; tells ``parent`` of each request that
    ends.

    Args:
        prompts: token ids.
        params: vLLM's ``SamplingParams``, one for all or one each.
    """
    llm.enqueue([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    outputs: list[Any] = llm.wait_for_completion(
        use_tqdm=False if parent is None else _reporting(parent)
    )
    return outputs


def _reporting(parent: Parent) -> Callable[..., tqdm]:
    """A bar that shows nothing and tells the parent."""

    class Report(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            parent.done(int(n or 0))
            return super().update(n)

    return Report
