"""Tables that a checkpoint may bring in place of the target's: embedding, lm_head with a draft
vocabulary, mask embedding.

pytest tests/engine/test_formats.py tests/engine/test_reload.py
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.models.parameters import load_into
from vllm_dflash.weights.mask_embedding import (
    MASK_EMBEDDING,
    MASK_EMBEDDING_FILE,
    load_mask_embedding,
)
from vllm_dflash.weights.values import target_ids

if TYPE_CHECKING:
    from vllm_dflash.models.drafter import DrafterForCausalLM

_EMBEDDING, _HEAD, _OFFSETS = "embed_tokens.weight", "lm_head.weight", "d2t"


class OwnTables:
    """Gives a drafter the tables of its checkpoint; what it has none of, vLLM shares with it from
    the target."""

    def __init__(self, drafter: "DrafterForCausalLM") -> None:
        self._drafter = drafter
        self._made: dict[str, nn.Module] = {}
        """The drafter's own, by the checkpoint's name; vLLM may put the target's in the place of
        one that is equal."""

    def load(self, name: str, tensor: Tensor) -> bool:
        """Loads a table; returns whether ``name`` is one's.

        Raises:
            DrafterConfigError: ``d2t`` maps to tokens that do not exist.
        """
        drafter = self._drafter
        if name == _OFFSETS:
            ids = target_ids(tensor, drafter.drafter_config.vocab_size)
            if drafter.draft_ids is None:
                drafter.draft_ids = ids.to(drafter.model.mask_embedding.device)
            drafter.draft_ids.copy_(ids)
        elif name == MASK_EMBEDDING:
            load_into(drafter.model.mask_embedding, tensor)
        elif name in (_EMBEDDING, _HEAD):
            if self._place(name).weight is None:
                self._make(name)
            # vLLM shares the target's where it is equal at the start; then this one is equal too,
            # as ``check_update`` has seen.
            if self._is_own(name):
                load_into(self._place(name).weight, tensor)
        else:
            return False
        return True

    def read_mask_embedding(self) -> Tensor | None:
        """Takes the mask embedding [H] over from the checkpoint's file, where it has that, and
        returns it.

        Raises:
            DrafterConfigError: the file is unusable.
        """
        drafter = self._drafter
        data = get_hf_file_bytes(MASK_EMBEDDING_FILE, drafter.model_path, drafter.revision)
        if data is None:
            return None
        mask = load_mask_embedding(data, drafter.drafter_config, MASK_EMBEDDING_FILE, drafter.dtype)
        self.load(MASK_EMBEDDING, mask)
        drafter.model.has_mask_embedding = True
        return mask

    def check_update(self, tensors: dict[str, Tensor]) -> None:
        """Refuses tables, by name and each of the shape of the one before, that an engine that runs
        cannot take.

        Raises:
            DrafterConfigError: ``d2t`` maps to tokens that do not exist, or a table would have to
                be written over the target's.
        """
        if _OFFSETS in tensors:
            target_ids(tensors[_OFFSETS], self._drafter.drafter_config.vocab_size)
        for name in (_EMBEDDING, _HEAD):
            if (
                name in tensors
                and not self._is_own(name)
                and not self._is_shared(name, tensors[name])
            ):
                raise DrafterConfigError(
                    f"the drafter's {name} was the target's at the start, so that vLLM has kept one"
                    " of the two, and the update brings another: restart vLLM with the new"
                    " drafter. The weights from before the update stay in force"
                )

    def _is_shared(self, name: str, tensor: Tensor) -> bool:
        """Whether the target's table, of which this rank has a part, is this one."""
        place = self._place(name)
        place = getattr(place, "base_layer", place)
        kept, rows = get_layerwise_info(place).kernel_tensors, place.shard_indices
        weight = place.weight if kept is None else kept[0]["weight"]
        part = tensor[rows.org_vocab_start_index : rows.org_vocab_end_index]
        return torch.equal(weight[: len(part)].cpu(), part.to(weight.dtype).cpu())

    def _is_own(self, name: str) -> bool:
        return name in self._made and self._place(name) is self._made[name]

    def _place(self, name: str) -> Any:
        return self._drafter.model.embed_tokens if name == _EMBEDDING else self._drafter.lm_head

    def _make(self, name: str) -> None:
        """Makes the module that holds one of the two large tables."""
        drafter, config = self._drafter, self._drafter.drafter_config
        vocab, hidden = config.vocab_size, config.hidden_size
        table: nn.Module
        with torch.device(drafter.model.mask_embedding.device):
            if name == _EMBEDDING:
                table = drafter.model.embed_tokens = VocabParallelEmbedding(
                    vocab, hidden, params_dtype=drafter.dtype
                )
                drafter.has_own_embed_tokens = True
                drafter.model.embedding_scale = 1.0  # it is what the drafter takes
            else:
                table = drafter.lm_head = ParallelLMHead(
                    config.draft_tokens, hidden, params_dtype=drafter.dtype, prefix="draft_lm_head"
                )
                drafter.has_own_lm_head = True
            self._made[name] = table
            # vLLM does this for the modules that a model is built with.
            record_metadata_for_reloading(table)
