"""The study's variants are of one size where it is matched by parameters, and its intervals are Student's."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

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
