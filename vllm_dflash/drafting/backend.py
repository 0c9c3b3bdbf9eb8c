"""What the V1 proposer leaves to the device that it runs on. Here: a GPU's way, which is vLLM's
own; ``cpu/backend.py`` has a CPU's.

pytest tests/engine/test_draft_parity.py
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dflash.drafting.context_store import WriteRows
from vllm_dflash.drafting.layout import paged_slots, sampled_anchors, without_rejected
from vllm_dflash.drafts import Drafts
from vllm_dflash.heads import Ranking

if TYPE_CHECKING:
    from vllm_dflash.drafting.v1 import DFlashProposer

Rows: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Features [N, T * H], positions [N] int64 and cache slots [N] int64 of a step's rows."""


class Backend:
    """For a device that the host does not wait for."""

    ranking: Ranking
    """What the head ranks with."""
    write_context: WriteRows
    """What projects context rows and writes them into the cache."""
    run_layers: Callable[[Tensor, Tensor, Tensor, Any], Tensor] | None = None
    """Token ids [N], positions [N], slots [N] and attention metadata by layer -> hidden states [N,
    H]; None: vLLM's modules run."""
    skips = False
    """Whether drafts may be handed out for some requests only."""
    slots = staticmethod(paged_slots)
    """Cache slots of a block's positions, see ``layout.SlotMapping``."""

    def __init__(self, proposer: "DFlashProposer") -> None:
        self.proposer = proposer

    def load(self, target_model: Any) -> None:
        """Takes the proposer's loaded drafter, whose target is ``target_model``."""
        proposer = self.proposer
        logits = proposer.model.rank_logits
        self.ranking = Ranking(
            logits,
            lambda scores: scores.argmax(-1),
            proposer._greedy_sample,
            confident=False,
            embed=proposer.model.embed_candidates,
        )
        self.write_context = self.write_by_modules

    def write_by_modules(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Projects context rows and writes them into the cache by the drafter's own modules."""
        model = self.proposer.model
        model.precompute_and_store_context_kv(
            model.combine_hidden_states(features), positions, slots
        )

    def next_token_ids(
        self,
        native: Callable[..., tuple[Tensor, Tensor]],
        sampled: Tensor,
        discarded: Tensor,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        """Each request's anchor [B] int32, and how many of ``sampled`` [B, n] (-1: rejected) it
        keeps [B] int32, none where it is ``discarded`` [B] bool; ``native`` is vLLM's way, which
        looks up a token of each prompt, and ends the engine where a prompt is embeddings."""
        if self.proposer.vllm_config.model_config.enable_prompt_embeds:
            return sampled_anchors(sampled, discarded[: len(sampled)])
        return native(sampled, *args, discarded)

    def rejected(
        self,
        native: Callable[..., Any],
        cad: CommonAttentionMetadata,
        spec_decode_metadata: Any,
        kept: Tensor,
    ) -> tuple[CommonAttentionMetadata, Tensor | None, Tensor | None]:
        """The step's metadata, nothing that we need, and each request's rejected tokens [B] int32;
        ``native`` is vLLM's way."""
        return native(cad, spec_decode_metadata, kept)

    def lost_rows(self, num_rejected: Tensor | None, num_reqs: int) -> list[int]:
        """[B] rejected rows as far as the host knows them: not at all."""
        return [0] * num_reqs

    def committed(
        self, rows: Rows, cad: CommonAttentionMetadata, lengths: list[int], num_rejected: Tensor
    ) -> Rows:
        """Of a step's ``rows`` those that were committed: all stay, and what was rejected has no
        slot."""
        features, positions, slots = rows
        return features, positions, without_rejected(slots, cad.query_start_loc, num_rejected)

    def next_input(self, session: Any, num_computed_tokens: int) -> None:
        """A streaming session's next input comes, ``session`` being as with the one before;
        nothing that a GPU's verification, vLLM's own, would keep."""

    def query_start_loc(self, on_host: Tensor) -> Tensor:
        """[B + 1] int32, where each block's rows begin, on the device."""
        proposer = self.proposer
        return proposer.arange[: len(on_host)] * proposer.draft_block_size

    def hand_out(self, tokens: Tensor, confidences: Tensor | None) -> "Tensor | Drafts":
        """Draft tokens [B, K] as vLLM's runner takes them; on a GPU nobody asks for confidences."""
        return tokens
