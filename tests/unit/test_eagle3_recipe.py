"""``examples/smollm2/eagle3``: the script reads what a training run of today leaves, its figures
are right, and the versions that its files name are the same.

The library that it trains with is not installed here: empty classes stand in for what is imported.
What its documents say to type is in ``test_documented_commands.py``.
"""

import ast
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from vllm_dflash.files import write_record
from vllm_dflash.training.batches import Plan
from vllm_dflash.training.generate import folder_of
from vllm_dflash.training.sequences import shard_path, write_sequences
from vllm_dflash.training.settings import load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "smollm2" / "eagle3"
SCRIPT = FOLDER / "train_eagle3.py"
TARGET = ROOT / "examples" / "embedded_pair" / "target"
LIBRARY = "speculators"


def stand_ins() -> dict[str, ModuleType]:
    """Modules of the library with an empty class for each name that the script imports."""
    found: dict[str, ModuleType] = {}
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARY):
            parts = str(node.module).split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                found.setdefault(name, ModuleType(name))
            for each in node.names:
                setattr(found[str(node.module)], each.name, type(each.name, (), {}))
    return found


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("train_eagle3", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


SEQUENCES = [([9, 8, *range(100, 100 + 5 + i)], 2) for i in range(10)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run whose answers are there: two shards and one that is held out."""
    flags = {"target": str(TARGET), "out": str(tmp_path), "prompts": ["p"], "dtype": "float32"}
    settings = load(None, flags | {"batch_size": 4, "epochs": 2.0, "seed": 3})
    write_record(tmp_path / "settings.json", settings.to_dict())
    folder = folder_of(settings)
    write_sequences(shard_path(folder, 0), SEQUENCES[:6])
    write_sequences(shard_path(folder, 1), SEQUENCES[6:])
    write_sequences(shard_path(folder / "held-out", 0), SEQUENCES[:1])
    write_record(folder / "split.json", {"shards": 2})
    return tmp_path


def test_the_budget_and_the_order_are_the_runs(script: Any, run: Path) -> None:
    """The rival sees the drafter's sequences, in its order, as many steps."""
    found = script.Run(run)
    assert (found.batch_size, found.steps, found.dtype) == (4, 5, "float32")
    lengths = np.array([len(tokens) for tokens, _ in SEQUENCES])
    plan = Plan(lengths, np.full(len(lengths), 2), 4, 32, 3)
    for step in range(found.steps):
        assert np.array_equal(found.plan.batch(step).rows, plan.batch(step).rows)
    counts = found.token_counts()
    assert 9 not in counts
    assert (counts[100], counts[104], counts[113]) == (10, 10, 1)


def test_a_folder_without_answers_is_refused(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="after its stage generate"):
        script.Run(tmp_path)


class Head:
    """Drafts that are known: ids [ttt_steps, S - 1] of the draft vocabulary."""

    def __init__(self, ids: torch.Tensor, d2t: torch.Tensor | None) -> None:
        self.ids, self.d2t = ids, d2t

    def __call__(self, ttt_steps: int) -> list[torch.Tensor]:
        return list(self.ids[:ttt_steps, None])


@pytest.mark.parametrize("shift", [0, 1])
def test_the_walk_goes_as_decoding_does(script: Any, shift: int) -> None:
    """Drafts that are right here and there: tau is that of a loop that takes what is accepted and
    goes on behind it. With ``shift`` the drafts' ids are those of a vocabulary of their own."""
    rng, length, prompt, most = np.random.default_rng(0), 60, 7, 3
    text = rng.integers(0, 4, length)
    # Row t, place j: the token at j + 2 + t.
    places = np.arange(length - 1) + 2 + np.arange(most)[:, None]
    drafts = text[np.minimum(places, length - 1)] + (rng.random(places.shape) < 0.3)
    d2t = torch.full((6,), -shift) if shift else None
    trainer = SimpleNamespace(
        args=SimpleNamespace(ttt_steps=most),
        head=Head(torch.from_numpy(drafts + shift), d2t),
        run=SimpleNamespace(held_out=[SimpleNamespace(tokens=text, prompt_length=prompt)]),
        pack=lambda samples: {"verifier_last_hidden_states": None},
    )
    found = script.Trainer.walk(trainer)
    for k in range(1, most + 1):
        steps, tokens, at = 0, 0, prompt - 1
        while at < length - 1 - most:
            accepted = 0
            while accepted < k and drafts[accepted, at] == text[at + 2 + accepted]:
                accepted += 1
            steps, tokens, at = steps + 1, tokens + accepted + 1, at + accepted + 1
        assert found[k] == pytest.approx(tokens / steps)
    assert found[1] < found[2] < found[3]


def test_hidden_states_come_back_from_the_disk(script: Any, tmp_path: Path) -> None:
    starts = np.array([0, 3, 8])
    states = [torch.randn(n, 6).bfloat16() for n in np.diff(starts)]
    cache = script.Cache(tmp_path / "states", starts, 6)
    cache.put(1, states[1])
    again = script.Cache(tmp_path / "states", starts, 6)
    assert again.there.tolist() == [0, 1]
    assert torch.equal(again.get(1), states[1])


def test_a_log_is_cut_at_the_checkpoint(script: Any, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    script.cut(log, 0)
    log.write_text("".join(json.dumps({"step": n}) + "\n" for n in (10, 20, 30)))
    script.cut(log, 20)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20]


def requirements(name: str) -> dict[str, Requirement]:
    lines = (FOLDER / name).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {each.name: each for each in parsed}


def test_the_library_is_of_one_version() -> None:
    """Pinned in one file, named in three; its second package is released with it."""
    pinned = {str(each.specifier) for each in requirements("no-deps.txt").values()}
    assert len(pinned) == 1
    version = pinned.pop().removeprefix("==")
    for path in (FOLDER / "README.md", SCRIPT):
        named = re.findall(r"\((\d+\.\d+\.\d+)\)", path.read_text())
        assert named == [version], path.name


def test_versions_that_the_recipe_names_fit_the_project() -> None:
    """An environment of one requirement file is one that the project's own allows, and the torch
    that was tried is the one that the project's first page names."""
    readme = (FOLDER / "README.md").read_text()
    [torch_version], [transformers] = (
        re.findall(rf"{name} (\d+\.\d+(?:\.\d+\+cpu)?)", readme)
        for name in ("torch", "transformers")
    )
    for document in ("README.md", "Makefile"):
        assert f"torch {torch_version}" in (ROOT / document).read_text()
    asked = requirements("requirements.txt")
    assert asked["transformers"].specifier.contains(transformers)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for own in (Requirement(line) for group in groups for line in group):
        pin = re.fullmatch(r"==([\d.]+)", str(own.specifier))
        if own.name in asked and pin is not None:
            assert asked[own.name].specifier.contains(pin[1]), own.name


def test_a_newer_transformers_than_the_library_takes_is_kept_out() -> None:
    """The library is installed without its dependencies, so nothing else holds their limits: with
    next month's transformers the recipe would have failed at an import."""
    for name, each in requirements("requirements.txt").items():
        assert any(part.operator in ("<", "<=") for part in each.specifier), name
    assert {"transformers", "numpy", "datasets"} <= requirements("requirements.txt").keys()


def test_draft_layers_see_ascending_layers_of_the_target(script: Any) -> None:
    ids = script.layer_ids(30)
    assert ids == [2, 15, 27]
    assert all(a < b for a, b in pairwise(ids))
