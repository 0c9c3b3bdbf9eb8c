"""Applying and reverting patches, on throw-away modules that stand for upstream."""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from throwaway import VERSION, around, fits_any, other_part, patch
from vllm_dflash.patch import PatchError
from vllm_dflash.patching import PatchSet


def test_a_module_that_is_already_imported_is_patched_at_once(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    patches = PatchSet(
        [patch("upstream:Runner.fits", fits_any), patch("upstream:Part", other_part)]
    )
    patches.apply(VERSION)
    assert module.Runner().fits(99)
    assert module.build() == "ours over part"
    assert [row.state for row in patches.report()] == ["applied", "applied"]


def test_a_module_is_patched_right_after_its_first_import_and_not_imported_for_it(
    upstream: Path,
) -> None:
    patches = PatchSet([patch("upstream:Part", other_part)])
    patches.apply(VERSION)
    assert "upstream" not in sys.modules
    assert [row.state for row in patches.report()] == ["pending"]
    module: Any = importlib.import_module("upstream")
    assert module.build() == "ours over part"
    assert [row.state for row in patches.report()] == ["applied"]
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_applying_twice_does_nothing(upstream: Path) -> None:
    patches = PatchSet(
        [
            patch("upstream:Part", other_part),
            patch("upstream_parts:helper", lambda original: lambda: "ours"),
        ]
    )
    before = len(sys.meta_path)
    patches.apply(VERSION)
    patches.apply(VERSION)
    assert len(sys.meta_path) == before + 1
    module: Any = importlib.import_module("upstream")
    first = module.Part
    patches.apply(VERSION)
    assert module.Part is first
    assert module.build() == "ours over part"


def test_one_bad_patch_stops_all_and_the_error_lists_every_problem(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    patches = PatchSet(
        [
            patch("upstream:Runner.fits", fits_any),
            patch("upstream:Runner.gone", fits_any),
            patch("upstream:Part", other_part, {"upstream_parts:Part": "0" * 16}),
            patch("no_such_module:x", fits_any),
            patch("upstream:build", fits_any, signatures={"upstream:Runner.fits": "self, m"}),
        ]
    )
    with pytest.raises(PatchError) as raised:
        patches.apply(VERSION)
    message = str(raised.value)
    assert "upstream:Runner.gone is not in upstream's source" in message
    assert "upstream_parts:Part, whose source has changed" in message
    assert "0" * 16 in message
    assert "module no_such_module is not installed" in message
    assert (
        "upstream:build: relies on upstream:Runner.fits, whose parameters have changed (self, n;"
        " written against self, m)" in message
    )
    assert not module.Runner().fits(99)
    assert [row.state for row in patches.report()] == ["off"] * 5


def test_a_replacement_that_cannot_be_built_leaves_nothing_behind(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")

    def fails(original: Any) -> Any:
        raise ImportError("no such proposer")

    patches = PatchSet([patch("upstream:Runner.fits", fits_any), patch("upstream:Part", fails)])
    with pytest.raises(ImportError, match="no such proposer"):
        patches.apply(VERSION)
    assert not module.Runner().fits(99)


def test_a_late_failure_takes_the_others_back(upstream: Path) -> None:
    """Half a set is worse than none: a V1 proposer of ours behind vLLM's own fit test would draft
    from holes.

    And whoever imported the module goes on: raised there, our error ended plain serving too.
    """
    parts: Any = importlib.import_module("upstream_parts")

    def fails(original: Any) -> Any:
        raise ImportError("no such proposer")

    failures: list[str] = []
    late = patch("upstream:Runner.fits", fails)
    patches = PatchSet(
        [patch("upstream_parts:helper", lambda original: lambda: "ours"), late], failures.append
    )
    patches.apply(VERSION)
    assert parts.helper() == "ours"
    importlib.import_module("upstream")
    assert parts.helper() == "helper"
    assert [row.state for row in patches.report()] == ["off", "off"]
    assert failures == ["ImportError: no such proposer"]


def test_a_foreign_replacement_found_at_apply_is_named(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    module.Part = type("TheirPart", (), {"__module__": "other_plugin"})
    with pytest.raises(
        PatchError, match=r"expected upstream_parts:Part, but it is other_plugin:TheirPart"
    ):
        PatchSet([patch("upstream:Part", other_part)]).apply(VERSION)


def test_a_foreign_replacement_of_ours_is_named_and_survives_revert(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    patches = PatchSet(
        [patch("upstream:Part", other_part), patch("upstream:Runner.fits", fits_any)]
    )
    patches.apply(VERSION)
    theirs = module.Part = type("TheirPart", (), {"__module__": "other_plugin"})
    with pytest.raises(PatchError, match=r"OtherPart was replaced by other_plugin:TheirPart"):
        patches.apply(VERSION)
    assert patches.revert() == ["upstream:Part"]
    assert module.Part is theirs
    assert not module.Runner().fits(99)


def test_what_another_plug_in_wraps_is_not_put_there_twice(upstream: Path) -> None:
    """After a revert that had to leave ours beneath the other's, ours went around that once more;
    and a wrapper was named by what it wraps, as ours."""
    module: Any = importlib.import_module("upstream")
    patches = PatchSet([patch("upstream:use", around)])
    patches.apply(VERSION)
    ours = module.use
    theirs = eval("lambda: 'theirs ' + ours()", {"ours": ours, "__name__": "other_plugin"})
    module.use = functools.wraps(ours)(theirs)
    assert patches.revert() == ["upstream:use"]
    with pytest.raises(PatchError, match=r"ours? .*was replaced by other_plugin:use"):
        patches.apply(VERSION)
    assert module.use() == "theirs ours around helper"
    module.use = ours
    patches.apply(VERSION)
    assert module.use() == "ours around helper"
    assert patches.revert() == []
    assert module.use() == "helper"


def test_a_revert_goes_on_where_the_import_hook_is_gone(upstream: Path) -> None:
    patches = PatchSet([patch("upstream:Part", other_part)])
    hooks = list(sys.meta_path)
    patches.apply(VERSION)
    sys.meta_path[:] = hooks
    assert patches.revert() == []


def test_revert_restores_the_originals_and_drops_what_is_pending(upstream: Path) -> None:
    parts: Any = importlib.import_module("upstream_parts")
    hooks = list(sys.meta_path)
    patches = PatchSet(
        [
            patch("upstream_parts:helper", lambda original: lambda: "ours"),
            patch("upstream:Part", other_part),
        ]
    )
    patches.apply(VERSION)
    assert patches.revert() == []
    assert parts.helper() == "helper"
    assert sys.meta_path == hooks
    module: Any = importlib.import_module("upstream")
    assert module.build() == "part"
    patches.apply(VERSION)
    assert module.build() == "ours over part"


def test_a_static_method_stays_one(upstream: Path) -> None:
    module: Any = importlib.import_module("upstream")
    patches = PatchSet(
        [
            patch(
                "upstream:Runner.kind",
                lambda original: staticmethod(lambda: "ours over " + original()),
            )
        ]
    )
    patches.apply(VERSION)
    assert module.Runner.kind() == module.Runner().kind() == "ours over upstream"
    patches.revert()
    assert module.Runner().kind() == "upstream"


def test_two_patches_for_one_target_are_refused(upstream: Path) -> None:
    with pytest.raises(PatchError, match="two patches have this target"):
        PatchSet([patch("upstream:Part", other_part), patch("upstream:Part", other_part)]).apply(
            VERSION
        )
