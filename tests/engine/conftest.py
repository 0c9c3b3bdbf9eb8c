"""One engine a kind, shared by the tests that look at it: starting one costs more than running
it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from engine import forks
from engine.harness import DRAFTER, TARGET, Batch, held_out_prompts, run_engine

BATCH_SIZES = (1, 4, 16)


@pytest.fixture(autouse=True, scope="module")
def _quick_engine_processes() -> Iterator[None]:
    """Engines of our commands that run in this process are forks too; those of commands in
    processes of their own start as a user's do."""
    import subprocess

    from vllm_dflash.engines import process

    names = SimpleNamespace(**vars(subprocess) | {"Popen": forks.Popen})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", names)
        yield


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return held_out_prompts(64)


@pytest.fixture(scope="session")
def plain_float32(prompts: list[list[int]]) -> list[Batch]:
    """The embedded target without speculation: 64 prompts x 128 tokens, batches of 1, 4 and 16."""
    return run_engine(TARGET, None, prompts, batch_sizes=BATCH_SIZES)


@pytest.fixture(scope="session")
def dflash_float32(prompts: list[list[int]]) -> list[Batch]:
    """The same with the embedded drafter, every draft recorded."""
    return run_engine(TARGET, DRAFTER, prompts, batch_sizes=BATCH_SIZES, record=True)


@pytest.fixture(scope="session")
def plain_bfloat16(prompts: list[list[int]]) -> Batch:
    return run_engine(TARGET, None, prompts, dtype="bfloat16", logprobs=2)[0]


@pytest.fixture(scope="session")
def dflash_bfloat16(prompts: list[list[int]]) -> Batch:
    return run_engine(TARGET, DRAFTER, prompts, dtype="bfloat16", record=True)[0]
