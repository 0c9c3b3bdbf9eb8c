"""A vLLM that runs other implementations than the ones that are repeated here: no recorded body was
edited, another is chosen.

    pytest tests/engine/test_other_choices.py
"""

from pathlib import Path
from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, Job, run_engines
from engine.other_vllm import accepted, edited, job, prompts_of, run, run_jobs, status, tokens

pytestmark = pytest.mark.engine


def test_a_norm_with_a_method_of_its_own_runs(tmp_path: Path) -> None:
    """No body was edited: a method that vLLM's dispatch prefers was added. The fast layers, which
    knew the old one, wrote the old text."""
    own = (
        "    def forward_cpu(self, x, residual=None):\n"
        "        out = self.forward_native(x, residual)\n"
        "        return (out[0] * 0.9, out[1]) if isinstance(out, tuple) else out * 0.9\n\n"
    )
    old = "    def forward_native(\n"
    env = edited(tmp_path, ("model_executor/layers/layernorm.py", old, own + old))
    plain, drafted = run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    assert tokens(drafted) == tokens(plain)
    assert "a norm runs RMSNorm.forward_cpu" in drafted["log"]
    assert (
        tokens(plain)
        != run_engines([Job(TARGET, None, prompts_of(TARGET), max_tokens=24)])[0][0].tokens
    )


LOUDER_NORM = """
    @classmethod
    def get_default_ir_op_priority(cls, vllm_config):
        from vllm import ir
        from vllm.config.kernel import IrOpPriorityConfig

        native = ir.ops.rms_norm.impls["native"].impl_fn

        def louder(
            x: torch.Tensor,
            weight: torch.Tensor | None,
            epsilon: float,
            variance_size: int | None = None,
        ) -> torch.Tensor:
            return native(x, weight, epsilon, variance_size) * 1.1

        if "louder" not in ir.ops.rms_norm.impls:
            ir.ops.rms_norm.register_impl("louder")(louder)
        return IrOpPriorityConfig.with_default(["native"], rms_norm=["louder"])

"""
CPU_PLATFORM = "class CpuPlatform(Platform):\n"
CHOICES = (
    ("platforms/cpu.py", CPU_PLATFORM, CPU_PLATFORM + LOUDER_NORM),
    (
        "v1/sample/ops/topk_topp_sampler.py",
        "self.forward = self.forward_cpu",
        "self.forward = self.forward_native",
    ),
    (
        "model_executor/layers/logits_processor.py",
        "            if self.scale != 1.0:\n                logits *= self.scale\n",
        "            logits[..., ::2] -= 100.0\n"
        "            if self.scale != 1.0:\n                logits *= self.scale\n",
    ),
)
"""Another norm by the operator's priority, another sampler, and no token of an even number."""
SEEDED = {"temperature": 1.0, "seed": 7, "top_p": 0.95}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Reports by ``plain`` and ``drafted``, greedy and seeded, of a vLLM with ``CHOICES``."""
    folder = tmp_path_factory.mktemp("chosen")
    env = edited(folder, *CHOICES)
    asked = {
        f"{name} {kind}": job(TARGET, drafter, sampling=sampling)
        for kind, sampling in (("greedy", {}), ("seeded", SEEDED))
        for name, drafter in (("plain", None), ("drafted", DRAFTER))
    }
    found = dict(zip(asked, run_jobs(env, folder, list(asked.values())), strict=True))
    return found | {"status": {"text": status(env).stdout}}


def test_an_operator_that_is_dispatched_elsewhere_keeps_the_modules(
    chosen: dict[str, dict[str, Any]],
) -> None:
    """The norm that was repeated had the recorded body, but vLLM ran another one: the fast layers
    wrote another text, and status said nothing."""
    plain, drafted = chosen["plain greedy"], chosen["drafted greedy"]
    assert tokens(drafted) == tokens(plain)
    assert "vLLM's IR op rms_norm runs louder, not native" in drafted["log"]


def test_a_seed_gives_what_it_gives_by_the_sampler_that_vllm_chose(
    chosen: dict[str, dict[str, Any]],
) -> None:
    """As on POWERPC and RISC-V, where vLLM does not sample by its CPU kernel: with drafts a seed
    gave another text than without."""
    assert tokens(chosen["drafted seeded"]) == tokens(chosen["plain seeded"])
    assert tokens(chosen["plain seeded"]) != tokens(chosen["plain greedy"])
    assert accepted(chosen["drafted seeded"]) > 0


def test_drafts_are_ranked_by_what_vllm_makes_of_logits(chosen: dict[str, dict[str, Any]]) -> None:
    """The drafter's fast logits left out what was added: drafts were tokens that the target never
    writes, and acceptance fell without a word."""
    assert "left out: vllm.model_executor.layers.logits_processor" in chosen["status"]["text"]
    assert chosen["status"]["text"].count("left out: ") == 1
    drafts = [d["draft"] for d in chosen["drafted greedy"]["batches"][0]["drafts"]]
    assert len(drafts) > 5
    assert all(token % 2 for draft in drafts for token in draft)
