"""New weights in an engine that runs: what it writes and drafts then is what a fresh engine with
those weights does.

Every way of changing weights, against every kind of weight, on both runners: one engine each, whose
weights change many times.

    pytest tests/engine/test_reload.py
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.reload_cases import (
    DRAFTER_CASES,
    DRAFTERS,
    FRESH,
    LOADED,
    NOT_RUN,
    PAST_LOADERS,
    REFUSALS,
    REFUSING,
    RUNNERS,
    SHARED,
    TARGET_CASES,
    TARGET_KINDS,
    WAYS,
    WHOLE,
    table,
    target_result,
)
from engine.reloads import MAX_TOKENS, job, redraw, run, wrong_drafts
from lora import make_adapter, merge
from pairs import make_random_drafter, make_random_target, random_drafter_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

Report = dict[str, Any]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied target with biases as ``base``, and by kind the same with other weights of that
    kind."""
    folder = tmp_path_factory.mktemp("targets")
    base = make_random_target(folder / "base", attention_bias=True)
    tensors = load_file(base / "model.safetensors")
    # vLLM's Qwen3 has none for the output projection.
    save_file(
        {n: t for n, t in tensors.items() if not n.endswith("o_proj.bias")},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    kinds = {
        kind: redraw(base, folder / kind, pattern, i)
        for i, (kind, pattern) in enumerate(TARGET_KINDS.items())
    }
    merged = merge(folder / "merged", base, make_adapter(folder / "adapter", base))
    tied = make_random_target(folder / "tied", tied=True)
    return {
        "base": base,
        "merged adapter": merged,
        "tied": tied,
        "tied, all": redraw(tied, folder / "tied, all", ".", 9),
    } | kinds


@pytest.fixture(scope="module")
def fresh(targets: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What plain engines write that were started with each target."""
    reports = run([job(path, None, [{"how": "nothing"}]) for path in targets.values()])
    found = {kind: steps[0]["tokens"] for kind, steps in zip(targets, reports, strict=True)}
    assert len({str(tokens) for tokens in found.values()}) == len(found), (
        "weights that make no difference test nothing"
    )
    return found


def target_steps(targets: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """By way and kind. Before each the engine has another kind's weights, so that what is left of
    them is seen."""
    base = targets["base"]
    steps: dict[tuple[str, str], dict[str, Any]] = {}
    for way in ("reload", "update"):
        steps |= {(way, kind): {"how": way, "path": targets[kind]} for kind in LOADED}
    steps |= {
        ("reload some", k): {
            "how": "reload some",
            "path": targets[k],
            "reset": base,
            "only": TARGET_KINDS[k],
        }
        for k in WHOLE
    }
    for way in WAYS:
        steps |= {
            (way, kind): {
                "how": way,
                "path": targets[kind],
                "reset": base,
                "only": TARGET_KINDS[kind],
            }
            for kind in PAST_LOADERS
        }
    return steps | {("sleep and wake", "base"): {"how": "sleep", "reset": base}}


@pytest.fixture(scope="module")
def reports(
    targets: dict[str, Path],
    random_drafter: Path,
    drafters: dict[str, dict[str, Path]],
    fresh: dict[str, list[list[int]]],
) -> Callable[[str], dict[tuple[str, ...], Report]]:
    """By runner all reports, by who, way and kind; all engines of a runner are in one process."""

    @cache
    def of(runner: str) -> dict[tuple[str, ...], Report]:
        steps, names = target_steps(targets), []
        tied = [{"how": "reload", "path": targets["tied, all"]}]
        jobs = [
            job(targets["base"], drafter, list(steps.values()), runner)
            for drafter in (random_drafter, None)
        ]
        names += [[(who, *key) for key in steps] for who in ("ours", "plain")]
        jobs += [job(targets["tied"], drafter, tied, runner) for drafter in (random_drafter, None)]
        names += [[("ours", "reload", "tied, all")], [("plain", "reload", "tied, all")]]
        if runner == "v1":  # on V2 vLLM's CPU layers for LoRA cannot verify drafts
            lora = [{"how": "reload", "path": targets["all"]}]
            jobs.append(
                job(
                    targets["base"], random_drafter, lora, runner, enable_lora=True, max_lora_rank=8
                )
            )
            names.append([("ours", "reload", "with LoRA")])
        for name, folders in drafters.items():
            theirs = drafter_steps(name, folders)
            jobs.append(job(targets["base"], folders["base"], list(theirs.values()), runner))
            names.append([(name, *key) for key in theirs])
        found = run(jobs, runner)
        return {
            key: report
            for keys, steps in zip(names, found, strict=True)
            for key, report in zip(keys, steps, strict=True)
        }

    return of


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("way", "kind"), TARGET_CASES)
def test_target(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    fresh: dict[str, list[list[int]]],
    targets: dict[str, Path],
    random_drafter: Path,
    runner: str,
    way: str,
    kind: str,
) -> None:
    """Prompts in a running engine whose target's weights were changed: 2 of 8 were those of a fresh
    engine, and nothing was said.

    Our layers kept tensors of their own: packed weights, joined norms, and references to storages
    that had been replaced. Drafts are
    the reference's with the new weights, for the drafter takes the target's embedding and lm_head.
    """
    result = target_result(runner, way, kind)
    if result == NOT_RUN:
        pytest.skip(result)
    report = reports(runner)["ours", way, kind]
    assert report["error"] is None
    weights = {"with LoRA": "all"}.get(kind, kind)
    plain = reports(runner).get(("plain", way, kind))
    if plain is not None:
        assert report["tokens"] == plain["tokens"]
    if result != FRESH:
        assert plain is not None
        return
    assert report["tokens"] == [tokens[: MAX_TOKENS[runner]] for tokens in fresh[weights]]
    wrong, count = wrong_drafts(report, targets[weights], random_drafter)
    assert wrong == 0
    assert count > 20


@pytest.fixture(scope="module")
def drafters(
    tmp_path_factory: pytest.TempPathFactory, targets: dict[str, Path]
) -> dict[str, dict[str, Path]]:
    """By drafter, a ``base`` and by kind the same with other weights of that kind."""
    folder, found = tmp_path_factory.mktemp("drafters"), {}
    for name, (changes, form, kinds) in DRAFTERS.items():
        base = make_random_drafter(
            folder / name / "base", config=random_drafter_config(**changes), **form
        )
        if name == "the target's tables":
            theirs = load_file(targets["base"] / "model.safetensors")
            tables = {
                "embed_tokens.weight": theirs["model.embed_tokens.weight"],
                "lm_head.weight": theirs["lm_head.weight"],
            }
            save_file(
                load_file(base / "model.safetensors") | tables,
                base / "model.safetensors",
                metadata={"format": "pt"},
            )
        redrawn = {
            kind: redraw(base, folder / name / kind, pattern, 20 + i)
            for i, (kind, pattern) in enumerate(kinds.items())
        }
        found[name] = {"base": base} | redrawn
    return found


def drafter_steps(name: str, folders: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """By way and kind."""
    steps = {
        ("draft update", kind): {"how": "draft update", "path": path, "mask": True}
        for kind, path in folders.items()
    }
    if name == "dflash":
        steps |= {
            ("draft load", "all"): {"how": "draft load", "path": folders["all"], "mask": True},
            ("draft load", "base"): {"how": "draft load", "path": folders["base"], "mask": True},
        }
    if name in REFUSING:
        bad = {"how": "draft update", "path": folders["all"]}
        steps |= {
            ("refused", "NaN"): bad | {"spoil": {"layers.1.mlp.up_proj.weight": "nan"}},
            ("refused", "shape"): bad | {"spoil": {"norm.weight": "shape"}},
            ("refused", "unknown"): bad | {"spoil": {"layers.9.mlp.up_proj.weight": "new"}},
            ("refused", "missing"): (
                bad | {"out": ["layers.1.self_attn.k_proj.weight", "hidden_norm.weight"]}
            ),
            ("refused", "closed"): {"how": "close"},
            ("draft update", "after refusals"): {
                "how": "draft update",
                "path": folders["all"],
                "mask": True,
            },
        }
    return steps


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("name", "way", "kind"), DRAFTER_CASES)
def test_drafter(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    drafters: dict[str, dict[str, Path]],
    targets: dict[str, Path],
    fresh: dict[str, list[list[int]]],
    runner: str,
    name: str,
    way: str,
    kind: str,
) -> None:
    """Weights that were pushed into a running drafter, one tensor at a time, failed with `size of
    tensor a (256) must match b (0)`."""
    report = reports(runner)[name, way, kind]
    assert report["error"] is None
    assert report["tokens"] == [tokens[: MAX_TOKENS[runner]] for tokens in fresh["base"]]
    wrong, count = wrong_drafts(
        report, targets["base"], drafters[name]["all" if kind == "after refusals" else kind]
    )
    assert wrong == 0
    assert count > 20


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", [*REFUSALS, "closed"])
@pytest.mark.parametrize("name", REFUSING)
def test_bad_update_changes_nothing(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    drafters: dict[str, dict[str, Path]],
    targets: dict[str, Path],
    runner: str,
    name: str,
    kind: str,
) -> None:
    report = reports(runner)[name, "refused", kind]
    if kind == "closed":
        assert report["error"] is None
    else:
        assert re.search(REFUSALS[kind], report["error"], re.DOTALL), report["error"]
    last = "base" if name == "dflash" else "all"
    assert wrong_drafts(report, targets["base"], drafters[name][last])[0] == 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_targets_tables_are_not_overwritten(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    drafters: dict[str, dict[str, Path]],
    targets: dict[str, Path],
    fresh: dict[str, list[list[int]]],
    runner: str,
) -> None:
    """vLLM keeps one of two tables that are equal: the drafter's new lm_head would have become the
    target's."""
    name, kind = SHARED
    report = reports(runner)[name, "draft update", kind]
    assert "lm_head.weight was the target's at the start" in report["error"]
    assert report["tokens"] == [tokens[: MAX_TOKENS[runner]] for tokens in fresh["base"]]
    assert wrong_drafts(report, targets["base"], drafters[name]["layers"])[0] == 0


def test_the_documents_table() -> None:
    """docs/features.md has every case of these tests with its result; ``python
    tests/engine/reload_cases.py`` prints the table anew."""
    text = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
    assert table() in text
