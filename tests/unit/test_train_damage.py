"""Every file that ``train`` keeps, damaged in every way: the run ends as it would have, or says
which file and what to do.

A fault stands for its kind: of 124 such damages 45 once ended in a JSONDecodeError, TypeError or
KeyError.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from damage import DAMAGES, DENIALS, REMEDY, as_a_user, copy_of
from training_runs import (
    answer_held_out,
    answered_prompts,
    held_out_file,
    make_target,
    run_and_kill,
    settings,
)
from vllm_dflash.files import RunError
from vllm_dflash.reference.decoding import generate as decode
from vllm_dflash.training import generate
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.sequences import write_sequences
from vllm_dflash.training.settings import STAGES, Settings

pytestmark = pytest.mark.slow

STOPPED = (
    "generate/shard-00001.json",
    "generate/shard-00001.safetensors",
    "features/shard-00001.json",
    "features/shard-00001.safetensors",
    "train/inputs.json",
    "train/log.jsonl",
    "train/checkpoints/step-00000009.json",
    "train/checkpoints/step-00000012.json",
    "train/checkpoints/step-00000012.pt",
)
"""Of a run that is stopped in its last stage but two: what only training reads."""
UP_TO_TRAINING = ("generate", "features", "train")
FINISHED = (
    "settings.json",
    "generate/inputs.json",
    "generate/split.json",
    "generate/shard-00001.json",
    "generate/shard-00001.safetensors",
    "generate/held-out/shard-00000.json",
    "generate/held-out/shard-00000.safetensors",
    "features/inputs.json",
    "features/shard-00001.json",
    "features/shard-00001.safetensors",
    "train/result.json",
    "train/curves.svg",
    "train/drafter/config.json",
    "train/drafter/model.safetensors",
    "prove.json",
    "drafter/config.json",
    "drafter/model.safetensors",
    "drafter/README.md",
    "drafter/training.json",
)


class Run:
    """A run in a folder, and copies of it as it was when it stopped and when it was finished."""

    def __init__(self, folder: Path) -> None:
        target = make_target(folder / "target")
        prompts, (held_out, ids) = (
            answered_prompts(target, folder / "prompts.jsonl", 20),
            held_out_file(folder / "held-out.jsonl"),
        )
        self.settings: Settings = settings(
            target, prompts, folder / "run", held_out_prompts=str(held_out), skip_vllm=True
        )
        self.folder = Path(self.settings.run.out)
        answer_held_out(self.settings, ids)
        run_and_kill(self.settings, STAGES, self.folder / "train" / "result.json")
        self.stopped = copy_of(self.folder, folder / "stopped")
        run_stages(self.settings, STAGES)
        self.finished, self.weights = copy_of(self.folder, folder / "finished"), self._weights()

    def _weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "train" / "drafter" / "model.safetensors")

    def go_on(self, stages: tuple[str, ...]) -> str | None:
        """The refusal; None where the run ended with the weights of one that was not damaged."""
        try:
            with as_a_user():
                assert run_stages(self.settings, stages)
        except RunError as refusal:
            return str(refusal)
        mine = self._weights()
        assert all(torch.equal(mine[name], self.weights[name]) for name in self.weights)
        return None


@pytest.fixture(autouse=True)
def no_engines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are answered again are answered by the reference loop."""
    model = AutoModelForCausalLM.from_pretrained(run.settings.run.target, dtype=torch.float32)

    def answer(
        what: str, args: Any, jobs: list[dict[str, Any]], engines: int, shown: tuple[str, str]
    ) -> None:
        for job in jobs:
            asked = [
                (
                    [*ids, *decode(model, None, ids, job["sampling"]["max_tokens"], 0).tokens],
                    len(ids),
                )
                for ids in job["prompts"]
            ]
            write_sequences(Path(job["path"]), [*job["answered"], *asked])

    monkeypatch.setattr(generate, "run_engines", answer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize(
    ("state", "name"), [*(("stopped", f) for f in STOPPED), *(("finished", f) for f in FINISHED)]
)
def test_damaged(run: Run, state: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of all kinds of damage to one file, each on a fresh copy."""
    faults = []
    for damage, apply in DAMAGES.items():
        path = copy_of(getattr(run, state), run.folder) / name
        if not apply(path):
            continue
        capsys.readouterr()
        try:
            said = run.go_on(STAGES if state == "finished" else UP_TO_TRAINING)
        except Exception as error:
            faults.append(f"{damage}: {type(error).__name__}: {error}")
            continue
        printed = capsys.readouterr().out
        if said is not None and not (
            str(path.parent) in said and path.name in said and REMEDY.search(said)
        ):
            faults.append(f"{damage}: it neither names the file nor what to do: {said}")
        if (
            said is None
            and state == "stopped"
            and name.startswith("train/checkpoints/step-00000012")
            and path.name not in printed
        ):
            faults.append(f"{damage}: the checkpoint was passed over without a word")
    assert not faults, "\n".join([name, *faults])


FOLDERS = (".", "generate", "generate/held-out", "features", "train", "train/checkpoints")


@pytest.mark.parametrize("denial", DENIALS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_permission(run: Run, name: str, denial: str) -> None:
    """A stopped run goes on, or says which folder and what to do; it never begins anew what it
    cannot see.

    Checkpoints in a folder that could not be listed were once as good as none: training began again
    at its first step.
    """
    folder = copy_of(run.stopped, run.folder) / name
    folder.chmod(DENIALS[denial])
    try:
        said = run.go_on(UP_TO_TRAINING)
    finally:
        folder.chmod(0o755)
    needed = {"no writing": (".", "train"), "no listing": ("train/checkpoints",)}.get(
        denial, FOLDERS
    )
    if said is None:
        assert name not in needed
    else:
        assert str(folder) in said
        assert REMEDY.search(said)
