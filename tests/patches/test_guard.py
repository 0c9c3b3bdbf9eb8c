"""What runs around vLLM's own functions asks first whether the drafter is ours, and reads nothing
else of vLLM's objects where it is not.

Once a wrapper read a request's ``resumable`` first, and another the runner's
``discard_request_mask``: renamed in vLLM, both ended engines that had no drafter at all.
"""

import ast
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from vllm_dflash.patches import ALL, environment, server_metrics
from vllm_dflash.patches.guard import part_of_ours

from vllm_dflash.patch import Patch
from vllm_dflash.upstream import Sources

WRAPPERS = [record for record in ALL if record.scope == "class"]
FOR_ALL = {record for record in WRAPPERS if record.switch}
"""They act on every method's drafts, and each has a switch."""
OF_A_PROCESS = {environment.PATCH, server_metrics.PATCH}
"""They run where no drafter is known, and read nothing of an engine's."""


class Untouchable:
    """An object of vLLM's, of which the guard's ``allowed`` may be read, and nothing else."""

    def __init__(self, **allowed: Any) -> None:
        vars(self).update(allowed)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError(f"{name} was set")


def speculative(method: str) -> Untouchable:
    """A ``SpeculativeConfig``; vLLM's own dflash, and a whole model, have the drafter's
    architecture read as well."""
    if method not in ("dflash", "draft_model"):
        return Untouchable(method=method, model=None)
    draft = Untouchable(architectures=["AnotherDraftModel"])
    return Untouchable(method=method, model=None, draft_model_config=draft)


OTHERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: None,
    "ngram": lambda: speculative("ngram"),
    "eagle3": lambda: speculative("eagle3"),
    "draft_model": lambda: speculative("draft_model"),
    "another dflash": lambda: speculative("dflash"),
}


def is_of_the_config(record: Patch) -> bool:
    """Whether its first argument is the ``SpeculativeConfig`` itself: in plain serving there is
    none, and it is never called."""
    return ":SpeculativeConfig." in record.target


def call(record: Patch, config: Any) -> tuple[list[Any], Any]:
    """A wrapper around a stand-in of the original: what that was called with, and what came
    back."""
    calls: list[Any] = []

    def original(*args: Any) -> str:
        calls.append(args)
        return "vLLM's own"

    node = Sources().locate(record.target).node
    if isinstance(node, ast.ClassDef):  # the proposer: its constructor, with a config first
        count, stand_in = 3, type("Original", (), {"__new__": lambda cls, *args: original(*args)})
    else:
        count, stand_in = len(node.args.args), original
    is_property = any(ast.unparse(each) == "property" for each in node.decorator_list)
    first = Untouchable(
        vllm_config=Untouchable(speculative_config=config), speculative_config=config
    )
    if is_of_the_config(record):
        first = config
    elif ":WorkerProc." in record.target:  # the config is its worker's
        first = Untouchable(worker=first)
    args = (first, *(Untouchable() for _ in range(count - 1)))
    assert record.replace is not None
    wrapper = record.replace(property(stand_in) if is_property else stand_in)
    result = (wrapper.fget if is_property else wrapper)(*args)
    assert calls == [args]
    return calls, result


@pytest.mark.parametrize(
    ("record", "who"),
    [
        pytest.param(record, who, id=f"{record.qualname}-{who}")
        for record in WRAPPERS
        if record not in FOR_ALL | OF_A_PROCESS
        for who in OTHERS
        if who != "plain" or not is_of_the_config(record)
    ],
)
def test_without_a_drafter_of_ours_a_wrapper_reads_nothing_but_who_drafts(
    record: Patch, who: str
) -> None:
    _, result = call(record, OTHERS[who]())
    assert result == "vLLM's own"


def test_the_metrics_of_a_server_end_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Its process knows no engine's drafter, so it has no guard; and the app has to go on."""
    calls: list[Any] = []
    assert server_metrics.PATCH.replace is not None
    app = Untouchable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_metrics, "_add_ours", lambda app: app.routes)
        server_metrics.PATCH.replace(calls.append)(app)
    assert calls == [app]
    assert "left out of /metrics" in caplog.text


def test_the_wrappers_import_no_proposer_where_nobody_needs_it() -> None:
    """A name that only our proposer imports, gone from vLLM, took everything back also in an engine
    without a drafter."""
    code = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
import vllm.v1.worker.gpu_model_runner as runner
assert type(runner.DFlashProposer).__name__ == "ByArchitecture"
ours = "vllm_dflash.drafting", "vllm_dflash.cpu"
assert not [name for name in sys.modules if name.startswith(ours)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_part_that_cannot_be_imported_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"No module named .*VLLM_DFLASH=0"):
        part_of_ours("vllm_dflash.no_such_part", "Part")
