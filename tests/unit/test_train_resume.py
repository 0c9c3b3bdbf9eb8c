"""Killed in any stage, a run goes on and ends with the bits of one that was not; what is in its way
is refused by name."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_runs import (
    answer_held_out,
    answered_prompts,
    held_out_file,
    in_child,
    make_target,
    run_and_kill,
    settings,
    write_prompts,
)
from vllm_dflash.files import RunError
from vllm_dflash.lock import hold
from vllm_dflash.training import checkpoints, generate, learned, loop
from vllm_dflash.training.errors import SettingsError, TrainingError
from vllm_dflash.training.logs import Log, read
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.settings import Settings

pytestmark = pytest.mark.slow

HERE = ("generate", "features", "train")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, list[list[int]]]:
    """Target, answered prompts, and held-out ones."""
    folder = tmp_path_factory.mktemp("training")
    target = make_target(folder / "target")
    return (
        target,
        answered_prompts(target, folder / "prompts.jsonl", 20),
        *held_out_file(folder / "held-out.jsonl"),
    )


@pytest.fixture(scope="module")
def make(parts, tmp_path_factory: pytest.TempPathFactory):
    """A run's settings, in a new folder, its held-out prompts answered."""
    target, prompts, held_out, ids = parts

    def new(other: Path | None = None, **changes) -> Settings:
        chosen = settings(
            other or target,
            prompts,
            tmp_path_factory.mktemp("run"),
            held_out_prompts=str(held_out),
            **changes,
        )
        answer_held_out(chosen, ids)
        return chosen

    return new


@pytest.fixture(scope="module")
def undisturbed(make) -> Settings:
    chosen = make(ema=0.9)
    run_stages(chosen, HERE)
    return chosen


def weights(chosen: Settings) -> dict[str, torch.Tensor]:
    return load_file(learned.final_folder(chosen) / "model.safetensors")


def entries(chosen: Settings) -> list[dict]:
    """The log without its clock."""
    lines = (learned.folder_of(chosen) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_killed_at_every_kind_of_write(make, undisturbed: Settings) -> None:
    """Shards, their notes, checkpoints, the drafter's folder, the last note: the process dies as
    each would get its name, and the next goes on.

    Weights, averages and log equal those of the undisturbed run, bit for bit.
    """
    chosen = make(ema=0.9)
    run = Path(chosen.run.out)
    for moment in (
        "features/inputs.json",
        "features/shard-00001.safetensors",
        "features/shard-00002.json",
        "train/checkpoints/step-00000003.pt",
        "train/checkpoints/step-00000006.json",
        "train/checkpoints/step-00000009.pt",
        "train/log.jsonl",
        "train/curves.svg",
        "train/drafter",
        "train/result.json",
    ):
        run_and_kill(chosen, HERE, run / moment)
        assert learned.result(chosen) is None
    run_stages(chosen, HERE)
    assert entries(chosen) == entries(undisturbed)
    mine, theirs = weights(chosen), weights(undisturbed)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not [p for p in run.rglob("*.part") if not p.is_dir()]


def test_it_learns(undisturbed: Settings) -> None:
    found = [e for e in entries(undisturbed) if "loss" in e]
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert learned.result(undisturbed)["tau"] > 1.3
    assert learned.result(undisturbed)["skipped"] == 0


def test_a_finished_run_does_nothing(undisturbed: Settings) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(undisturbed.run.out).rglob("*.safetensors")}
    run_stages(undisturbed, HERE)
    assert {
        p: p.stat().st_mtime_ns for p in Path(undisturbed.run.out).rglob("*.safetensors")
    } == before


def test_features_on_the_fly_agree(make) -> None:
    """A shard from the cache, the others from the target in every step: the loss curve of all from
    the cache, to rounding.

    Trained by AdamW, which differs by 1e-7: Muon orthogonalizes in bfloat16 where the processor
    does, and makes a thousandth of it.
    """
    runs = [make(ema=0.9, optimizer="adamw", lr=2e-2, max_disk_gb=size) for size in (3e-4, 1.0)]
    for chosen in runs:
        run_stages(chosen, HERE)
    some, all_ = (
        list((Path(chosen.run.out) / "features").glob("*.safetensors")) for chosen in runs
    )
    assert 0 < len(some) < len(all_)
    mine, theirs = ([e["loss"] for e in entries(run) if "loss" in e] for run in runs)
    assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("dflash", None), ("dflare", 8)])
def test_a_processor_without_bfloat16_trains_for_a_target_in_it(
    make, monkeypatch: pytest.MonkeyPatch, kind: str, size: int | None
) -> None:
    """There ``auto`` is float32, and its products met the target's tables and features as they are:
    "expected m1 and m2 to have the same dtype". SmolLM2 is a target in bfloat16. What is learned is
    what a target with the same values in float32 teaches."""
    monkeypatch.setattr(loop, "computes_bfloat16", lambda device: False)
    flags = dict(kind=kind, draft_vocab_size=size, precision="auto", steps=3, log_every=1)
    narrow = make(dtype="bfloat16", **flags)
    run_stages(narrow, HERE)
    assert weights(narrow)["hidden_norm.weight"].dtype == torch.bfloat16
    wide = make(**flags)
    run_stages(wide, HERE)
    ours, theirs = ([e["loss"] for e in entries(run) if "loss" in e] for run in (narrow, wide))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_another_config_is_refused(make, undisturbed: Settings) -> None:
    """The stage, the setting and both values are named; what is there is not touched."""
    flags = {
        "target": undisturbed.run.target,
        "prompts": undisturbed.data.prompts,
        "out": undisturbed.run.out,
    }
    other = settings(
        Path(flags["target"]),
        Path(flags["prompts"][0]),
        Path(flags["out"]),
        held_out_prompts=undisturbed.data.held_out_prompts,
        lr=1.0,
    )
    before = learned.result(undisturbed)
    (learned.folder_of(undisturbed) / "result.json").rename(
        learned.folder_of(undisturbed) / "aside"
    )
    with pytest.raises(
        RunError, match=r"stage train with .*lr 0.02 \(now 1.0\).*choose another --out"
    ):
        run_stages(other, HERE)
    (learned.folder_of(undisturbed) / "aside").rename(
        learned.folder_of(undisturbed) / "result.json"
    )
    assert learned.result(undisturbed) == before


def test_other_responses_are_noticed(make, parts, tmp_path: Path) -> None:
    """Answers that were changed beside the same prompts were once ignored on resuming: the run went
    on with the old ones."""
    rows = [json.loads(line) for line in parts[1].read_text().splitlines()]
    path = write_prompts(tmp_path / "prompts.jsonl", rows)
    chosen = replace(make(), data=replace(make().data, prompts=(str(path),)))
    answer_held_out(chosen, parts[3])
    run_stages(chosen, HERE[:1])
    run_stages(chosen, HERE[:1])
    rows[3]["response_token_ids"][1] ^= 1
    write_prompts(path, rows)
    with pytest.raises(
        TrainingError,
        match=(
            r"the responses beside them are not those that .*split.json was written for: give the"
            r" same files"
        ),
    ):
        run_stages(chosen, HERE[:1])
    rows[3]["prompt_token_ids"][0] ^= 1
    write_prompts(path, rows)
    with pytest.raises(
        TrainingError, match=r"the prompts are not those that .*split.json was written for"
    ):
        run_stages(chosen, HERE[:1])


def test_a_part_of_the_answers_serves_a_run_of_its_own(
    make, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/train.md says: of a folder whose stage generate is half done the finished shards are
    taken over by another run, with --max-prompts and without an engine."""
    whole = make()
    run_stages(whole, HERE[:1])
    asked = [
        {"prompt_token_ids": json.loads(line)["prompt_token_ids"]}
        for line in parts[1].read_text().splitlines()
    ]
    prompts = write_prompts(tmp_path / "prompts.jsonl", asked)
    part = make(max_prompts=16)
    part = replace(part, data=replace(part.data, prompts=(str(prompts),)))
    shutil.rmtree(generate.folder_of(part))
    shutil.copytree(generate.folder_of(whole), generate.folder_of(part))
    for left in ("split.json", "shard-00002.json", "shard-00002.safetensors"):
        (generate.folder_of(part) / left).unlink()
    monkeypatch.setattr(generate, "answer", lambda *a, **k: pytest.fail("it asked the engine"))
    run_stages(part, HERE[:1])
    found, every = generate.sequences(part), generate.sequences(whole)
    assert (len(found), len(every)) == (16, 20)
    for i in range(16):
        assert found[i].tokens.tolist() == every[i].tokens.tolist()


def test_two_commands_in_one_folder(make) -> None:
    """The second one ended with FileNotFoundError on a ``.part`` of the first."""
    chosen = make()
    with (
        hold(Path(chosen.run.out), "vllm-dflash train"),
        pytest.raises(RunError, match=rf"in use by vllm-dflash train, process {os.getpid()}"),
    ):
        run_stages(chosen, HERE)


@pytest.mark.parametrize("kilobytes", [4, 16, 64, 200, 300, 400, 500, 900, 1500])
def test_a_disk_that_fills_up(make, kilobytes: int, tmp_path: Path) -> None:
    """A real one, of these sizes: wherever it is full, the message says so, what is there is kept,
    and on a larger disk the run goes on.

    At 64 KiB it was an INTERNAL ASSERT of torch's.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting is not allowed here")
    made = make()
    try:
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(made.run.out, disk / "run")
        chosen = replace(made, run=replace(made.run, out=str(disk / "run")))
        try:
            run_stages(chosen, HERE)
            said = ""
        except RunError as refusal:
            said = str(refusal)
        if said:
            assert "cannot be written (No space left on device): free some space" in said
            assert not [p for p in disk.rglob("*.part") if not p.is_dir()]
        else:
            assert kilobytes > 1000
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        shutil.copytree(made.run.out, disk / "run", dirs_exist_ok=True)
        run_stages(chosen, HERE)
        assert learned.result(chosen) is not None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_full_disk(make) -> None:
    """A limit on file sizes that the features still fit in and the checkpoint does not: said,
    nothing lost, and the run goes on later."""
    chosen = make()
    run_stages(chosen, HERE[:2])

    def work() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        return str(run_stages(chosen, HERE))

    said = in_child(work)
    assert "cannot be written (File too large): free some space" in said
    assert "the same command goes on from there" in said
    assert not list(Path(chosen.run.out).rglob("*.part"))
    run_stages(chosen, HERE)
    assert learned.result(chosen) is not None


def test_a_disk_that_is_full_for_the_log(tmp_path: Path) -> None:
    """It is appended to and so not written beside its place: said as well, and the cut line is no
    entry for the next run."""

    def work() -> str:
        log = Log(tmp_path, 0, 9)
        log.board = None
        log.write(1, loss=1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 9,) * 2)
        log.write(2, loss=1.0)
        return "written"

    said = in_child(work)
    assert "log.jsonl cannot be written (File too large): free some space" in said
    assert [entry["step"] for entry in read(tmp_path / "log.jsonl")] == [1]


def test_a_spoilt_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"value": torch.tensor(step)})
    assert [p.name for p in sorted(tmp_path.glob("*.pt"))] == [
        "step-00000002.pt",
        "step-00000003.pt",
    ]
    (tmp_path / "step-00000003.pt").write_bytes(b"no checkpoint")
    found = checkpoints.load_newest(tmp_path, "cpu")
    assert found is not None
    assert (found[0], int(found[1]["value"])) == (2, 2)
    assert "step-00000003.pt is not as it was written" in capsys.readouterr().out
    (tmp_path / "step-00000002.pt").write_bytes(b"nor this")
    with pytest.raises(TrainingError, match="remove the folder to train anew"):
        checkpoints.load_newest(tmp_path, "cpu")


def test_a_loss_that_is_not_finite(make, parts, tmp_path: Path) -> None:
    """One token's embedding is no number: steps that meet it are skipped and counted, and the
    weights stay finite."""
    target = tmp_path / "target"
    target.mkdir()
    for path in parts[0].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    rows = [json.loads(line)["prompt_token_ids"] for line in parts[1].read_text().splitlines()]
    rare = next(t for t in rows[3] if sum(t in row for row in rows) == 1)
    tensors["model.embed_tokens.weight"][rare] = float("nan")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    chosen = make(target, cache=False)
    run_stages(chosen, HERE)
    assert 0 < learned.result(chosen)["skipped"] < 12
    assert all(bool(t.isfinite().all()) for t in weights(chosen).values())


def test_a_loss_that_stays_not_finite(make) -> None:
    with pytest.raises(TrainingError, match=r"not finite for 3 steps in a row.*lower --lr"):
        run_stages(make(lr=1e18, max_bad_steps=3), HERE)


def test_other_weights_in_the_targets_folder_are_not_gone_on_with(make, parts, tmp_path) -> None:
    """Fine-tuned meanwhile, say: a part of the features would be the old target's, and a part the
    new one's."""
    folder = tmp_path / "target"
    shutil.copytree(parts[0], folder)
    chosen = make(folder)
    run_and_kill(chosen, HERE, Path(chosen.run.out) / "features/shard-00001.safetensors")
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor + 1e-3 for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"generate with target_files '\w+' \(now '\w+'\)"):
        run_stages(chosen, HERE)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run_stages(chosen, HERE)


@pytest.mark.parametrize(
    ("stages", "table", "changed", "named"),
    [
        (HERE, "train", {"lr": 1e-3}, r"lr 0\.02 \(now 0\.001\)"),
        (HERE, "train", {"steps": 50}, r"steps 12 \(now 50\)"),
        (("export",), "train", {"weighting": "dpace"}, r"weighting 'decay' \(now 'dpace'\)"),
        (("prove", "export"), "drafter", {"layers": 1}, "drafter {"),
    ],
)
def test_a_finished_run_takes_no_other_settings(
    undisturbed: Settings, stages: tuple[str, ...], table: str, changed: dict, named: str
) -> None:
    """It did nothing, ended with 0, and wrote a model card with settings that no weight has
    seen."""
    note = Path(undisturbed.run.out) / "settings.json"
    before = note.read_text()
    other = replace(undisturbed, **{table: replace(getattr(undisturbed, table), **changed)})
    with pytest.raises(RunError, match=f"begun by the stage train with .*{named}"):
        run_stages(other, stages)
    assert note.read_text() == before


def test_a_format_that_cannot_hold_the_drafter_is_refused_before_anything_runs(make) -> None:
    """It was, in the last stage, after all others."""
    chosen = make()
    other = replace(chosen, export=replace(chosen.export, format="AngelSlim"))
    with pytest.raises(SettingsError, match="format: AngelSlim holds no dflash drafter: write it"):
        run_stages(other, HERE)
    assert not (learned.folder_of(other)).exists()
