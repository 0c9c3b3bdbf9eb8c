"""Several workers take the steps of one process with the same batch: the same loss curve, to
rounding."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from training_runs import answer_held_out, answered_prompts, held_out_file, make_target, settings
from vllm_dflash.training import drafter, learned, loop, target
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.settings import Settings

pytestmark = pytest.mark.slow

CHANGES = dict(optimizer="adamw", lr=3e-3, batch_size=8, steps=10, log_every=1, eval_every=100)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("workers")
    model = make_target(folder / "target")
    prompts = answered_prompts(model, folder / "prompts.jsonl", 20)
    held_out, ids = held_out_file(folder / "held-out.jsonl")

    def new(**changes) -> Settings:
        chosen = settings(
            model,
            prompts,
            tmp_path_factory.mktemp("run"),
            held_out_prompts=str(held_out),
            **CHANGES | changes,
        )
        answer_held_out(chosen, ids)
        run_stages(chosen, ("generate", "features"))
        return chosen

    return new


def curve(chosen: Settings) -> list[float]:
    lines = (learned.folder_of(chosen) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def weights(chosen: Settings) -> dict[str, torch.Tensor]:
    return load_file(learned.final_folder(chosen) / "model.safetensors")


def work(chosen: Settings, rank: int, count: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    found = target.find_target(chosen)
    loop.train(
        chosen, drafter.plan(chosen, found)[0], found, target.load_target(found, chosen, "cpu")
    )
    dist.destroy_process_group()


def together(chosen: Settings, count: int, meeting: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=work, args=(chosen, rank, count, str(meeting))) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0] * count


@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_two_workers_are_one_with_twice_the_batch(make, tmp_path: Path, weighting: str) -> None:
    """A mean of the workers' means would differ: answers are of different lengths, so their blocks
    are not equally many."""
    one, two, pieces = (
        make(weighting=weighting, **more) for more in ({}, {"workers": 2}, {"micro_batch": 2})
    )
    run_stages(one, ("train",))
    run_stages(pieces, ("train",))
    together(two, 2, tmp_path / "meeting")
    assert len(curve(one)) == 10
    assert curve(one)[-1] < 0.8 * curve(one)[0]
    assert curve(two) == pytest.approx(curve(one), rel=2e-4)
    assert curve(pieces) == pytest.approx(curve(one), rel=2e-4)
    assert learned.result(two)["tau"] == pytest.approx(learned.result(one)["tau"], rel=0.02)


@pytest.mark.parametrize(("optimizer", "rounding"), [("adamw", 1e-3), ("muon", 5e-3)])
def test_workers_that_share_the_weights(
    make, tmp_path: Path, optimizer: str, rounding: float
) -> None:
    """FSDP: the curve and the weights of one process, to rounding; Muon rounds to bfloat16 on the
    way."""
    one, two = (
        make(optimizer=optimizer, ema=0.9, **more)
        for more in ({}, {"workers": 2, "parallel": "fsdp"})
    )
    run_stages(one, ("train",))
    together(two, 2, tmp_path / "meeting")
    assert curve(two) == pytest.approx(curve(one), rel=2e-4)
    finished = weights(one)
    assert all(torch.allclose(w, finished[name], atol=rounding) for name, w in weights(two).items())
    if optimizer == "adamw":
        goes_on_sharded(one, two, finished, tmp_path / "again")


def goes_on_sharded(
    one: Settings, two: Settings, finished: dict[str, torch.Tensor], meeting: Path
) -> None:
    """From the last but one checkpoint of one process."""
    folder = learned.folder_of(one)
    for path in (folder / "result.json", folder / "checkpoints" / "step-00000010.json"):
        path.unlink()
    together(dataclasses.replace(one, train=two.train), 2, meeting)
    assert learned.result(one)["steps"] == 10
    assert all(torch.allclose(w, finished[name], atol=1e-3) for name, w in weights(one).items())


def test_two_workers_on_ray(make) -> None:
    pytest.importorskip("ray", reason="pip install 'vllm-dflash[ray]'")
    one, two = make(), make(workers=2)
    run_stages(one, ("train",))
    run_stages(two, ("train",))
    assert curve(two) == pytest.approx(curve(one), rel=2e-4)


def test_without_ray(make) -> None:
    if __import__("importlib.util").util.find_spec("ray"):
        pytest.skip("it is installed")
    with pytest.raises(
        TrainingError, match=r"pip install 'vllm-dflash\[ray\]', or set workers to 1"
    ):
        run_stages(make(workers=2), ("train",))
