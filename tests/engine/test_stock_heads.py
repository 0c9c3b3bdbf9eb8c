"""vLLM's own drafters with a head, as it serves them without this package, draft what the plain
PyTorch reference drafts from the same checkpoint: an oracle that nobody here wrote.

    pytest tests/engine/test_stock_heads.py
"""

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.v2_jobs import Job, run_engines
from engine.v2_runs import Runs
from variants import VARIANTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NAMES = (
    "dflash2 convolution",
    "dflash2 speculators",
    "dspark",
    "dspark without confidence",
    "lilicorr",
    "lilicorr convolution",
)
SPECULATORS = {
    "dflash2": "DFlash2Speculator",
    "dspark": "DSparkSpeculator",
    "lilicorr": "LiLiCorrSpeculator",
}
METHODS = {"dflash2": "dflash", "dspark": "dspark", "lilicorr": "dflash"}


@pytest.fixture(scope="module")
def runs(random_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, random = tmp_path_factory.mktemp("stock"), Random(1)
    drafters = [VARIANTS[name].make(folder / name.replace(" ", "-")) for name in NAMES]
    for drafter in drafters:
        _with_one_k_norm(drafter)
    prompts = [[random.randrange(2, 500) for _ in range(n)] for n in (3, 40, 71, 13)]
    jobs = [
        Job(
            str(random_target),
            prompts,
            20,
            drafter=str(drafter),
            num_speculative_tokens=VARIANTS[name].tokens,
            max_model_len=128,
            speculative_config={"method": METHODS[VARIANTS[name].changes["kind"]]},
        )
        for name, drafter in zip(NAMES, drafters, strict=True)
    ]
    return Runs(jobs, run_engines(jobs, env={"VLLM_DFLASH": "0"}))


def _with_one_k_norm(drafter: Path) -> None:
    """On a CPU vLLM's own norms the context's keys of all layers by the first one's weight."""
    path = drafter / "model.safetensors"
    tensors = load_file(path)
    first = next(
        t for name, t in tensors.items() if name.endswith("layers.0.self_attn.k_norm.weight")
    )
    tensors |= {n: first.clone() for n in tensors if n.endswith("k_norm.weight")}
    assert not torch.equal(first, torch.ones_like(first))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
def test_vllms_own_drafts_are_the_references(runs: Runs, name: str) -> None:
    run = NAMES.index(name)
    assert runs.results[run].speculator.startswith("vllm.v1.worker.gpu.spec_decode.")
    assert runs.results[run].speculator.endswith(SPECULATORS[VARIANTS[name].changes["kind"]])
    drafts = runs.compare(run)
    print(f"\n{name}: {sum(map(len, drafts))} tokens that vLLM's own drafted")
    assert len(drafts) >= 60
    assert runs.differences(run) == []
