"""What a worker of vLLM gains by ``--worker-extension-cls vllm_dflash.swap.worker.DrafterSwap``:
methods that the endpoint calls by name on every rank, each of which answers and never raises.

vLLM's own ``start_draft_weight_update`` and its companions say by an exception alone that they
refuse, which one rank of several must not (``models.swapping``), and answer nothing otherwise. What
loads the tensors is the same.

    pytest tests/engine/test_swap.py
"""

from typing import Any

_NONE = {"refused": "this server has no drafter of vllm-dflash: start it with one"}


class DrafterSwap:
    """Mixed into vLLM's worker, whose attributes it uses; its own names begin with ``dflash``."""

    def dflash_stage(self, ticket: str, folder: str, target_files: str | None) -> dict[str, Any]:
        """``Swapping.stage``."""
        swapping = self._dflash_swapping()
        return _NONE if swapping is None else swapping.stage(ticket, folder, target_files)

    def dflash_staged(self, ticket: str) -> dict[str, Any]:
        """``Swapping.staged``."""
        swapping = self._dflash_swapping()
        return _NONE if swapping is None else swapping.staged(ticket)

    def dflash_commit(self, ticket: str, weights: str, mask: bool = False) -> dict[str, Any]:
        """``Swapping.commit``; with ``mask`` drafts see nothing of what the old drafter wrote."""
        from vllm.config import set_current_vllm_config

        swapping: Any = self._dflash_swapping()
        worker: Any = self
        if swapping is None:
            return _NONE
        coverage = getattr(getattr(worker.model_runner, "drafter", None), "coverage", None)
        if mask and coverage is None:
            swapping.drop(ticket)
            return {"refused": "only the V1 model runner masks context: choose another --context"}
        with set_current_vllm_config(worker.vllm_config):
            answer: dict[str, Any] = swapping.commit(ticket, weights)
        if mask and "refused" not in answer:
            cache = worker.vllm_config.cache_config
            pages = cache.num_gpu_blocks * cache.block_size // coverage.page_size
            coverage.bad_pages.update(range(pages))
        return answer

    def dflash_drop(self, ticket: str) -> dict[str, Any]:
        """``Swapping.drop``."""
        swapping = self._dflash_swapping()
        return _NONE if swapping is None else swapping.drop(ticket)

    def dflash_which(self) -> dict[str, Any]:
        """``Swapping.which``."""
        swapping = self._dflash_swapping()
        return _NONE if swapping is None else swapping.which()

    def _dflash_swapping(self) -> Any:
        worker: Any = self
        return getattr(worker.get_draft_model(), "swapping", None)
