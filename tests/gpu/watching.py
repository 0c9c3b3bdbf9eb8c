"""What ``child`` puts around an engine's parts: what each step drafted, how forwards ran, and a
trace by part of a step.

Nothing here waits for the device while a step runs: what is recorded is copied on the device and
read after the last step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class Recorder:
    """Stands before a speculator's ``propose`` and keeps what each step drafted."""

    def __init__(self, speculator: Any) -> None:
        self._speculator, self._propose = speculator, speculator.propose
        self._bare = getattr(self._propose, "__wrapped__", self._propose)
        """Without our metrics' events around it."""
        self.is_bare = False
        self._steps: list[tuple[list[str], Any, Any, Any]] | None = None
        speculator.propose = self

    def __call__(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        propose = self._bare if self.is_bare else self._propose
        drafts = propose(input_batch, *args, **kwargs)
        # Where no draft is asked for, the buffer holds an earlier step's tokens, or none.
        is_draft = not kwargs.get("dummy_run") and kwargs.get("num_speculative_tokens") != 0
        if self._steps is not None and is_draft:
            speculator, n = self._speculator, input_batch.num_reqs
            samples = len(speculator.sample_pos) // speculator.max_num_reqs
            rows = speculator.num_query_per_req
            self._steps.append(
                (
                    list(input_batch.req_ids[:n]),
                    drafts[:n].clone(),
                    speculator.sample_pos[: n * samples : samples].clone(),
                    speculator.input_buffers.input_ids[: n * rows : rows].clone(),
                )
            )
        return drafts

    def begin(self) -> None:
        """Keeps what is drafted from now on."""
        self._steps = []

    def end(self) -> list[tuple[int, int, int, list[int]]]:
        """Of each draft: its request, the anchor's position and token, and the drafted tokens."""
        found, self._steps = self._steps or [], None
        return [
            (int(request.split("-")[0]), position - 1, token, draft)
            for requests, drafts, positions, tokens in found
            for request, draft, position, token in zip(
                requests, drafts.tolist(), positions.tolist(), tokens.tolist(), strict=True
            )
        ]


def count_modes(modes: Counter[str], whose: str, manager: Any) -> None:
    """Has a CUDA graph manager count how the forwards that it is asked for run."""
    if manager is None:
        return
    dispatch = manager.dispatch

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = dispatch(*args, **kwargs)
        modes[f"{whose} {found.cg_mode.name}"] += 1
        return found

    manager.dispatch = counting


def wait_check() -> str | None:
    """What vLLM does in a step where the host waits for the device; None where it does not look,
    which says nothing of waits."""
    try:
        debug = import_module("vllm.utils.gpu_sync_debug")
    except ImportError:
        return None
    return debug._SYNC_CHECK_MODE if debug._sync_check_enabled else None


def traced(
    step: Callable[[], object], steps: int, parts: Iterable[tuple[Any, str]], path: str
) -> None:
    """Runs so many steps under torch's profiler, with a range around each and around its parts,
    methods of objects; leaves the trace in a file."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with _within_ranges(parts, record_function), profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function("step"):
                step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(path)


@contextmanager
def _within_ranges(parts: Any, record_function: Any) -> Iterator[None]:
    """Each of the methods within a range of the profiler that is named after it."""
    originals = []
    for owner, name in parts:
        if owner is not None:
            method = getattr(owner, name)
            originals.append((owner, name, method))

            def within(*args: Any, _method: Any = method, _name: str = name, **kwargs: Any) -> Any:
                with record_function(_name):
                    return _method(*args, **kwargs)

            setattr(owner, name, within)
    try:
        yield
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)
