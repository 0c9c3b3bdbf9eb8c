"""Measures an engine's steps at its warm-up, on its own kernels: the target by rows and contexts,
and the drafter by requests and contexts. What comes out is kept for the controller
(``vllm_dflash/profiles.py``), and read at the next start. Here is what both runners share, and the
steps of V1; those of V2 are in ``measure_v2.py``.

Nothing is written into the cache of keys and values that anybody reads: no request is there yet.

    pytest tests/engine/test_adaptive.py
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dflash.adaptive.settings import is_adaptive
from vllm_dflash.checks import drafter_config
from vllm_dflash.cost_profile import Profile, fit, lowest, round_rows
from vllm_dflash.engine_profiles import profile_key
from vllm_dflash.log import logger
from vllm_dflash.profiles import find, keep
from vllm_dflash.progress import Progress
from vllm_dflash.steps import Work

if TYPE_CHECKING:
    from vllm_dflash.drafting.v1 import DFlashProposer

SECONDS = 10.0
"""In which all has to be measured; what is not by then is left out."""
_MOST_ROWS = 512
"""From which on the line goes on."""
_ROUNDS = 8
"""In each of which every cell is measured once: where others compute beside, not all of its
measurements are disturbed."""


def measure(proposer: "DFlashProposer") -> None:
    """Measures the steps of V1: see ``measure_once``."""

    def profile() -> Profile:
        with torch.inference_mode(), _alone(proposer):
            return _profile(proposer)

    measure_once(proposer.vllm_config, profile)


def measure_once(vllm_config: Any, profile: Callable[[], Profile]) -> None:
    """Keeps the ``profile`` of an engine that drafts adaptively, which is measured now, unless that
    was done before, and not in a busy moment. Where it fails, the log says so, and the engine
    serves."""
    if not is_adaptive(vllm_config):
        return
    try:
        folder, name = profile_key(vllm_config)
        kept = find(folder, name)
        if agreed(vllm_config, kept is None or not kept.is_steady):
            keep(folder, name, profile())
    except Exception as error:  # as above
        logger.warning(
            "the cost of steps could not be measured, and a guess stands for it: %s: %s",
            type(error).__name__,
            error,
        )


def agreed(vllm_config: Any, decision: bool) -> bool:
    """What the first of the tensor-parallel ranks has decided: all of them run the same steps, or
    they would wait for each other for ever."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return decision
    return bool(get_tp_group().broadcast_object(decision, src=0))


@contextmanager
def _alone(proposer: "DFlashProposer") -> Iterator[None]:
    """Steps of no request: the target's dummy runs leave the drafter out, and nobody watches what
    is written."""
    watch = proposer.watch
    proposer.watch = SimpleNamespace(  # type: ignore[assignment]
        written=lambda cad, num_rejected: (None, [1] * cad.num_reqs),
        note=lambda cad, starts, lengths: None,
    )
    proposer.is_measured = True
    try:
        yield
    finally:
        proposer.watch, proposer.is_measured = watch, False


def _profile(proposer: "DFlashProposer") -> Profile:
    config, block = proposer.vllm_config, proposer.draft_block_size
    most_reqs, k = config.scheduler_config.max_num_seqs, proposer.num_speculative_tokens
    pages = proposer.runner.kv_cache_config.num_blocks - 1
    # A context as long as fits beside a block, and an eighth of it.
    longest = min(proposer.max_model_len, pages * proposer.page_size) - 2 * block
    contexts = [context for context in (longest // 8, longest) if context >= 512]
    plan: list[Work] = []
    for rows in round_numbers(min(most_reqs * (k + 1), proposer.runner.max_num_tokens, _MOST_ROWS)):
        plan.append(Work(1, rows, 0))
    for num_reqs in round_numbers(max(min(most_reqs, _MOST_ROWS // block), 1)):
        plan.append(Work(num_reqs, 0, num_reqs * block))
    for context in contexts:
        plan += [Work(1, rows, 0, context, rows * context) for rows in (1, k + 1)]
        plan.append(Work(1, 0, block, context, 0, block * context))
    # Small ones first: those are sure to be there when time is up, and all others go on from them.
    plan.sort(key=lambda work: work.num_tokens + work.draft_rows + 1e-3 * work.num_context)
    began, runs, first = time.monotonic(), [], []
    for work in Progress(plan, desc="measuring steps", unit="step"):
        is_large = max(work.num_tokens, work.draft_rows) > 2 * block
        if is_large and agreed(config, time.monotonic() > began + SECONDS):
            break
        run = _draft(proposer, work) if work.draft_rows else _target(proposer, work)
        run()  # not counted: kernels are made for a number of rows that is new
        runs.append(run)
        first.append(_seconds(proposer, run))
    a_round, rounds = (time.monotonic() - began) / 2, [first]
    while len(rounds) < _ROUNDS:
        if agreed(config, time.monotonic() + a_round > began + SECONDS):
            break
        rounds.append([_seconds(proposer, run) for run in runs])
    cells, is_steady = lowest(plan, rounds)
    if not is_steady:
        logger.info("steps took longer now and then: they are measured anew at the next start")
    return fit(cells, is_steady)


def _seconds(proposer: "DFlashProposer", run: Callable[[], None]) -> float:
    _wait(proposer)
    began = time.perf_counter()
    run()
    _wait(proposer)
    return time.perf_counter() - began


def round_numbers(most: int) -> list[int]:
    """Two in each octave up to ``most``."""
    return sorted(
        {round_rows(n) for i in range(most.bit_length()) for n in (1 << i, 3 << i) if n < most}
        | {most}
    )


def _wait(proposer: "DFlashProposer") -> None:
    if proposer.device.type != "cpu":
        torch.accelerator.synchronize()


def _target(proposer: "DFlashProposer", work: Work) -> Callable[[], None]:
    """A forward of the target, with the logits of all its rows: each may be verified."""
    runner, rows = proposer.runner, work.num_tokens
    one_request = work.num_context > 0 and rows > 1
    num_reqs = 1 if one_request else min(rows, proposer.vllm_config.scheduler_config.max_num_seqs)
    # The last one gets what is left over.
    seq_lens = work.num_context + rows // num_reqs + rows % num_reqs
    tables = [table.block_table for table in runner.input_batch.block_table.block_tables]

    def run() -> None:
        for table in tables:
            _spread(table.np[:1], proposer)
        try:
            hidden, _ = runner._dummy_run(
                rows,
                force_attention=True,
                uniform_decode=one_request,
                allow_microbatching=False,
                skip_eplb=True,
                profile_seq_lens=seq_lens,
            )
            runner.model.compute_logits(hidden[:rows]).argmax(-1)
        finally:
            for table in tables:
                table.np[:1] = 0

    return run


def _draft(proposer: "DFlashProposer", work: Work) -> Callable[[], None]:
    """A draft as the runner asks for it, after a step of one row a request."""
    count, device = work.num_reqs, proposer.device
    seen = work.num_context + 1
    pages = -(-(seen + proposer.draft_block_size) // proposer.page_size) + 1
    table = torch.zeros(count, pages, dtype=torch.int32)
    _spread(table.numpy(), proposer)
    starts = torch.arange(count + 1, dtype=torch.int32)
    lengths = torch.full((count,), seen, dtype=torch.int32)
    cad = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=count,
        num_actual_tokens=count,
        max_query_len=1,
        max_seq_len=seen,
        block_table_tensor=table.to(device),
        slot_mapping=torch.full((count,), -1, dtype=torch.int64, device=device),
    )
    drafter = drafter_config(proposer.draft_model_config.hf_config)
    features = torch.zeros(
        count, drafter.num_features * drafter.hidden_size, dtype=proposer.dtype, device=device
    )
    positions = torch.full((count,), seen - 1, dtype=torch.int64, device=device)
    anchors = torch.zeros(count, dtype=torch.int32, device=device)

    def run() -> None:
        # Past what stands around it and counts drafts.
        type(proposer).propose(
            proposer,
            proposer.num_speculative_tokens,
            anchors,
            positions,
            features,
            anchors,
            None,
            cad,
            SimpleNamespace(all_greedy=True),
        )

    return run


def _spread(table: Any, proposer: "DFlashProposer") -> None:
    """Pages in a row for each request, [B, n] in place: of one page all reads would be from the
    processor's caches. Page 0 is vLLM's own."""
    pages = proposer.runner.kv_cache_config.num_blocks - 1
    count = table.shape[0] * table.shape[1]
    table[:] = (torch.arange(count, dtype=torch.int32) % pages + 1).view(table.shape).numpy()
