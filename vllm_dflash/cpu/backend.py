"""A CPU's part of the V1 proposer: the host is the device, so it knows what was rejected, and each
tensor operator counts.

pytest tests/engine/test_draft_parity.py tests/engine/test_context_integrity.py
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dflash.adaptive.settings import is_adaptive
from vllm_dflash.cost_profile import row_step
from vllm_dflash.cpu.huge_pages import use_huge_pages
from vllm_dflash.cpu.sampling import int32
from vllm_dflash.drafting.backend import Backend, Rows
from vllm_dflash.drafting.context_store import WriteRows
from vllm_dflash.drafting.layout import block_bounds, committed_rows, paged_slots, sampled_anchors
from vllm_dflash.drafting.measure import measure
from vllm_dflash.drafts import Drafts
from vllm_dflash.heads import Ranking
from vllm_dflash.log import logger
from vllm_dflash.patch import Patch
from vllm_dflash.patches import (
    cpu_layers,
    cpu_target,
    v1_confidences,
    v1_cost_profile,
    v1_draft_metadata,
    v1_steps_without_drafts,
    v1_verifier,
)
from vllm_dflash.plugin import patch_set

if TYPE_CHECKING:
    from vllm_dflash.drafting.v1 import DFlashProposer

_CHUNK_ROWS = 512
"""Context rows that are projected at once: what is computed in between stays in the processor's
caches."""
# By name each call would look its overload up.
_greedy_argmax: Any = torch.ops._C.greedy_argmax.default
_slot_mapping: Any = getattr(torch.ops._C, "compute_slot_mapping_kernel_impl", None)


def _slots(block_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """As ``paged_slots``, by vLLM's kernel in place of six operators of which each costs more than
    the work itself."""
    slots, bounds = torch.empty_like(positions), block_bounds(*positions.shape)
    _slot_mapping(bounds, positions.view(-1), block_table, slots.view(-1), page_size)
    return slots


class CPUBackend(Backend):
    """Drafts are verified by our own class; layers run kernel by kernel where they can."""

    skips = True
    slots = staticmethod(_slots if _slot_mapping else paged_slots)

    def __init__(self, proposer: "DFlashProposer") -> None:
        super().__init__(proposer)
        self._ones = torch.ones(proposer.max_batch_size, dtype=torch.int32)
        """Kept tokens where none was drafted."""

    def load(self, target_model: Any) -> None:
        """Takes the loaded drafter and puts our verifier into the runner."""
        proposer, config = self.proposer, self.proposer.vllm_config
        logits: Callable[[Tensor], Any] = proposer.model.rank_logits
        self.write_context = _in_chunks(self.write_by_modules)
        # A connector takes and brings keys and values in vLLM's attention modules.
        if config.kv_transfer_config is None:
            for record in cpu_target.PATCHES:
                patch_set().attempt(record, partial(_use_eager_layers, target_model, record))
            fast = patch_set().attempt(cpu_layers.PATCH, lambda: _eager_layers(proposer.model))
            if fast is not None:
                self.run_layers, write = fast
                self.write_context = _in_chunks(_checked(proposer.model.check_features, write))
            own = patch_set().attempt(cpu_layers.LOGITS, lambda: _eager_logits(proposer.model))
            logits = own or logits
        self.ranking = Ranking(
            logits,
            _greedy_argmax,
            lambda hidden: _greedy_argmax(logits(hidden).to(torch.float32)),
            confident=is_adaptive(config) and patch_set().fits(v1_confidences.PATCH),
            embed=proposer.model.embed_candidates,
            likely=proposer.model.likely,
        )
        attach, runner = patch_set().attach, proposer.runner
        attach(runner, [v1_verifier.PATCH], runner)
        self._verifier = runner.rejection_sampler
        attach(runner, [v1_draft_metadata.PATCH], runner, proposer.max_batch_size)
        attach(runner, [v1_steps_without_drafts.PATCH], proposer)
        attach(runner, [v1_cost_profile.PATCH], partial(measure, proposer))
        logger.info("moved %d MiB of this process's memory into huge pages", use_huge_pages() >> 20)

    def next_token_ids(
        self,
        native: Callable[..., tuple[Tensor, Tensor]],
        sampled: Tensor,
        discarded: Tensor,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        """As vLLM's, without its stand-ins for kernels, and without looking up tokens of prompts,
        of which one that is given as embeddings has none."""
        if self.proposer.runner.discard_request_mask.np[: len(sampled)].any():
            return sampled_anchors(sampled, discarded[: len(sampled)])
        if sampled.shape[1] == 1:
            return sampled[:, 0], self._ones[: len(sampled)]
        output, anchors, counts = self._verifier.last
        if output is sampled:
            return int32(anchors), int32(counts)
        kept = (sampled >= 0).sum(1, dtype=torch.int32)
        return sampled.gather(1, (kept - 1).long()[:, None])[:, 0], kept

    def rejected(
        self,
        native: Callable[..., Any],
        cad: CommonAttentionMetadata,
        spec_decode_metadata: Any,
        kept: Tensor,
    ) -> tuple[CommonAttentionMetadata, Tensor | None, Tensor | None]:
        """As vLLM's; None for the rejected tokens if nothing was drafted."""
        if spec_decode_metadata.max_spec_len == 0:
            return cad, None, None
        # A prompt that is not at its end keeps no token and has no drafts.
        rejected = [
            n + 1 - count if n else 0
            for n, count in zip(spec_decode_metadata.num_draft_tokens, kept.tolist(), strict=True)
        ]
        return cad, None, int32(rejected)

    def lost_rows(self, num_rejected: Tensor | None, num_reqs: int) -> list[int]:
        """[B] rejected rows."""
        return [0] * num_reqs if num_rejected is None else num_rejected.tolist()

    def committed(
        self, rows: Rows, cad: CommonAttentionMetadata, lengths: list[int], num_rejected: Tensor
    ) -> Rows:
        """Those rows and no others."""
        features, positions, slots = rows
        if sum(lengths) == len(features):
            return rows
        kept = committed_rows(
            cad.query_start_loc_cpu[: len(lengths)].tolist(), lengths, features.device
        )
        return features[kept], positions[kept], slots[kept]

    def next_input(self, session: Any, num_computed_tokens: int) -> None:
        """The session's seed goes on where it was."""
        self._verifier.next_input(session, num_computed_tokens)

    def query_start_loc(self, on_host: Tensor) -> Tensor:
        """``on_host`` itself."""
        return on_host

    def hand_out(self, tokens: Tensor, confidences: Tensor | None) -> Drafts:
        """As lists, with the confidences where the scheduler asks for them."""
        return Drafts(tokens.tolist(), None if confidences is None else confidences.tolist())


def _use_eager_layers(target_model: Any, record: Patch) -> None:
    # Imported here, as below: what is optional needs names of vLLM's that the rest does without.
    from vllm_dflash.cpu.target_layers import use_eager_layers

    use_eager_layers(target_model, record)


def _eager_layers(drafter: Any) -> tuple[Any, WriteRows] | None:
    """A loaded drafter's layers and its context kernel by kernel; None where its modules run."""
    from vllm_dflash.cpu.dispatch import foreign_classes, leave_out, other_choices
    from vllm_dflash.cpu.draft_layers import EagerContext, EagerLayers
    from vllm_dflash.cpu.layers import can_run

    fits = can_run(drafter.model)
    others = other_choices if fits else foreign_classes
    if (why := next(others(drafter.model), None)) is not None:
        leave_out("the kernels of the drafter's layers", why)
        return None
    if not fits:
        return None
    layers = EagerLayers(drafter.model)
    return layers, EagerContext(drafter.model, layers)


def _eager_logits(drafter: Any) -> Callable[[Tensor], Any] | None:
    """Its logits by one kernel; None where the modules run."""
    from vllm_dflash.cpu.draft_layers import eager_logits
    from vllm_dflash.cpu.layers import can_run

    return eager_logits(drafter) if can_run(drafter.model) else None


def _checked(check: Callable[[Tensor], None], write: WriteRows) -> WriteRows:
    def writing(features: Tensor, positions: Tensor, slots: Tensor) -> None:
        check(features)
        write(features, positions, slots)

    return writing


def _in_chunks(write: WriteRows) -> WriteRows:
    """``write`` for any number of rows, by parts of round numbers: a CPU's kernels are made anew
    for each number of rows."""

    def writing(*rows: Tensor) -> None:
        if rows[0].shape[0] <= _CHUNK_ROWS:
            write(*_padded(rows))
            return
        for chunk in zip(*(column.split(_CHUNK_ROWS) for column in rows), strict=True):
            write(*_padded(chunk))

    return writing


def _padded(rows: tuple[Tensor, ...]) -> Iterable[Tensor]:
    """``rows``, of [N, ...] each, and their last ones again up to a round number."""
    count = rows[0].shape[0]
    missing = -count % row_step(count)
    if not missing:
        return rows
    return [torch.cat([each, each[-1:].expand(missing, *each.shape[1:])]) for each in rows]
