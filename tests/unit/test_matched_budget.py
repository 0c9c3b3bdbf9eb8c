"""The study's variants are of one size where it is matched by parameters, and its intervals are
Student's."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("matched_budget")


@pytest.mark.parametrize(("part", "count"), [("contexts", 23), ("heads", 15)])
def test_one_size(study: ModuleType, tmp_path: Path, part: str, count: int) -> None:
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
    runs = {v.name: study.settings_of(args, v, 0) for v in study.PARTS[part]()}
    sizes = [study.parameters_of(run) for run in runs.values()]
    assert len(sizes) == count
    assert max(sizes) < 1.03 * min(sizes)
    if part == "heads":
        # What a draft computes differs by less than half.
        flops = [study.flops_of(run) for run in runs.values()]
        assert max(flops) < 1.5 * min(flops)


def test_intervals(study: ModuleType) -> None:
    from matched_report import interval

    mean, half = interval([3.0, 3.2, 3.4])
    assert (mean, half) == (pytest.approx(3.2), pytest.approx(4.303 * 0.2 / 3**0.5))
    assert interval([3.0])[1] == float("inf")


def test_differences_are_paired_by_seed(study: ModuleType) -> None:
    """What all variants of a seed have in common cancels out; a question's mean weighs seeds
    alike."""
    taus = {("dflash-3x3", s): s for s in (0, 1, 2)} | {
        ("dflare-3x3", s): s + 0.5 + s / 100 for s in (0, 1, 2)
    }
    taus |= (
        {("dflash-3x5", s): s for s in (0, 1)}
        | {("dflare-3x5", s): s + 0.3 for s in (0, 1)}
        | {("dflare-3x5-tied", 0): 0.1}
    )
    taus |= {("dflare-2x5", s): s for s in (0, 1, 2)} | {("dflash-2x5", s): s - 0.1 for s in (0, 1)}
    runs = [{"variant": name, "seed": seed, "tau": tau} for (name, seed), tau in taus.items()]
    table = study.differences(runs).splitlines()
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
