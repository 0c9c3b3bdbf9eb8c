"""A worker's side of a swap, with a model that only keeps what it is given: what is refused changes
nothing, and nothing raises."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pairs import make_random_drafter, random_drafter_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.models.swapping import Swapping
from vllm_dflash.serving_drafter import Proof, ServingDrafter, id_of
from vllm_dflash.weights.identity import digest_of, id_of_folder


class Model:
    """In the place of the served drafter and of its loading."""

    def __init__(self, folder: Path) -> None:
        self.drafter_config = DrafterConfig.from_pretrained(folder)
        self.dtype = torch.float32
        self.serving = ServingDrafter(str(folder))
        self.serving.put(str(folder), id_of_folder(folder), Proof())
        self.weights = load_file(folder / "model.safetensors")
        self.failing: list[str] = []

    def put(self, tensors: dict[str, torch.Tensor], weights: str) -> None:
        for name, tensor in tensors.items():
            if self.failing and name == self.failing[0]:
                self.failing.pop()
                raise MemoryError("no memory")
            self.weights[name] = tensor
        self.serving.put("pushed", weights, Proof())

    def judge(self, tensors: dict[str, torch.Tensor]) -> str:
        if any(not tensor.isfinite().all() for tensor in tensors.values()):
            raise DrafterConfigError("the weights hold NaN")
        return id_of({name: digest_of(tensor) for name, tensor in tensors.items()})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return (
        make_random_drafter(tmp_path / "old", seed=1),
        make_random_drafter(tmp_path / "new", seed=2),
    )


@pytest.fixture
def model(folders: tuple[Path, Path]) -> Model:
    return Model(folders[0])


def stage(swapping: Swapping, folder: Path, target: str | None = None) -> dict[str, Any]:
    """What comes of it, once it is read."""
    found = swapping.stage("t", str(folder), target)
    while "pending" in found:
        time.sleep(0.01)
        found = swapping.staged("t")
    return found


def holds(model: Model, folder: Path) -> bool:
    theirs = load_file(folder / "model.safetensors")
    return all(torch.equal(model.weights[name], theirs[name]) for name in theirs)


def test_a_swap(model: Model, folders: tuple[Path, Path]) -> None:
    old, new = folders
    (new / "refresh.json").write_text(
        json.dumps({"tau": 3.5, "target_files": None, "weights": id_of_folder(new)})
    )
    swapping, weights = Swapping(model, model), id_of_folder(new)
    assert stage(swapping, new) == {"id": weights}
    assert holds(model, old), "nothing is touched until all ranks have looked"
    found = swapping.commit("t", weights)
    assert holds(model, new)
    assert (found["id"], found["drafter"], found["proved_tau"]) == (weights, str(new), 3.5)
    assert (found["swaps"], found["refusals"]) == (1, 0)
    assert swapping.which() == found
    assert swapping.count_refusal()["refusals"] == 1, "one that the endpoint refused"
    again = swapping.commit("t", weights)
    assert "not staged any more" in again["refused"]


def test_what_was_staged_is_what_is_put_in_force(model: Model, folders: tuple[Path, Path]) -> None:
    """Its folder may be another's by then."""
    old, new = folders
    swapping, theirs = Swapping(model, model), load_file(new / "model.safetensors")
    weights = stage(swapping, new)["id"]
    (new / "model.safetensors").write_bytes((old / "model.safetensors").read_bytes())
    assert swapping.commit("t", weights)["id"] == weights
    assert torch.equal(model.weights["norm.weight"], theirs["norm.weight"])
    assert "refused" in Swapping(model, model).commit("t", weights), (
        "another worker has staged none"
    )


def spoil_values(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def spoil_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][1:]
    save_file(tensors, folder / "model.safetensors")


def another_config(folder: Path) -> None:
    make_random_drafter(folder, config=random_drafter_config(num_hidden_layers=2))


def other_positions(folder: Path) -> None:
    make_random_drafter(folder, config=random_drafter_config(rope_theta=10000.0))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def for_another_target(folder: Path) -> None:
    (folder / "refresh.json").write_text(json.dumps({"tau": 3.5, "target_files": "f" * 16}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_values, "NaN"),
        (spoil_shape, "norm.weight"),
        (another_config, r"num_hidden_layers 2 \(the running one has 3\)"),
        (other_positions, r"rope_theta 10000\.0 \(the running one has 20000\.0\)"),
        (no_weights, "safetensors"),
        (cut_short, "model.safetensors"),
        (no_config, "config.json"),
        (for_another_target, "refreshed for another target"),
    ],
)
def test_a_bad_one_is_refused(
    model: Model, folders: tuple[Path, Path], spoil: Any, said: str
) -> None:
    old, new = folders
    spoil(new)
    swapping, before = Swapping(model, model), model.serving.as_dict()
    found = stage(swapping, new, "0" * 16)
    assert set(found) == {"refused"}
    assert re.search(said, found["refused"]), found["refused"]
    assert holds(model, old)
    assert model.serving.as_dict() == before | {"refusals": 1}
    assert "refused" in swapping.commit("t", "x"), "and nothing is left staged"


def test_another_swaps_ticket(model: Model, folders: tuple[Path, Path]) -> None:
    """Another API server's, at the same time: neither commits nor drops what is not its own."""
    swapping = Swapping(model, model)
    weights = stage(swapping, folders[1])["id"]
    assert "refused" in swapping.staged("other")
    assert "refused" in swapping.commit("other", weights)
    swapping.drop("other")
    assert swapping.commit("t", weights)["id"] == weights


def test_dropped(model: Model, folders: tuple[Path, Path]) -> None:
    """Another rank has refused."""
    swapping = Swapping(model, model)
    weights = stage(swapping, folders[1])["id"]
    assert swapping.drop("t")["id"] == id_of_folder(folders[0])
    assert "refused" in swapping.commit("t", weights)
    assert holds(model, folders[0])


def test_a_copy_that_breaks_off_is_mended(model: Model, folders: tuple[Path, Path]) -> None:
    """Half of the new weights were in: the old folder's are put back, and that is said."""
    old, new = folders
    swapping = Swapping(model, model)
    weights = stage(swapping, new)["id"]
    model.failing = ["norm.weight"]
    assert swapping.commit("t", weights) == {"refused": "MemoryError: no memory"}
    assert holds(model, old)
    assert (model.serving.id, model.serving.name) == (id_of_folder(old), str(old))


def test_a_mixture_is_never_called_by_a_name(
    model: Model, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The old folder is gone, too."""
    old, new = folders
    swapping = Swapping(model, model)
    weights = stage(swapping, new)["id"]
    model.failing = ["norm.weight"]
    (old / "model.safetensors").unlink()
    assert "refused" in swapping.commit("t", weights)
    assert model.serving.id == "mixed"
    assert "changes no output" in caplog.text
    assert stage(swapping, new)["id"] == weights, "and a sound one can be swapped in"
    assert swapping.commit("t", weights)["id"] == weights
