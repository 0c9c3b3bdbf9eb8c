"""The study's variants are of one size where it is matched by parameters, and its intervals are
Student's."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PATH = Path(__file__).parents[2] / "examples" / "matched_budget.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("matched_budget", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_size(study, tmp_path: Path) -> None:
    args = argparse.Namespace(
        prompts=tmp_path / "p",
        out=tmp_path,
        steps=10,
        match="parameters",
        batch_size=16,
        anchors=32,
        dtype="float32",
        precision="float32",
        compile=False,
    )
    sizes = {v.name: study.parameters_of(study.settings_of(args, v, 0)) for v in study.variants()}
    assert len(sizes) == 23
    assert max(sizes.values()) < 1.03 * min(sizes.values())


def test_intervals(study) -> None:
    mean, half = study.interval([3.0, 3.2, 3.4])
    assert (mean, half) == (pytest.approx(3.2), pytest.approx(4.303 * 0.2 / 3**0.5))
    assert study.interval([3.0])[1] == float("inf")


def test_differences_are_paired_by_seed(study, tmp_path: Path) -> None:
    """What all variants of a seed have in common cancels out; a question's mean weighs seeds
    alike."""
    budget = dict(
        match="steps", steps=10, batch_size=16, anchors=32, dtype="float32", precision="float32"
    )
    args = argparse.Namespace(**budget, out=tmp_path, results=None)
    taus = {("dflash-3x3", s): s for s in (0, 1, 2)} | {
        ("dflare-3x3", s): s + 0.5 + s / 100 for s in (0, 1, 2)
    }
    taus |= (
        {("dflash-3x5", s): s for s in (0, 1)}
        | {("dflare-3x5", s): s + 0.3 for s in (0, 1)}
        | {("dflare-3x5-tied", 0): 0.1}
    )
    taus |= {("dflare-2x5", s): s for s in (0, 1, 2)} | {("dflash-2x5", s): s - 0.1 for s in (0, 1)}
    lines = [
        json.dumps(budget | {"variant": name, "seed": seed, "tau": tau})
        for (name, seed), tau in taus.items()
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    table = study.differences(args).splitlines()
    assert (
        "| DFlare over DFlash | dflare-3x3 less dflash-3x3 | +0.510 | ± 0.025 | 3 | higher |"
        in table
    )
    assert (
        "| DFlare over DFlash | dflare-3x5 less dflash-3x5 | +0.300 | ± 0.000 | 2 | higher |"
        in table
    )
    assert not any("DFlare over DFlash | **mean**" in line for line in table), (
        "only one of these has all seeds"
    )
    assert "| more draft layers | **mean** | +0.200 | ± 0.000 | 2 | higher |" in table
    assert (
        "| own projections of the context | dflare-3x5 less dflare-3x5-tied | +0.200 | ± inf | 1 |"
        " not told apart |" in table
    )
