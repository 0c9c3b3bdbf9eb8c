"""A stand-in for a worker of vLLM's under the V2 runner, which the warm-up's measurement
(``drafting/measure_v2.py``) is run on: it keeps to what a runner can do, and has a clock of its
own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from simulation_async import h200
from vllm_dflash.cost_profile import Profile, fit
from vllm_dflash.steps import Work

K, BLOCK, PAGE = 7, 16, 32


class FakeWorker:
    """Steps take what ``cost`` says by the worker's own clock; what a runner could not do raises
    ``AssertionError``."""

    def __init__(
        self,
        *,
        cost: Callable[[Work], float] = h200,
        max_num_seqs: int = 32,
        max_num_tokens: int = 2048,
        max_model_len: int = 40960,
        num_blocks: int = 4096,
        ranks: int = 1,
        connector: bool = False,
        k: int = K,
    ) -> None:
        self.cost, self.now, self.rank, self.fails_at = cost, 0.0, 0, -1
        self.ids: dict[str, Any] = {}
        """Of the requests that are there: pages, positions, and drafts to be verified."""
        self.steps: list[tuple[int, int, int, int]] = []
        """Of each step: requests, rows a request, drafts and contexts."""
        self.running = 0
        """Steps whose output nobody has waited for."""
        model = SimpleNamespace(
            model="m",
            revision=None,
            dtype="bfloat16",
            quantization=None,
            max_model_len=max_model_len,
            enforce_eager=False,
            get_vocab_size=lambda: 500,
            hf_text_config=SimpleNamespace(hidden_size=64),
        )
        self.vllm_config = SimpleNamespace(
            model_config=model,
            speculative_config=SimpleNamespace(draft_model_config=model, num_speculative_tokens=k),
            cache_config=SimpleNamespace(cache_dtype="auto", block_size=PAGE),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            scheduler_config=SimpleNamespace(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_tokens,
                scheduler_cls="vllm_dflash.adaptive.scheduler.AdaptiveAsyncScheduler",
            ),
            device_config=SimpleNamespace(device_type="cpu"),
            use_v2_model_runner=True,
            kv_transfer_config=object() if connector else None,
            num_lookahead_tokens=BLOCK,
        )
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.caches = [torch.ones(4), torch.ones(2)]
        self.disabled = False
        self.model_runner = SimpleNamespace(
            device=torch.device("cpu"),
            vllm_config=self.vllm_config,
            model_config=model,
            model_state=None,
            max_model_len=max_model_len,
            max_num_reqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            kv_caches=self.caches,
            kv_cache_config=SimpleNamespace(
                num_blocks=num_blocks, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * 2
            ),
            kv_connector=SimpleNamespace(set_disabled=lambda off: setattr(self, "disabled", off)),
            speculator=SimpleNamespace(
                num_draft_tokens=k, num_query_per_req=BLOCK, is_measured=False
            ),
        )

    def execute_model(self, scheduled: Any) -> None:
        runner = self.model_runner
        assert self.disabled
        assert runner.speculator.is_measured
        for name in scheduled.finished_req_ids:
            self.ids.pop(name, None)
        counts, drafts = scheduled.num_scheduled_tokens, scheduled.num_spec_tokens_to_schedule
        if not counts:
            return
        if len(self.steps) == self.fails_at:
            raise RuntimeError("no memory is left")
        for new in scheduled.scheduled_new_reqs:
            np.random.randint(9)  # as the sampler does for a seed
            assert len(new.prompt_token_ids) == new.num_computed_tokens + 1
            assert max(new.prompt_token_ids) < 500
            pages = min(len(each) for each in new.block_ids)
            assert all(0 < page < runner.kv_cache_config.num_blocks for page in new.block_ids[0])
            self.ids[new.req_id] = [pages, new.num_computed_tokens, 0, new.num_computed_tokens]
        cached = scheduled.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            # The device counts what was accepted, the host all that might be.
            assert computed >= self.ids[name][1]
        assert sum(counts.values()) == scheduled.total_num_scheduled_tokens
        assert len(self.ids) <= runner.max_num_reqs
        assert len(counts) * BLOCK <= runner.max_num_tokens
        assert sum(counts.values()) <= runner.max_num_tokens
        verified = scheduled.scheduled_spec_decode_tokens
        for name, rows in counts.items():
            held, at, drafted, _ = self.ids[name]
            assert rows == 1 + len(verified.get(name, ()))
            assert rows - 1 <= drafted, "there is no draft to be verified"
            assert at + rows + BLOCK <= min(held * PAGE, runner.max_model_len)
            self.ids[name][1:3] = at + rows, drafts
        (rows,) = set(counts.values())
        (context,) = {context for *_, context in self.ids.values()}
        n = len(counts)
        self.steps.append((n, rows, drafts, context))
        block, seen = BLOCK * n * bool(drafts), n * context
        self.now += self.cost(
            Work(n, n * rows, block, seen, seen * rows, seen * BLOCK * bool(drafts))
        )

    def sample_tokens(self, grammar: None) -> Any:
        from vllm.v1.outputs import AsyncModelRunnerOutput

        worker = self

        class Output(AsyncModelRunnerOutput):
            def get_output(self) -> Any:
                worker.running -= 1

            def get_kv_connector_output(self) -> None:
                """Of vLLM 0.33."""

        assert self.ids
        self.running += 1
        assert self.running <= 2, "the runner's buffers are for two steps"
        return Output()


@contextmanager
def clock_of(worker: FakeWorker, repeats: tuple[int, int] | None = None) -> Iterator[None]:
    """Measured is by the worker's clock, up to when time is up; ``repeats``: so many measurements
    of so many steps, in the place of a CPU's."""
    from vllm_dflash.drafting import measure_v2

    time = SimpleNamespace(monotonic=lambda: worker.now, perf_counter=lambda: worker.now)
    patch = mock.patch.object
    with patch(measure_v2, "time", time):
        if repeats is None:
            yield
        else:
            with patch(measure_v2, "_repeats", lambda device: repeats):
                yield


def profile_of_gpu(cost: Callable[[Work], float], noise: float, seed: int = 0) -> Profile:
    """What the warm-up measures on a GPU of such a ``cost``, with ``noise`` in the logarithm of
    each step's seconds: an engine of up to 256 requests with blocks of 16, up to 131,072 positions
    each and 640k together (an H200's beside an 8B target), and 8,192 rows a step."""
    from vllm_dflash.drafting.measure_v2 import _cells

    random = np.random.default_rng(seed)
    worker = FakeWorker(
        cost=lambda work: cost(work) * float(np.exp(noise * random.standard_normal())),
        max_num_seqs=256,
        max_num_tokens=8192,
        max_model_len=1 << 17,
        num_blocks=2 * 640 * 1024 // PAGE,
        k=BLOCK - 1,
    )
    with clock_of(worker, (3, 3)):
        return fit(_cells(worker))
