"""New weights in an engine that runs: what it writes and drafts then is what a fresh engine with
those weights does.

Every way of changing weights, against every kind of weight, on both runners: one engine each, whose
weights change many times.

    pytest tests/engine/test_reload.py
"""

import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.reload_cases import (
    AS_QWEN3,
    DRAFTER_CASES,
    DRAFTERS,
    FRESH,
    HEAD_NORMS,
    NOT_RUN,
    OTHER_ENGINES,
    REFUSALS,
    REFUSING,
    RUNNERS,
    SHARED,
    TARGET_CASES,
    TARGET_KINDS,
    table,
    target_result,
)
from engine.reloads import MAX_TOKENS, job, redraw, run, wrong_drafts
from lora import make_adapter, merge
from pairs import make_random_drafter, make_random_target, random_drafter_config
from targets import FAMILIES, VOCAB

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

Report = dict[str, Any]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By architecture an untied target with biases as ``base``, and by kind the same with other
    weights of that kind."""
    folder = tmp_path_factory.mktemp("targets")
    base = make_random_target(folder / "qwen3" / "base", attention_bias=True)
    tensors = load_file(base / "model.safetensors")
    # vLLM's Qwen3 has none for the output projection.
    save_file(
        {n: t for n, t in tensors.items() if not n.endswith("o_proj.bias")},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    tied = make_random_target(folder / "qwen3" / "tied", tied=True)
    make = partial(FAMILIES["llama"].make, spoken=VOCAB)
    llama = make(folder / "llama" / "base", attention_bias=True, mlp_bias=True)
    tied_llama = make(folder / "llama" / "tied", tie_word_embeddings=True)
    without = [kind for kind in TARGET_KINDS if kind not in HEAD_NORMS]
    return {
        "qwen3": of_each_kind(base, tied, TARGET_KINDS),
        "llama": of_each_kind(llama, tied_llama, without),
    }


def of_each_kind(base: Path, tied: Path, kinds: Iterable[str]) -> dict[str, Path]:
    """Both, and what becomes of them by kind of weight that is another."""
    folder = base.parent
    return {
        "base": base,
        "merged adapter": merge(folder / "merged", base, make_adapter(folder / "adapter", base)),
        "tied": tied,
        "tied, all": redraw(tied, folder / "tied, all", ".", 9),
    } | {kind: redraw(base, folder / kind, TARGET_KINDS[kind], i) for i, kind in enumerate(kinds)}


@pytest.fixture(scope="module")
def fresh(targets: dict[str, dict[str, Path]]) -> dict[str, dict[str, list[list[int]]]]:
    """What plain engines write that were started with each target."""
    paths = [path for kinds in targets.values() for path in kinds.values()]
    reports = iter(run([job(path, None, [{"how": "nothing"}]) for path in paths]))
    found = {
        architecture: {kind: next(reports)[0]["tokens"] for kind in kinds}
        for architecture, kinds in targets.items()
    }
    for written in found.values():
        for most in MAX_TOKENS.values():
            texts = {str([tokens[:most] for tokens in each]) for each in written.values()}
            assert len(texts) == len(written), "weights that make no difference test nothing"
    return found


def target_steps(architecture: str, targets: dict[str, Path]) -> dict[tuple[str, str], Any]:
    """By way and kind, of one engine. Before each it has another kind's weights, so that what is
    left of them is seen."""
    steps: dict[tuple[str, str], Any] = {}
    for of, way, kind in TARGET_CASES:
        if of != architecture or kind in OTHER_ENGINES:
            continue
        if way == "sleep and wake":
            steps[way, kind] = {"how": "sleep", "reset": targets["base"]}
        elif way in ("reload", "update"):
            steps[way, kind] = {"how": way, "path": targets[kind]}
        else:
            steps[way, kind] = {
                "how": way,
                "path": targets[kind],
                "reset": targets["base"],
                "only": TARGET_KINDS[kind],
            }
    return steps


def target_jobs(
    architecture: str, targets: dict[str, Path], drafter: Path, runner: str
) -> dict[tuple[tuple[str, ...], ...], dict[str, Any]]:
    """Engines whose target's weights change, by who, architecture, way and kind of each step."""
    changes, jobs = target_steps(architecture, targets), {}
    tied = [{"how": "reload", "path": targets["tied, all"]}]
    for who, drafts in (("ours", drafter), ("plain", None)):
        names = tuple((who, architecture, *key) for key in changes)
        jobs[names] = job(targets["base"], drafts, list(changes.values()), runner)
        name = who, architecture, "reload", "tied, all"
        jobs[(name,)] = job(targets["tied"], drafts, tied, runner)
    if runner == "v1":  # on V2 vLLM's CPU layers for LoRA cannot verify drafts
        lora = {"enable_lora": True, "max_lora_rank": 8}
        steps = [{"how": "reload", "path": targets["all"]}]
        name = "ours", architecture, "reload", "with LoRA"
        jobs[(name,)] = job(targets["base"], drafter, steps, runner, **lora)
    return jobs


@pytest.fixture(scope="module")
def reports(
    targets: dict[str, dict[str, Path]], random_drafter: Path, drafters: dict[str, dict[str, Path]]
) -> Callable[[str], dict[tuple[str, ...], Report]]:
    """By runner all reports, by who, way and kind; all engines of a runner are in one process."""

    @cache
    def of(runner: str) -> dict[tuple[str, ...], Report]:
        jobs = {}
        for architecture, kinds in targets.items():
            if target_result(runner, architecture, "reload", "all") != AS_QWEN3:
                jobs |= target_jobs(architecture, kinds, random_drafter, runner)
        for name, folders in drafters.items():
            steps = drafter_steps(name, folders)
            names = tuple((name, *key) for key in steps)
            jobs[names] = job(
                targets["qwen3"]["base"], folders["base"], list(steps.values()), runner
            )
        found = run(list(jobs.values()), runner)
        return {
            key: report
            for keys, reports in zip(jobs, found, strict=True)
            for key, report in zip(keys, reports, strict=True)
        }

    return of


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("architecture", "way", "kind"), TARGET_CASES)
def test_target(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    fresh: dict[str, dict[str, list[list[int]]]],
    targets: dict[str, dict[str, Path]],
    random_drafter: Path,
    runner: str,
    architecture: str,
    way: str,
    kind: str,
) -> None:
    """Prompts in a running engine whose target's weights were changed: 2 of 8 were those of a fresh
    engine, and nothing was said.

    Our layers kept tensors of their own: packed weights, joined norms, and references to storages
    that had been replaced. Drafts are
    the reference's with the new weights, for the drafter takes the target's embedding and lm_head.
    """
    result = target_result(runner, architecture, way, kind)
    if result in (NOT_RUN, AS_QWEN3):
        pytest.skip(result)
    report = reports(runner)["ours", architecture, way, kind]
    assert report["error"] is None
    weights = {"with LoRA": "all"}.get(kind, kind)
    plain = reports(runner).get(("plain", architecture, way, kind))
    if plain is not None:
        assert report["tokens"] == plain["tokens"]
    if result != FRESH:
        assert plain is not None
        return
    expected = fresh[architecture][weights]
    assert report["tokens"] == [tokens[: MAX_TOKENS[runner]] for tokens in expected]
    wrong, count = wrong_drafts(report, targets[architecture][weights], random_drafter)
    assert wrong == 0
    assert count > 20


@pytest.fixture(scope="module")
def drafters(
    tmp_path_factory: pytest.TempPathFactory, targets: dict[str, dict[str, Path]]
) -> dict[str, dict[str, Path]]:
    """By drafter, a ``base`` and by kind the same with other weights of that kind."""
    folder, found = tmp_path_factory.mktemp("drafters"), {}
    for name, (changes, form, kinds) in DRAFTERS.items():
        base = make_random_drafter(
            folder / name / "base", config=random_drafter_config(**changes), **form
        )
        if name == "the target's tables":
            theirs = load_file(targets["qwen3"]["base"] / "model.safetensors")
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
    targets: dict[str, dict[str, Path]],
    fresh: dict[str, dict[str, list[list[int]]]],
    runner: str,
    name: str,
    way: str,
    kind: str,
) -> None:
    """Weights that were pushed into a running drafter, one tensor at a time, failed with `size of
    tensor a (256) must match b (0)`."""
    report = reports(runner)[name, way, kind]
    assert report["error"] is None
    assert report["tokens"] == [tokens[: MAX_TOKENS[runner]] for tokens in fresh["qwen3"]["base"]]
    wrong, count = wrong_drafts(
        report,
        targets["qwen3"]["base"],
        drafters[name]["all" if kind == "after refusals" else kind],
    )
    assert wrong == 0
    assert count > 20


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", [*REFUSALS, "closed"])
@pytest.mark.parametrize("name", REFUSING)
def test_bad_update_changes_nothing(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    drafters: dict[str, dict[str, Path]],
    targets: dict[str, dict[str, Path]],
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
    assert wrong_drafts(report, targets["qwen3"]["base"], drafters[name][last])[0] == 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_targets_tables_are_not_overwritten(
    reports: Callable[[str], dict[tuple[str, ...], Report]],
    drafters: dict[str, dict[str, Path]],
    targets: dict[str, dict[str, Path]],
    fresh: dict[str, dict[str, list[list[int]]]],
    runner: str,
) -> None:
    """vLLM keeps one of two tables that are equal: the drafter's new lm_head would have become the
    target's."""
    name, kind = SHARED
    report = reports(runner)[name, "draft update", kind]
    assert "lm_head.weight was the target's at the start" in report["error"]
    assert report["tokens"] == [tokens[: MAX_TOKENS[runner]] for tokens in fresh["qwen3"]["base"]]
    assert wrong_drafts(report, targets["qwen3"]["base"], drafters[name]["layers"])[0] == 0


def test_the_documents_table() -> None:
    """docs/features.md has every case of these tests with its result; ``python
    tests/engine/reload_cases.py`` prints the table anew."""
    text = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
    assert table() in text
