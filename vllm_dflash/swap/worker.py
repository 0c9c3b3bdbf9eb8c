"""What a worker of vLLM gains by ``--worker-extension-cls vllm_dflash.swap.worker.DrafterSwap``: a
method that the endpoint calls by name on every rank, which answers and never raises.

vLLM's own ``start_draft_weight_update`` and its companions say by an exception alone that they
refuse, which one rank of several must not (``models.swapping``), and answer nothing otherwise. What
loads the tensors is the same.

    pytest tests/engine/test_swap.py
"""

from typing import Any

_CALLS = ("which", "stage", "staged", "commit", "drop", "count_refusal")


class DrafterSwap:
    """Mixed into vLLM's worker, whose attributes it uses."""

    def dflash_drafter(self, call: str, *args: Any) -> dict[str, Any]:
        """A call of ``Swapping``'s by its name."""
        from vllm.config import set_current_vllm_config

        worker: Any = self
        swapping = getattr(worker.get_draft_model(), "swapping", None)
        if swapping is None:
            return {"refused": "this server has no drafter of vllm-dflash: start it with one"}
        assert call in _CALLS
        with set_current_vllm_config(worker.vllm_config):
            answer: dict[str, Any] = getattr(swapping, call)(*args)
        return answer
