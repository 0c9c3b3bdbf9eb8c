"""The doctor on real pairs: a sound one passes with the tau that is served, spoilt ones fail with
the advice that mends them.

Also what ``vllm-dflash convert`` writes, in real engines: tables of a drafter's own, in the formats
that were not made for them.

    pytest tests/engine/test_doctor.py
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.harness import DRAFTER, PROMPTS, TARGET, Batch, Job, held_out_prompts, run_engines
from engine.oracle import compare_drafts
from pairs import make_random_target, random_prompts
from variants import VARIANTS, Variant
from vllm_dflash.cli import main
from vllm_dflash.formats import parse
from vllm_dflash.tools.convert import convert
from vllm_dflash.weights import expected_tensors

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

NUM_PROMPTS, MAX_TOKENS, K = 8, 40, 7
CONVERTED = {
    "z-lab": Variant({"draft_vocab_size": 200}, format="speculators", mask_embedding=True),
    "AngelSlim": VARIANTS["dflare speculators"],
    "speculators": VARIANTS["dflare mixed"],
}
"""The format that each is converted to."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Plain PyTorch on models this small is slower with more, the more so on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Per format, a checkpoint in another one and its conversion."""
    made = {}
    for format, variant in CONVERTED.items():
        folder = tmp_path_factory.mktemp("converted")
        made[format] = (variant.make(folder / "source"), folder / "converted")
        convert(*made[format], format, verifier="target")
    return made


@pytest.fixture(scope="module")
def served(random_target: Path, folders: dict[str, tuple[Path, Path]]) -> dict[str, Batch]:
    """The conversions, and under ``pair`` the embedded pair over the doctor's prompts: one process,
    an engine each."""
    jobs = [
        Job(random_target, converted, random_prompts(8, 512), max_tokens=16, record=True)
        for _, converted in folders.values()
    ]
    pair = Job(
        TARGET, DRAFTER, held_out_prompts(NUM_PROMPTS), max_tokens=MAX_TOKENS, batch_sizes=(8,)
    )
    return dict(
        zip([*folders, "pair"], (batches[0] for batches in run_engines([*jobs, pair])), strict=True)
    )


def doctor(
    capsys: pytest.CaptureFixture[str], target: Path, drafter: Path, *more: str
) -> tuple[int, dict[str, Any]]:
    """The exit status and the report."""
    limits = [
        "--num-prompts",
        str(NUM_PROMPTS),
        "--max-tokens",
        str(MAX_TOKENS),
        "--dtype",
        "float32",
    ]
    status = main(
        ["doctor", "--target", str(target), "--draft", str(drafter), "--json", *limits, *more]
    )
    return status, json.loads(capsys.readouterr().out)


def check(report: dict[str, Any], name: str) -> dict[str, str]:
    return next(check for check in report["checks"] if check["name"] == name)


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DRAFTER, tmp_path / "drafter"))


@pytest.mark.parametrize("format", CONVERTED)
def test_a_conversion_is_served(
    random_target: Path,
    folders: dict[str, tuple[Path, Path]],
    served: dict[str, Batch],
    format: str,
) -> None:
    """Drafts as the source's, by the reference. z-lab's and AngelSlim's own files never hold a
    draft vocabulary; ours may."""
    agreement = compare_drafts(served[format], random_target, folders[format][0], torch.float32, K)
    assert agreement.drafts >= 80
    assert agreement.differences == []


def test_a_good_pair(capsys: pytest.CaptureFixture[str], served: dict[str, Batch]) -> None:
    """tau is that of vLLM's counters in an engine that the doctor did not start."""
    status, report = doctor(capsys, TARGET, DRAFTER, "--prompts", str(PROMPTS))
    assert status == 0, report["checks"]
    assert {c["state"] for c in report["checks"]} == {"ok"}
    assert report["vllm"]["tau"] == pytest.approx(served["pair"].tau, rel=0.01)
    assert report["reference"]["tau"] == pytest.approx(served["pair"].tau, rel=0.02)
    counters = served["pair"].report["counters"]
    assert report["vllm"]["acceptance"] == pytest.approx(
        [n / counters["drafts"] for n in counters["per_position"]], abs=0.02
    )
    assert check(report, "outputs")["found"].startswith("equal in plain PyTorch and vLLM, 8 of 8")
    assert any("Expect tau" in line for line in report["advice"])
    needed = report["break_even"]
    assert (needed["loads"], needed["contexts"]) == ([1, 4, 16, 64], [128])
    taus = [tau for (tau,) in needed["tau"]]
    # A draft and its verification are more than no work; under load rows cost in proportion.
    assert 1 < taus[0] < taus[-1] < 3 * (K + 1)
    assert "break even at tau" in check(report, "pays here")["found"]


def test_a_rotary_factor_that_a_file_only_repeats(
    capsys: pytest.CaptureFixture[str], drafter: Path
) -> None:
    """The embedded drafter was trained with whole heads: drafted with a quarter of them rotated,
    next to nothing is accepted. No engine is started."""
    path = drafter / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"partial_rotary_factor": 0.25}))
    status, report = doctor(capsys, TARGET, drafter, "--prompts", str(PROMPTS))
    assert status == 1
    assert "partial_rotary_factor" in check(report, "checkpoint")["found"]
    readings = check(report, "rotary readings")
    assert readings["state"] == "warning", readings
    assert "remove partial_rotary_factor" in readings["remedy"]
    whole, part = (float(x) for x in re.findall(r"\d\.\d\d", readings["found"]))
    assert whole > part + 0.5
    assert report["vllm"] is None


def test_a_drafter_with_a_head(
    capsys: pytest.CaptureFixture[str], served: dict[str, Batch], drafter: Path
) -> None:
    """The embedded drafter as a DFlash2 one, whose head and convolutions change next to nothing."""
    raw = json.loads((drafter / "config.json").read_text())
    raw["architectures"] = ["DFlash2DraftModel"]
    raw["dflash_config"] |= {
        "selector_rank": 8,
        "selector_top_k": 4,
        "conv_kernel_size": 2,
        "conv_group_size": 16,
    }
    (drafter / "config.json").write_text(json.dumps(raw))
    tensors = load_file(drafter / "model.safetensors")
    like, generator = next(iter(tensors.values())), torch.Generator().manual_seed(0)
    for name, shape in expected_tensors(parse(raw)).items():
        if name not in tensors:
            tensors[name] = (1e-4 * torch.randn(shape, generator=generator)).to(like)
            if name.endswith("base_kernel"):
                tensors[name][:, 0] = 1
    save_file(tensors, drafter / "model.safetensors", metadata={"format": "pt"})
    status, report = doctor(capsys, TARGET, drafter, "--prompts", str(PROMPTS))
    assert status == 0, report["checks"]
    assert {c["state"] for c in report["checks"]} == {"ok"}
    for found in (report["vllm"], report["reference"]):
        assert found["tau"] == pytest.approx(served["pair"].tau, rel=0.02)


def test_shuffled_weights(capsys: pytest.CaptureFixture[str], drafter: Path) -> None:
    """Every tensor has its name, shape and dtype, so that nothing but acceptance tells."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(drafter / "model.safetensors")
    mixed = {
        n: t.view(-1)[torch.randperm(t.numel(), generator=generator)].view(t.shape)
        for n, t in tensors.items()
    }
    save_file(mixed, drafter / "model.safetensors", metadata={"format": "pt"})
    status, report = doctor(capsys, TARGET, drafter, "--prompts", str(PROMPTS), "--skip-vllm")
    assert status == 1
    assert check(report, "tau")["state"] == "error"
    for cause in ("revision", "off by one", "mask token", "rope_theta"):
        assert cause in check(report, "tau")["remedy"]


def test_one_based_layer_ids(capsys: pytest.CaptureFixture[str], drafter: Path) -> None:
    """Neighbouring layers are alike, so tau only falls from 3.6 to 3.2: found by comparing, anchor
    by anchor, not by a threshold."""
    path = drafter / "config.json"
    raw = json.loads(path.read_text())
    raw["dflash_config"]["target_layer_ids"] = [
        i + 1 for i in raw["dflash_config"]["target_layer_ids"]
    ]
    path.write_text(json.dumps(raw))
    status, report = doctor(capsys, TARGET, drafter, "--prompts", str(PROMPTS), "--skip-vllm")
    assert status == 1, report
    assert "the ids look one-based" in check(report, "layer ids")["found"]
    assert "set target_layer_ids to 1, 3, 5, counted from 0" in check(report, "layer ids")["remedy"]


def test_a_pair_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, drafter: Path
) -> None:
    """All that is wrong is said at once, and nothing is run."""
    status, report = doctor(
        capsys, make_random_target(tmp_path / "target"), drafter, "--num-speculative-tokens", "9"
    )
    assert status == 1
    wrong = {c["name"] for c in report["checks"] if c["state"] == "error"}
    assert wrong == {"hidden size", "vocabulary", "target layers", "drafted tokens"}
    assert all(c["remedy"] for c in report["checks"] if c["state"] == "error")
    assert check(report, "tokenizer")["state"] == "warning"
    assert report["reference"] is None


def test_what_serves_but_is_odd(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, drafter: Path
) -> None:
    """Another rotary base and a mask token of ordinary text are warnings; another tokenizer and too
    long a context are errors."""
    path = drafter / "config.json"
    raw = json.loads(path.read_text()) | {"rope_theta": 5000.0, "max_position_embeddings": 512}
    raw["dflash_config"]["mask_token_id"] = 300
    path.write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TARGET / name, drafter / name)
    tokenizer = json.loads((drafter / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = (next(t for t, i in vocabulary.items() if i == n) for n in (400, 401))
    vocabulary[one], vocabulary[other] = 401, 400
    (drafter / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, report = doctor(capsys, TARGET, drafter, "--skip-vllm")
    assert status == 1
    states = {c["name"]: c["state"] for c in report["checks"] if c["state"] != "ok"}
    assert states == {
        "rotary": "warning",
        "mask token": "warning",
        "tokenizer": "error",
        "context length": "error",
    }
    assert "2 tokens differ" in check(report, "tokenizer")["found"]
    assert "--max-model-len 512 or less" in check(report, "context length")["remedy"]


def test_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    for content, words in (
        ("", "is empty"),
        ("{", "line 1 is no JSON"),
        ('{"text": "a"}', "line 1: give prompt"),
        ('{"prompt_token_ids": [9999]}', "below 4096"),
    ):
        bad.write_text(content)
        assert (
            main(
                ["doctor", "--target", str(TARGET), "--draft", str(DRAFTER), "--prompts", str(bad)]
            )
            == 2
        )
        assert words in capsys.readouterr().err
