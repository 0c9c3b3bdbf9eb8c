"""Attention metadata of a V1 step's block, by draft layer.

pytest tests/engine/test_draft_parity.py tests/engine/test_formats.py
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from vllm_dflash.drafting.layout import BlockLayout, block_bounds
from vllm_dflash.errors import DrafterConfigError

if TYPE_CHECKING:
    from vllm_dflash.drafting.v1 import DFlashProposer


def layer_metadata(
    proposer: "DFlashProposer",
    causal: Mapping[str, bool],
    layout: BlockLayout,
    cad: CommonAttentionMetadata,
) -> dict[str, Any]:
    """Attention metadata by draft layer; layers differ only in whether a query sees later ones of
    its block.

    Args:
        causal: by draft layer, whether it sees none.
        cad: the target step's metadata in the draft layers' KV cache group.

    Raises:
        DrafterConfigError: the attention backend cannot attend so.
    """
    built = {}
    for flag in sorted(set(causal.values())):
        # Past vLLM's DFlashProposer, which asserts that no layer is causal.
        _, by_layer = SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata(
            proposer, _block_metadata(proposer, layout, cad, flag)
        )
        built[flag] = by_layer
        for name, metadata in by_layer.items():
            if getattr(metadata, "causal", None) is not flag:
                raise DrafterConfigError(
                    f"the attention backend of {name} cannot attend"
                    f" {'causally' if flag else 'to both sides'}: choose another with"
                    " attention_backend in the speculative config, such as FLASH_ATTN"
                )
    return {name: built[flag][name] for name, flag in causal.items()}


def _block_metadata(
    proposer: "DFlashProposer", layout: BlockLayout, cad: CommonAttentionMetadata, causal: bool
) -> CommonAttentionMetadata:
    """Attention metadata of the block: b queries a request."""
    upper_bound, b, most = (
        cad.seq_lens_cpu_upper_bound,
        proposer.draft_block_size,
        proposer.max_model_len,
    )
    starts = block_bounds(cad.num_reqs, b)
    return CommonAttentionMetadata(
        query_start_loc=proposer.backend.query_start_loc(starts),
        query_start_loc_cpu=starts,
        seq_lens=layout.seq_lens,
        # An upper bound may count rejected tokens; it only sizes work.
        seq_lens_cpu_upper_bound=(
            None if upper_bound is None else (upper_bound + b).clamp(max=most)
        ),
        num_reqs=cad.num_reqs,
        num_actual_tokens=layout.input_ids.shape[0],
        max_query_len=b,
        max_seq_len=min(cad.max_seq_len + b, most),
        block_table_tensor=cad.block_table_tensor,
        slot_mapping=layout.slot_mapping,
        causal=causal,
    )
