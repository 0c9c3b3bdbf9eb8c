"""A drafter that computes the same function must be served the same acceptance, however its weights
are written.

Scaling a layer's k_norm by a factor and its q_norm by the inverse leaves every attention score as
it is. vLLM's own
CPU path fails this: one ``rms_norm`` call for all layers applies layer 0's k_norm to each of them,
nothing errors,
and only acceptance falls.
"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.harness import DRAFTER, TARGET, Job, held_out_prompts, run_engines

pytestmark = pytest.mark.engine


def rescaled(drafter: Path, folder: Path) -> Path:
    """The drafter with layer i's k_norm times 3^i / 2 and its q_norm divided by the same."""
    shutil.copytree(drafter, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("k_norm.weight"):
            factor = 3.0 ** int(name.split(".")[1]) / 2
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
            twin = name.replace("k_norm", "q_norm")
            tensors[twin] = (tensors[twin].float() / factor).to(tensors[twin].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_served_tau_stays(tmp_path: Path) -> None:
    prompts, scaled = held_out_prompts(16), rescaled(DRAFTER, tmp_path / "scaled")
    jobs = {
        "as trained": Job(TARGET, DRAFTER, prompts, max_tokens=96),
        "rescaled": Job(TARGET, scaled, prompts, max_tokens=96),
    }
    tau = {
        (who, which): batches[0].tau
        for who, env in (("ours", {}), ("native", {"VLLM_DFLASH": "0"}))
        for which, batches in zip(jobs, run_engines(list(jobs.values()), env=env), strict=True)
    }
    print("tau: " + ", ".join(f"{who} {which} {value:.3f}" for (who, which), value in tau.items()))
    assert abs(tau["ours", "rescaled"] / tau["ours", "as trained"] - 1) < 0.01
    # Not a wish: the day this fails, vLLM has mended its path, and notes and README can say so.
    assert tau["native", "rescaled"] < 0.95 * tau["native", "as trained"]
