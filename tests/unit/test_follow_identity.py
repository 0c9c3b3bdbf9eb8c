"""A drafter's id: of the weights, whatever files, names and formats they come in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pairs import make_random_drafter, random_drafter_config
from vllm_dflash.serving_drafter import Proof, ServingDrafter, id_of, proof_of
from vllm_dflash.tools.convert import convert
from vllm_dflash.weights.identity import digest_of, id_of_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return make_random_drafter(tmp_path / "drafter", mask_embedding=True)


def test_the_same_weights_have_one_id(drafter: Path, tmp_path: Path) -> None:
    """In another folder, in several files, in another format."""
    first = id_of_folder(drafter)
    assert len(first) == 12
    tensors, split = load_file(drafter / "model.safetensors"), tmp_path / "split"
    split.mkdir()
    names = sorted(tensors)
    parts = {"model-00001-of-00002": names[:9], "model-00002-of-00002": names[9:]}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, split / f"{part}.safetensors")
    index = {name: f"{part}.safetensors" for part, own in parts.items() for name in own}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("config.json", "mask_embedding.pt"):
        (split / name).write_bytes((drafter / name).read_bytes())
    assert id_of_folder(split) == first
    plain = make_random_drafter(tmp_path / "plain")
    convert(plain, tmp_path / "other", "speculators", verifier="target")
    assert id_of_folder(tmp_path / "other") == id_of_folder(plain)


def test_any_change_is_another_id(drafter: Path) -> None:
    first, path = id_of_folder(drafter), drafter / "model.safetensors"
    tensors = load_file(path)
    seen = {first}
    for name in ("norm.weight", "layers.1.mlp.up_proj.weight"):
        changed = dict(tensors)
        changed[name] = tensors[name].clone()
        changed[name].view(-1)[-1] += 1e-6
        save_file(changed, path)
        seen.add(id_of_folder(drafter))
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    seen.add(id_of_folder(drafter))
    save_file(tensors, path)
    assert id_of_folder(drafter) == first
    state = torch.load(drafter / "mask_embedding.pt")
    torch.save(state | {"embedding": state["embedding"] + 1}, drafter / "mask_embedding.pt")
    seen.add(id_of_folder(drafter))
    assert len(seen) == 5


def test_a_mixture_of_two_has_neithers_id(tmp_path: Path) -> None:
    one, two = (
        make_random_drafter(tmp_path / str(seed), seed=seed, config=random_drafter_config())
        for seed in (1, 2)
    )
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    half = {name: (a if i % 2 else b)[name] for i, name in enumerate(sorted(a))}
    save_file(half, one / "model.safetensors")
    mixed = id_of_folder(one)
    assert mixed not in (id_of_folder(two), id_of({n: digest_of(t) for n, t in a.items()}))


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(1.5), torch.zeros(0, 3), torch.arange(6), torch.randn(4, 6).t(), torch.ones(2)],
)
def test_tensors_of_every_shape(tensor: torch.Tensor) -> None:
    """Scalars, empty ones, views: the digest is of the values in their order."""
    assert digest_of(tensor) == digest_of(tensor.clone(memory_format=torch.contiguous_format))
    assert digest_of(tensor) != digest_of(tensor.reshape(1, *tensor.shape))


def test_what_a_folder_says_of_itself(tmp_path: Path) -> None:
    ours, others = "a" * 12, "b" * 12

    def found() -> Proof:
        return proof_of(tmp_path, ours)

    assert proof_of(None, ours) == found() == Proof()
    rows = [{"by": "reference loop", "tau": 3.1}, {"by": "vLLM", "tau": 3.2}]
    (tmp_path / "training.json").write_text(json.dumps({"proof": {"rows": rows}, "weights": ours}))
    assert found() == Proof(3.2)
    of_others = {"proof": {"rows": rows}, "weights": others}
    (tmp_path / "training.json").write_text(json.dumps(of_others))
    assert found() == Proof(None, None, f"training.json is of the weights {others}")
    (tmp_path / "training.json").write_text(json.dumps({"proof": {"rows": rows}}))
    said = "training.json does not say of which weights it is"
    assert found() == Proof(None, None, said)
    assert f"(d, no proved tau: {said})" in str(ServingDrafter("d", ours, proof=found()))
    note = {"tau": 4.0, "target_files": "f" * 16, "weights": ours}
    (tmp_path / "refresh.json").write_text(json.dumps(note))
    assert found() == Proof(4.0, "f" * 16)
    (tmp_path / "refresh.json").write_text(json.dumps(note | {"weights": others}))
    assert (found().tau, found().target_files) == (None, "f" * 16)
    for damaged in ("{", '{"tau": 0.5}', '{"tau": "high"}'):
        (tmp_path / "refresh.json").write_text(damaged)
        assert found() == Proof(), "a drafter serves without"


@pytest.mark.parametrize("name", ["dflash", "dflare"])
def test_what_is_shipped_is_tied_to_its_weights(name: str) -> None:
    folder = ROOT / "examples" / "embedded_pair" / name
    assert proof_of(folder, id_of_folder(folder)).tau is not None


def test_swaps_are_counted() -> None:
    serving = ServingDrafter("d")
    assert str(serving) == "drafter  (d, no proved tau)"
    serving.put("d", "a" * 12, Proof(3.0))
    assert serving.swapped == 0, "the server's start is none"
    serving.put("e", "b" * 12, Proof())
    assert serving.swapped == 1
    assert serving.as_dict() == {
        "drafter": "e",
        "id": "b" * 12,
        "proved_tau": None,
        "since": serving.since,
        "swaps": 1,
        "refusals": 0,
    }
