"""Patches of single objects, and those that may be left out, on throw-away modules that stand for
upstream."""

import gc
import importlib
import re
import weakref
from pathlib import Path
from typing import Any

import pytest

from throwaway import VERSION, around, fits_any, of_runner, other_part, patch
from vllm_dflash.patch import PatchError
from vllm_dflash.patching import PatchSet


def test_an_object_is_patched_and_its_class_is_not(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    first, second = module.Runner(), module.Runner()
    inner, outer = of_runner(), of_runner()
    patches = PatchSet([inner, outer])
    patches.apply(VERSION)
    assert [row.state for row in patches.report()] == ["pending", "pending"]
    assert patches.attach(first, [inner])
    assert patches.attach(first, [outer], "others")
    assert first.fits(1) == "others around ours around True"
    assert second.fits(1) is True
    assert [row.state for row in patches.report()] == ["applied", "applied"]
    assert patches.revert() == []
    assert first.fits(1) is True
    assert "fits" not in vars(first)


def test_an_attribute_that_a_constructor_assigns_is_put_back(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    runner = module.Runner()
    part = runner.part = module.Runner()
    ours = patch("upstream:Runner.part", lambda original: "ours", scope="instance")
    gone = patch("upstream:Runner.gone", lambda original: "ours", scope="instance")
    assert PatchSet([gone]).check(VERSION) == [
        "upstream:Runner.gone: its class's source has no such attribute"
    ]
    patches = PatchSet([ours])
    patches.apply(VERSION)
    patches.attach(runner, [ours])
    assert runner.part == "ours"
    patches.revert()
    assert runner.part is part


def test_a_patched_object_is_not_kept_alive(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    ours = of_runner()
    patches, runner = PatchSet([ours]), module.Runner()
    patches.attach(runner, [ours])
    known = weakref.ref(runner)
    del runner
    gc.collect()
    assert known() is None
    assert patches.revert() == []


def test_objects_get_all_of_a_group_or_none_and_another_plug_ins_replacement_is_named(
    upstream: Path,
) -> None:
    module: Any = importlib.import_module("upstream")

    def theirs(n: int) -> bool:
        return False

    theirs.__module__ = "other_plugin"
    for needs in ("required", "optional"):
        runner = module.Runner()
        runner.fits = theirs
        kind, fits = (
            patch("upstream:Runner.kind", around, scope="instance", needs=needs),
            of_runner(needs=needs),
        )
        patches = PatchSet([kind, fits])
        patches.apply(VERSION)
        named = r"upstream:Runner\.fits: it is other_plugin:.*theirs: another plug-in replaced it"
        if needs == "required":
            with pytest.raises(PatchError, match=named):
                patches.attach(runner, [kind, fits])
        else:
            assert not patches.attach(runner, [kind, fits])
            assert re.match(named, patches.report()[1].note)
        assert runner.kind() == "upstream"
        assert runner.fits is theirs


def test_what_is_optional_drops_out_alone(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")

    def fails(original: Any) -> Any:
        raise ImportError("no such kernel")

    changed = patch("upstream:build", fits_any, {"upstream:build": "0" * 16}, needs="optional")
    broken = patch("upstream:use", fails, needs="optional")
    unneeded = patch("upstream:Part", other_part, unneeded=lambda sources: "not here")
    patches = PatchSet([patch("upstream:Runner.fits", fits_any), changed, broken, unneeded])
    patches.apply(VERSION)
    assert [row.state for row in patches.report()] == [
        "applied",
        "left out",
        "left out",
        "not needed",
    ]
    assert "whose source has changed" in patches.report()[1].note
    assert patches.report()[2].note == "ImportError: no such kernel"
    assert not patches.fits(changed)
    assert module.Runner().fits(99)
    assert module.build() == "part"


def test_a_switch_leaves_one_out(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_FIX", "0")
    patches = PatchSet([patch("upstream:Part", other_part, switch="UPSTREAM_FIX")])
    patches.apply(VERSION)
    assert [(row.state, row.note) for row in patches.report()] == [
        ("switched off", "UPSTREAM_FIX=0")
    ]


def test_an_optional_part_that_cannot_be_built_is_left_out(upstream: Path) -> None:
    """Its imports used to stand beside those that are needed, and ended the rest."""
    part = patch("upstream:build", scope="ours", needs="optional")
    needed = patch("upstream:use", scope="ours")
    patches = PatchSet([part, needed])

    def fails() -> Any:
        raise ImportError("no such layer")

    assert patches.attempt(part, lambda: "built") == "built"
    assert patches.attempt(part, fails) is None
    assert patches.attempt(part, lambda: "built") is None
    assert next((row.state, row.note) for row in patches.report()) == (
        "left out",
        "upstream:build: ImportError: no such layer",
    )
    with pytest.raises(ImportError, match="no such layer"):
        patches.attempt(needed, fails)
