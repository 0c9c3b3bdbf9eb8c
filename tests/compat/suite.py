"""What has to hold on another vLLM, in minutes: the same claims as in tests/engine, with fewer
jobs. Not one of `make test`'s files.

make compat-test    on the newest supported vLLM's Python, over the installed kernels
pytest tests/compat/suite.py                  on the installed vLLM
.compat/overlay-0.33.0/bin/python -m pytest tests/engine/test_features.py    any other test
"""

import importlib.util
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from engine import v2_jobs
from engine.harness import DRAFTER, TARGET, Batch, Job, held_out_prompts, run_engines
from engine.oracle import compare_drafts
from engine.v2_runs import Runs
from pairs import make_random_drafter, make_random_target, random_prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]
K = 7


def test_what_runs_is_this_environments_vllm() -> None:
    """An overlay that is not seen would pass everything else on the installed vLLM."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    print(f"\nvLLM {version('vllm')}")
    assert Path(found.origin).is_relative_to(sys.prefix)
    release = {
        path.name.removeprefix("vllm-").removesuffix(".dist-info")
        for path in Path(sys.prefix).glob("lib/*/site-packages/vllm-*.dist-info")
    }
    assert release == {version("vllm")}


class TestV1:
    @pytest.fixture(scope="class")
    def runs(self, random_target: Path, random_drafter: Path) -> list[list[Batch]]:
        """Plain and with the drafter: the embedded pair, greedy, 64 prompts x 128 tokens; then
        random weights up to ``max_model_len``."""
        prompts = held_out_prompts(64)
        crowded = [prompt[:20] for prompt in random_prompts(6, 512)] + [list(range(2, 52))]
        paged = {"max_num_batched_tokens": 48, "enable_prefix_caching": True}
        shared = random_prompts(1, 512)[0][:2] * 70
        return run_engines(
            [
                Job(TARGET, None, prompts),
                Job(TARGET, DRAFTER, prompts, record=True),
                Job(TARGET, DRAFTER, prompts[:16], max_tokens=64, adaptive=True),
                Job(random_target, None, crowded, max_tokens=40, max_model_len=64),
                Job(
                    random_target,
                    random_drafter,
                    crowded,
                    max_tokens=40,
                    max_model_len=64,
                    record=True,
                ),
                Job(
                    random_target,
                    random_drafter,
                    [[*shared, i] for i in range(2, 5)],
                    max_tokens=12,
                    batch_sizes=(1, 3),
                    record=True,
                    engine_args=paged,
                ),
                Job(TARGET, DRAFTER, prompts[:8], max_tokens=64, batch_sizes=(1, 8)),
            ]
        )

    def test_lossless(self, runs: list[list[Batch]]) -> None:
        plain, ours = runs[0][0].tokens, runs[1][0].tokens
        assert [len(tokens) for tokens in plain] == [128] * 64
        assert ours == plain
        assert runs[2][0].tokens == [tokens[:64] for tokens in plain[:16]]

    def test_drafts_are_the_references(self, runs: list[list[Batch]]) -> None:
        agreement = compare_drafts(runs[1][0], TARGET, DRAFTER, torch.float32, K)
        assert agreement.drafts >= 1000
        assert agreement.differences == []

    def test_blocks_end_at_max_model_len(
        self, runs: list[list[Batch]], random_target: Path, random_drafter: Path
    ) -> None:
        assert runs[4][0].tokens == runs[3][0].tokens
        agreement = compare_drafts(
            runs[4][0], random_target, random_drafter, torch.float32, K, max_model_len=64
        )
        assert agreement.drafts >= 100
        assert agreement.differences == []

    def test_prompts_in_chunks_and_from_the_prefix_cache(
        self, runs: list[list[Batch]], random_target: Path, random_drafter: Path
    ) -> None:
        assert runs[5][1].report["counters"]["prefix_cache_hits"] >= 3 * 128
        for batch in runs[5]:
            agreement = compare_drafts(batch, random_target, random_drafter, torch.float32, K)
            assert agreement.drafts >= 20
            assert agreement.differences == []

    def test_tau_is_the_reference_loops(self, runs: list[list[Batch]]) -> None:
        from transformers import AutoModelForCausalLM

        from vllm_dflash.reference.checkpoint import load_drafter
        from vllm_dflash.reference.decoding import generate

        target, drafter = (
            AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32),
            load_drafter(DRAFTER, torch.float32),
        )
        steps = [
            step
            for prompt in held_out_prompts(8)
            for step in generate(target, drafter, prompt, 64, K).steps
        ]
        reference = 1 + sum(step.accepted for step in steps) / len(steps)
        served = [batch.tau for batch in runs[6]]
        print(
            f"\ntau: reference loop {reference:.3f}, served {served[0]:.3f} at batch 1 and"
            f" {served[1]:.3f} at batch 8"
        )
        assert all(abs(tau / reference - 1) < 0.02 for tau in served)


class TestV2:
    PLAIN, SCRIPTED, TRAINED, ADAPTIVE = range(4)

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory: pytest.TempPathFactory) -> Runs:
        """Through Triton's interpreter. Random weights, of which every second request's drafts are
        scripted so that all lengths are accepted; then the embedded pair, whole drafts and adaptive
        ones."""
        folder = tmp_path_factory.mktemp("v2")
        target, drafter = (
            str(make_random_target(folder / "target")),
            str(make_random_drafter(folder / "drafter")),
        )
        prompts = [
            prompt[:length]
            for prompt, length in zip(
                random_prompts(8, 512) * 2, [3, 20, 9, 30, 13, 14, 7, 25], strict=False
            )
        ]
        prompts[1:3] = [list(range(2, 110)), list(range(40, 140))]
        limits = dict(max_model_len=128, max_num_batched_tokens=192, max_num_seqs=16)
        plain = v2_jobs.Job(target=target, prompts=prompts, max_tokens=24, **limits)
        trained = v2_jobs.Job(
            target=str(TARGET),
            drafter=str(DRAFTER),
            prompts=held_out_prompts(8),
            max_tokens=40,
            **limits,
        )
        jobs = [
            plain,
            replace(plain, drafter=drafter, script_from=self.PLAIN),
            trained,
            replace(trained, max_tokens=24, adaptive=True),
        ]
        return Runs(jobs, v2_jobs.run_engines(jobs))

    def test_it_runs_our_classes(self, runs: Runs) -> None:
        for result in runs.results[self.SCRIPTED :]:
            assert result.speculator == "vllm_dflash.drafting.v2:DFlashSpeculator"
            assert result.draft_model == "vllm_dflash.models.drafter:DrafterForCausalLM"

    @pytest.mark.parametrize(
        ("run", "least"),
        [(SCRIPTED, 60), (TRAINED, 60), (ADAPTIVE, 16)],
        ids=["random", "trained", "adaptive"],
    )
    def test_drafts_are_the_references(self, runs: Runs, run: int, least: int) -> None:
        assert len(runs.compare(run)) >= least
        assert runs.differences(run) == []

    def test_lossless(self, runs: Runs) -> None:
        assert runs.results[self.SCRIPTED].outputs == runs.results[self.PLAIN].outputs
        whole = runs.results[self.TRAINED].outputs
        assert runs.results[self.ADAPTIVE].outputs == [output[:24] for output in whole]
