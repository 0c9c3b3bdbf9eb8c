"""A worker's calls, and who need not look again while none of them is its user's."""

import importlib.metadata
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash import worker_calls

CONFIG = {"kv_transfer_config": None, "ec_transfer_config": None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> worker_calls.WorkerCalls:
    return worker_calls.WorkerCalls()


def vllms(name: str, **methods: Any) -> Any:
    """An instance of a class as vLLM has it: its methods run with its module's globals."""
    module = sys.modules.setdefault("vllm.stand_in", types.ModuleType("vllm.stand_in"))
    exec(f"class {name}:\n    def execute_model(self): ...", vars(module))
    for method, function in methods.items():
        setattr(vars(module)[name], method, function)
    return vars(module)[name]()


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in of vLLM's ``WorkerProc``, in a process without other plug-ins."""
    monkeypatch.setitem(sys.modules, "vllm.stand_in", types.ModuleType("vllm.stand_in"))
    monkeypatch.setattr(worker_calls, "entry_points", lambda **_: [])
    process, process.worker, process.worker.worker = (
        vllms(name) for name in ("WorkerProc", "Wrapper", "Worker")
    )
    process.worker.vllm_config = SimpleNamespace(**CONFIG)
    process.worker.worker.model_runner = vllms("Runner")
    return process


def test_from_the_first_step_on_until_a_call_of_the_users(calls: Any) -> None:
    assert not calls.none_other
    calls.begin("initialize_from_config", lambda: True)
    assert not calls.none_other
    calls.begin("execute_model", lambda: True)
    assert calls.none_other
    calls.begin("sample_tokens", lambda: True)
    assert calls.none_other
    calls.begin("apply_model", lambda: True)
    assert not calls.none_other
    calls.begin("execute_model", lambda: True)
    assert not calls.none_other


@pytest.mark.parametrize("method", ["apply_model", "reload_weights", "an_extension_s", b"pickled"])
def test_a_call_before_the_first_step_counts_too(calls: Any, method: Any) -> None:
    """It may have left a thread behind."""
    calls.begin(method, lambda: True)
    calls.begin("execute_model", lambda: True)
    assert not calls.none_other


def test_it_is_asked_once_whether_the_process_holds_other_code(calls: Any) -> None:
    asked = []
    for _ in range(3):
        calls.begin("execute_model", lambda: bool(asked.append(1)))
    assert not calls.none_other
    assert len(asked) == 1


def test_a_process_of_vllms_own_code(process: Any) -> None:
    assert worker_calls.runs_vllms_own(process)


@pytest.mark.parametrize("connector", CONFIG)
def test_a_connector_is_other_code(process: Any, connector: str) -> None:
    setattr(process.worker.vllm_config, connector, object())
    assert not worker_calls.runs_vllms_own(process)


@pytest.mark.parametrize("part", ["process", "worker", "runner"])
def test_a_replaced_method_is_other_code(process: Any, part: str) -> None:
    """Another plug-in's runner may set a hook in the step of a request that asks for it."""
    owner = {
        "process": process,
        "worker": process.worker.worker,
        "runner": process.worker.worker.model_runner,
    }[part]
    type(owner).execute_model = lambda self: None
    assert not worker_calls.runs_vllms_own(process)


def test_a_class_of_others_is_other_code(process: Any) -> None:
    """vLLM puts ``worker_extension_cls`` among the worker's bases."""

    class Extension: ...

    worker = process.worker.worker
    process.worker.worker = type("Both", (type(worker), Extension), {})()
    process.worker.worker.model_runner = worker.model_runner
    assert not worker_calls.runs_vllms_own(process)


def test_a_worker_in_another_frame_is_not_judged(process: Any) -> None:
    """Ray's runs in an actor."""
    process.__class__ = type(vllms("RayWorkerProc"))
    assert not worker_calls.runs_vllms_own(process)


@pytest.mark.parametrize(
    ("module", "allowed", "is_own"),
    [
        ("vllm.plugins.lora_resolvers", None, True),
        ("vllm_dflash.plugin", None, True),
        ("other.plugin", None, False),
        ("other.plugin", "dflash,theirs", False),
        ("other.plugin", "dflash", True),
    ],
)
def test_another_plug_in_is_other_code(
    process: Any, monkeypatch: pytest.MonkeyPatch, module: str, allowed: str | None, is_own: bool
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    point = importlib.metadata.EntryPoint("theirs", f"{module}:f", "vllm.general_plugins")
    monkeypatch.setattr(
        worker_calls, "entry_points", lambda group: [point] if group == point.group else []
    )
    assert worker_calls.runs_vllms_own(process) == is_own


@pytest.mark.vllm
def test_vllms_own_methods_are_what_it_calls() -> None:
    """What is taken for vLLM's own method of a worker is one; none takes a function to run."""
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_dflash.swap.worker import DrafterSwap

    for name in worker_calls._LEAVE_THE_MODEL:
        owners = (CPUWorker, WorkerWrapperBase, DrafterSwap)
        assert any(hasattr(owner, name) for owner in owners), name
    for kind in (WorkerProc, WorkerWrapperBase, *CPUWorker.__mro__):
        assert worker_calls._is_vllms_own(kind), kind


@pytest.mark.vllm
def test_each_call_is_seen_before_it_is_carried_out(
    calls: Any, process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_dflash.patches import worker_calls as record

    monkeypatch.setattr(record, "CALLS", calls)

    def original(owner: Any, rpc_request: Any) -> tuple[Any, Any, bool]:
        return owner, rpc_request, calls.none_other

    for method, seen in (("execute_model", True), ("apply_model", False)):
        request = (method, (), {}, None)
        found = record._execute_worker_rpc(original, process, request)
        assert found == (process, request, seen)


@pytest.mark.vllm
def test_a_look_is_kept_until_a_call_of_the_users(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook that nobody can have set is not looked for; one of a call is heeded, and so is each
    that comes later."""
    import torch

    from vllm_dflash.cpu import dispatch

    monkeypatch.setattr(dispatch, "CALLS", calls)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    untouched = dispatch.Untouched(model)

    def hooked() -> bool:
        """Whether a hook is seen; it is taken away again."""
        handle = model[0].register_forward_hook(print)
        seen = not untouched
        handle.remove()
        return seen

    assert untouched
    assert hooked()
    calls.begin("execute_model", lambda: True)
    assert hooked()  # it has not been looked at since
    assert untouched
    assert not hooked()
    calls.begin("apply_model", lambda: True)
    assert untouched
    assert hooked()
    calls.begin("execute_model", lambda: True)
    assert untouched
    assert hooked()
