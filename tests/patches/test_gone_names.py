"""Names of vLLM's that our code reads or sets, gone from a copy of its source."""

import ast
from pathlib import Path

import pytest
from vllm_dflash.patches import ALL

import vllm_copies
from vllm_dflash.upstream import Sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("old", "needs", "record"),
    [
        ("disable_eagle_block_drop", "optional", "SpeculativeConfig.use_eagle_block_drop"),
        ("scheduler_cls", "optional", "Scheduler"),
        ("num_spec_tokens_to_schedule", "optional", "Scheduler"),
        ("CompilationMode", "optional", "CompilationMode"),
        ("Qwen3DecoderLayer", "optional", "Qwen2Model.forward"),
        ("initialize_layerwise_reload", "required", "Attention"),
        ("can_load", "required", "Attention"),
        ("resumable", "required", "Scheduler._handle_stopped_request"),
        ("discard_request_mask", "required", "GPUModelRunner.sample_tokens"),
        ("kv_cache_gid", "required", "DFlashProposer"),
        ("logprob_token_ids", "required", "InputProcessor._validate_params"),
    ],
)
def test_a_name_that_is_gone_is_said(tmp_path: Path, old: str, needs: str, record: str) -> None:
    """Such a name was read as a default or set for nobody: with the first, prefix-cache hits were
    half as long without a word; others ended an engine that had started."""
    vllm_copies.renamed(tmp_path, old, f"{old}_renamed")
    sources = Sources(tmp_path)
    found = {patch: patch.examine(sources)[1] for patch in ALL}
    misfits = {patch: problems for patch, problems in found.items() if problems}
    (said,) = [problems for patch, problems in misfits.items() if patch.qualname == record]
    assert old in " ".join(said)
    assert max(patch.needs for patch in misfits) == needs  # "required" is the greater word


def test_a_replacement_that_is_imported_past_is_said(tmp_path: Path) -> None:
    """The name that we replace was looked up by nobody: start ended in an assertion of vLLM's."""
    vllm_copies.edited(
        tmp_path,
        (
            "v1/worker/gpu_model_runner.py",
            "self.drafter = DFlashProposer(",
            "from vllm.v1.spec_decode.dflash import DFlashProposer\n\n"
            "                self.drafter = DFlashProposer(",
        ),
    )
    sources = Sources(tmp_path)
    problems = [problem for patch in ALL for problem in patch.examine(sources)[1]]
    assert len(problems) == 1
    assert "GPUModelRunner.__init__ does not look DFlashProposer up any more" in problems[0]


def test_what_the_model_imports_is_in_a_record() -> None:
    """``status`` said that all was well where a name that only the drafter's model imports was
    gone, and the engine's start ended in an ImportError."""
    known = {
        name for record in ALL for name in (*record.fingerprints, *record.signatures, *record.names)
    }
    classes = {name.rpartition(".")[0] for name in known if "." in name.partition(":")[2]}
    imported = {
        f"{node.module}:{alias.name}"
        for path in (ROOT / "vllm_dflash" / "models").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(imported) > 20
    assert imported - known - classes == set()
