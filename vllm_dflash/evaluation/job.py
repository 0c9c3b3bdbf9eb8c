"""What a benchmark asks of an engine: closed loops, in slices.

pytest tests/unit/test_bench_sweep.py tests/engine/test_bench.py
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_dflash.engines.process import EngineProcess
from vllm_dflash.evaluation.workload import Phase

_CHILD = "vllm_dflash.evaluation.engine_child"


@dataclass(frozen=True)
class Job:
    """Closed loops, one after the other."""

    prompts: Sequence[Sequence[int]]
    """Those of each phase in order."""
    phases: Sequence[Phase]
    max_tokens: Sequence[int]
    """Of each prompt."""
    temperature: float
    slice_seconds: float = 0.0
    """After which the engine pauses, for the others' slices; 0 for never."""

    @property
    def concurrency(self) -> int:
        """The most requests in flight."""
        return max(phase.concurrency for phase in self.phases)


class Engine(Protocol):
    """What a sweep runs its jobs on."""

    def run(
        self, job: Job, on_request: Callable[[], object]
    ) -> Generator[None, None, dict[str, Any]]:
        """Runs the job a slice at a time, calls ``on_request`` as requests end, and returns what
        was measured.

        Raises:
            EngineFailedError: it will not run any more.
        """


class BenchEngine(EngineProcess):
    """An ``Engine`` in a process of its own."""

    def __init__(
        self, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        super().__init__(_CHILD, settings, log, environment)

    def run(
        self, job: Job, on_request: Callable[[], object]
    ) -> Generator[None, None, dict[str, Any]]:
        """See ``Engine``."""
        result: dict[str, Any] = yield from self.slices(asdict(job), lambda _: on_request())
        return result
