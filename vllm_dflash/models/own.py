"""Tables that a checkpoint may bring in place of the target's: embedding, lm_head with a draft vocabulary, mask embedding.

pytest tests/engine/test_formats.py
"""

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_dflash.weights import MASK_EMBEDDING_FILE, load_mask_embedding, target_ids


class OwnTables:
    """Gives a drafter the tables of its checkpoint; what it has none of, vLLM shares with it from the target."""

    @staticmethod
    def take(drafter: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Moves the tables out of ``tensors`` (name to tensor) into modules of ``drafter``.

        Raises:
            DrafterConfigError: a table maps to tokens that do not exist, or the mask embedding's file is unusable.
        """
        config, device = drafter.drafter_config, drafter.model.mask_embedding.device
        vocab, draft_vocab, hidden = config.vocab_size, config.draft_vocab_size or config.vocab_size, config.hidden_size
        with torch.device(device):
            if "embed_tokens.weight" in tensors:
                embedding = VocabParallelEmbedding(vocab, hidden, params_dtype=drafter.dtype)
                embedding.weight_loader(embedding.weight, tensors.pop("embed_tokens.weight"))
                drafter.model.embed_tokens, drafter.has_own_embed_tokens = embedding, True
            if "lm_head.weight" in tensors:
                head = ParallelLMHead(draft_vocab, hidden, params_dtype=drafter.dtype, prefix="draft_lm_head")
                head.weight_loader(head.weight, tensors.pop("lm_head.weight"))
                drafter.lm_head, drafter.has_own_lm_head = head, True
            if "d2t" in tensors:
                drafter.draft_ids = target_ids(tensors.pop("d2t"), vocab).to(device)
        data = get_hf_file_bytes(MASK_EMBEDDING_FILE, drafter.model_path, drafter.revision)
        if data is not None:
            drafter.model.mask_embedding.data.copy_(load_mask_embedding(data, config, MASK_EMBEDDING_FILE, drafter.dtype))
            drafter.model.has_mask_embedding = True
