"""A client's calls, and who need not look again because of them."""

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm


class RequestType(Enum):
    """As vLLM's."""

    ADD = b"\x00"
    UTILITY = b"\x03"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process whose client has not spoken yet."""
    from vllm_dflash.patches import client_calls as record

    from vllm_dflash import client_calls
    from vllm_dflash.cpu import dispatch

    fresh = client_calls.ClientCalls()
    for module in (client_calls, dispatch, record):
        monkeypatch.setattr(module, "CALLS", fresh)
    return fresh


def test_a_call_is_counted_before_it_is_carried_out(calls: Any) -> None:
    from vllm_dflash.patches.client_calls import _handle_client_request

    def original(core: Any, request_type: RequestType, request: Any) -> tuple[Any, int]:
        return request, calls.count

    core = SimpleNamespace()
    assert not calls.are_counted
    assert _handle_client_request(original, core, RequestType.ADD, "a") == ("a", 0)
    assert calls.are_counted
    assert _handle_client_request(original, core, RequestType.UTILITY, "b") == ("b", 1)


def test_a_look_is_kept_until_the_next_call(calls: Any) -> None:
    """A hook that nobody can have set is not looked for; one of a call is heeded at once."""
    from vllm_dflash.cpu.dispatch import Untouched

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    untouched = Untouched(model)
    handle = model[0].register_forward_hook(print)
    assert not untouched  # nothing is counted: each time
    handle.remove()
    assert untouched
    calls.begin(False)
    assert untouched
    handle = model[0].register_forward_hook(print)
    assert untouched
    calls.begin(True)
    assert not untouched
    handle.remove()
    assert not untouched
    calls.begin(True)
    assert untouched
