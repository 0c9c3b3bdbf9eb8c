"""vLLM's source with one edited body: what relies on it drops out or is refused, what only runs
around it goes on.

Each edit is made in a copy that stands before the installed vLLM on the path; links take the place
of all other files.

    pytest tests/engine/test_edited_vllm.py
"""

from pathlib import Path
from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, Job, engine_env, run_engines
from engine.other_vllm import EndedError, accepted, edited, prompts_of, renamed, run, status, tokens
from pairs import make_random_drafter
from targets import FAMILIES

pytestmark = pytest.mark.engine
QWEN3, LLAMA, SAMPLER, SCHEDULER = (
    "model_executor/models/qwen3.py",
    "model_executor/models/llama.py",
    "v1/sample/rejection_sampler.py",
    "v1/core/sched/scheduler.py",
)
ARCHITECTURES = {
    "qwen3": (QWEN3, "qwen2:Qwen2Model.forward"),
    "llama": (LLAMA, "llama:LlamaModel.forward"),
}
"""Of targets: the file, and what is left out where it was edited."""
NOT_LOUDER = "self.o_proj(attn_output)", "self.o_proj(attn_output * 0.9)"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edited_architecture_drops_out_alone(tmp_path: Path, architecture: str) -> None:
    file, left_out = ARCHITECTURES[architecture]
    said = status(edited(tmp_path, (file, *NOT_LOUDER)))
    assert said.returncode == 0
    assert "plug-in      on" in said.stdout
    assert f"left out: vllm.model_executor.models.{left_out}" in said.stdout
    assert said.stdout.count("left out: ") == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """By architecture reports of a ``plain`` and a ``drafted`` engine where both were edited, and
    the text of an ``unedited`` one."""
    folder, models = tmp_path_factory.mktemp("edited"), tmp_path_factory.mktemp("models")
    llama = FAMILIES["llama"].make(models / "llama", scale=0.25)
    pairs = {"qwen3": (TARGET, DRAFTER), "llama": (llama, make_random_drafter(models / "drafter"))}
    env = edited(folder, *((file, *NOT_LOUDER) for file, _ in ARCHITECTURES.values()))
    asked = {
        (name, kind): (target, drafter if kind == "drafted" else None)
        for name, (target, drafter) in pairs.items()
        for kind in ("plain", "drafted")
    }
    found: dict[tuple[str, str], Any] = dict(
        zip(asked, run(env, folder, *asked.values()), strict=True)
    )
    targets = [target for target, _ in pairs.values()]
    jobs = [Job(target, None, prompts_of(target), max_tokens=24) for target in targets]
    for name, batches in zip(pairs, run_engines(jobs), strict=True):
        found[name, "unedited"] = batches[0].tokens
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edited_target_runs_by_its_modules(
    written: dict[tuple[str, str], Any], architecture: str
) -> None:
    """Fast layers that repeat another source would write another text, without any error. The edit
    makes another model: what it writes shows whether it is this one that runs."""
    plain, drafted = written[architecture, "plain"], written[architecture, "drafted"]
    assert tokens(drafted) == tokens(plain)
    assert accepted(drafted) > 0
    assert "leaves a part out" in drafted["log"]
    assert tokens(plain) != written[architecture, "unedited"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            (
                "model_executor/models/qwen2.py",
                "return self.embed_tokens(input_ids)",
                "return self.embed_tokens(input_ids) * 1.5",
            ),
            "left out: vllm.model_executor.models.qwen2:Qwen2Model.forward",
        ),
        (
            (
                LLAMA,
                "return self.embed_tokens(input_ids)",
                "return self.embed_tokens(input_ids) * 1.5",
            ),
            "left out: vllm.model_executor.models.llama:LlamaModel.forward",
        ),
        (
            (
                "model_executor/layers/fusion/fused_act_quant.py",
                "    return act_fn(x)",
                "    return act_fn(1.5 * x)",
            ),
            "left out: vllm.model_executor.models.llama:LlamaModel.forward",
        ),
        (
            (
                "ir/ops/layernorm.py",
                "x = x * torch.rsqrt(variance + epsilon)",
                "x = 1.2 * x * torch.rsqrt(variance + epsilon)",
            ),
            "left out: vllm.model_executor.models.qwen2:Qwen2Model.forward",
        ),
        (
            (
                "model_executor/layers/attention/attention.py",
                "    del kv_cache_dummy_dep\n    layer_name",
                "    del kv_cache_dummy_dep\n    query = query * 1.5\n    layer_name",
            ),
            "left out: vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        ),
        (
            (
                "v1/sample/sampler.py",
                "return logits.div_(temp.unsqueeze(dim=1))",
                "return logits.div_(2 * temp.unsqueeze(dim=1))",
            ),
            "plug-in      off: the patches do not fit this vLLM",
        ),
        (
            (
                "v1/sample/ops/topk_topp_sampler.py",
                "logits_f32 = logits.to(dtype=torch.float32)",
                "logits_f32 = 2 * logits.to(dtype=torch.float32)",
            ),
            "plug-in      off: the patches do not fit this vLLM",
        ),
    ],
    ids=["embedding", "llama embedding", "activation", "norm", "attention", "temperature", "noise"],
)
def test_an_edited_function_that_a_repeated_body_calls_is_seen(
    tmp_path: Path, edit: tuple[str, str, str], words: str
) -> None:
    """What was repeated is more than the bodies that were fingerprinted at first: with the first
    two the target wrote another text, and status said nothing."""
    assert words in status(edited(tmp_path, edit)).stdout


def test_an_edited_rejection_sampler_is_refused_and_plain_serving_works(tmp_path: Path) -> None:
    old = "assert metadata.max_spec_len <= MAX_SPEC_LEN"
    env = edited(tmp_path, (SAMPLER, old, f"{old}\n        edited = True"))
    said = status(env)
    assert said.returncode == 1
    assert "plug-in      off: the patches do not fit this vLLM" in said.stdout
    assert "RejectionSampler, whose source has changed" in said.stdout
    words = r"(?s)supports vLLM .*RejectionSampler, whose source has changed"
    with pytest.raises(EndedError, match=words) as ended:
        run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    (plain,) = ended.value.reports
    assert len(tokens(plain)) == 3


def test_an_edited_constructor_of_the_scheduler_and_comments_change_nothing(tmp_path: Path) -> None:
    """Every part stays, metrics too, which stand around that constructor; and comments are no
    code."""
    before = status(engine_env()).stdout
    old = "self.vllm_config = vllm_config\n"
    env = edited(
        tmp_path,
        (SCHEDULER, old, f"{old}        self.was_edited = True\n"),
        *(
            (
                file,
                "output, _ = self.o_proj(attn_output)",
                "output, _ = self.o_proj(attn_output)  # as it was",
            )
            for file in (QWEN3, LLAMA)
        ),
        (
            SAMPLER,
            "class RejectionSampler(nn.Module):",
            "# as it was\nclass RejectionSampler(nn.Module):",
        ),
    )
    said = status(env)
    assert said.stdout == before
    assert said.returncode == 0
    (drafted,) = run(env, tmp_path, (TARGET, DRAFTER), adaptive=True)
    assert accepted(drafted) > 0
    assert "leaves a part out" not in drafted["log"]


RUNNER = "v1/worker/gpu_model_runner.py"
OFF = "plug-in      off: the patches do not fit this vLLM"


def test_drafts_that_are_copied_bring_no_confidences_and_that_is_said(tmp_path: Path) -> None:
    """They come with the very list of drafts: a copy lost them, and the controller went on without
    a word."""
    old = "return self._draft_token_ids, self.input_batch.req_ids"
    new = "return [list(d) for d in self._draft_token_ids], self.input_batch.req_ids"
    env = edited(tmp_path, (RUNNER, old, new))
    said = status(env)
    assert said.returncode == 0
    assert "_get_draft_token_ids_cpu" in said.stdout.partition("left out: ")[2]
    assert said.stdout.count("left out: ") == 1
    (drafted,) = run(env, tmp_path, (TARGET, DRAFTER), adaptive=True)
    assert accepted(drafted) > 0
    assert "_get_draft_token_ids_cpu, whose source has changed" in drafted["log"]


def test_a_record_behind_a_switch_names_it(tmp_path: Path) -> None:
    """A body that vLLM had mended kept all of this package off, and nothing said how to go on."""
    old = "    batch_size = x.shape[0]\n    assert cu_num_tokens"
    env = edited(tmp_path, (SAMPLER, old, f"    edited = True\n{old}"))
    said = status(env)
    assert OFF in said.stdout
    assert "VLLM_DFLASH_CPU_FIXES=0" in said.stdout
    without = status(env | {"VLLM_DFLASH_CPU_FIXES": "0"})
    assert without.returncode == 0
    assert "plug-in      on" in without.stdout


def test_a_proposer_that_is_imported_past_ours_is_refused_and_plain_serving_works(
    tmp_path: Path,
) -> None:
    """The name that we replace was looked up by nobody: start ended in an assertion of vLLM's."""
    old = "self.drafter = DFlashProposer(self.vllm_config"
    new = (
        "from vllm.v1.spec_decode.dflash import DFlashProposer as Native\n\n"
        "                self.drafter = Native(self.vllm_config"
    )
    env = edited(tmp_path, (RUNNER, old, new))
    words = r"(?s)supports vLLM .*does not look DFlashProposer up any more"
    with pytest.raises(EndedError, match=words) as ended:
        run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    (plain,) = ended.value.reports
    assert len(tokens(plain)) == 3


@pytest.mark.parametrize("old", ["Qwen3DecoderLayer", "scheduler_cls"])
def test_what_is_optional_does_not_end_the_rest(tmp_path: Path, old: str) -> None:
    """Its modules were imported with those that are needed, and a setting was read where there is
    none: both ended the engine."""
    env = renamed(tmp_path, old, f"{old}_renamed")
    plain, drafted = run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    assert tokens(drafted) == tokens(plain)
    assert accepted(drafted) > 0
    assert "leaves a part out" in drafted["log"]
