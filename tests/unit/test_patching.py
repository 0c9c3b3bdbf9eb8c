"""Patching, on throw-away modules that stand for upstream."""

import ast
import functools
import gc
import importlib
import re
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from releases import OLDEST
from vllm_dflash.patch import Patch, PatchError
from vllm_dflash.patching import PatchSet
from vllm_dflash.upstream import Definition, SourceNotFoundError, Sources

VERSION = f"{OLDEST}.0"
UPSTREAM = """
    from upstream_parts import Part, helper as aliased

    def build():
        "docstring"
        return Part().name()

    class Runner:
        def load(self):
            self.part = Part()

        def fits(self, n):
            # a comment
            return n < 10

        @staticmethod
        def kind():
            return "upstream"

    def use():
        return aliased()
"""
PARTS = """
    class Part:
        def name(self):
            return "part"

    def helper():
        return "helper"
"""


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two modules on the path, not imported yet; forgotten afterwards."""
    for name, text in (("upstream", UPSTREAM), ("upstream_parts", PARTS)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    hooks = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = hooks
    for name in ("upstream", "upstream_parts"):
        sys.modules.pop(name, None)


def patch(
    target: str, replace: Callable[..., Any] | None = None, fingerprints: Any = (), **fields: Any
) -> Patch:
    return Patch(
        target=target,
        replace=replace,
        fingerprints=dict(fingerprints),
        why="why",
        until="until",
        **fields,
    )


def fits_any(original: Any) -> Any:
    return lambda self, n: True


def other_part(original: type) -> type:
    return type("OtherPart", (original,), {"name": lambda self: "ours over " + original.name(self)})


@pytest.mark.parametrize(
    "text",
    [
        "if True:\n    def helper(): return 'other'\nelse:\n    def helper(): return 'helper'\n",
        "try:\n    def helper(): return 'other'\nexcept E:\n    def helper(): return 'helper'\n",
        "def helper(): return 'helper'\nhelper = wrapper(helper)\n",
        "def helper(): return 'helper'\nwith context:\n    def helper(): return 'other'\n",
        "def helper(): return 'helper'\ndel helper\n",
    ],
    ids=["if", "try", "bound anew", "with", "deleted"],
)
def test_whatever_else_binds_a_name_is_in_its_fingerprint(upstream: Path, text: str) -> None:
    """The last definition stood for the name, also where another one runs."""
    known = Sources().locate("upstream_parts:helper").fingerprint
    (upstream / "upstream_parts.py").write_text(text)
    assert Sources().locate("upstream_parts:helper").fingerprint != known


def test_a_decorator_of_the_class_is_in_its_methods_fingerprints(upstream: Path) -> None:
    known = Sources().locate("upstream:Runner.fits").fingerprint
    text = (upstream / "upstream.py").read_text()
    (upstream / "upstream.py").write_text(text.replace("class Runner", "@register\nclass Runner"))
    assert Sources().locate("upstream:Runner.fits").fingerprint != known


def test_a_name_that_is_looked_up_in_another_module_is_told(upstream: Path) -> None:
    """The function has moved, and its old module only hands it on: the replacement there would be
    read by nobody."""
    record = patch("upstream:aliased", looked_up={"upstream:use": ("aliased",)})
    assert record.missing(Sources()) == []
    (upstream / "moved.py").write_text((upstream / "upstream.py").read_text())
    (upstream / "upstream.py").write_text("from moved import *")
    assert "it is looked up in moved" in " ".join(record.missing(Sources()))


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


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"# -*- coding: latin-1 -*-\n# \xe9\n", None),
        (b"# \xe9\n", "cannot be read by this Python"),
        (b"def (:\n", "cannot be read by this Python"),
    ],
)
def test_a_source_that_is_not_utf_8_is_read_or_named(
    upstream: Path, head: bytes, said: str | None
) -> None:
    """It ended `vllm-dflash status` and `compat` in a UnicodeDecodeError."""
    file = upstream / "upstream.py"
    file.write_bytes(head + file.read_bytes())
    problems = PatchSet([patch("upstream:Runner.fits", fits_any)]).check(VERSION)
    assert [said in problem for problem in problems] == ([True] if said else []), problems


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


def around(original: Callable[..., Any], text: str = "ours") -> Callable[..., Any]:
    return functools.wraps(original)(lambda *args: f"{text} around {original(*args)}")


def of_runner(**fields: Any) -> Patch:
    return patch("upstream:Runner.fits", around, scope="instance", **fields)


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


def test_several_fingerprints_and_a_body_that_may_change(upstream: Path) -> None:
    now = Sources().locate("upstream:Runner.fits").fingerprint
    known = patch(
        "upstream:Runner.fits", fits_any, {"upstream:Runner.fits": {"0.32": now, "0.33": "f" * 16}}
    )
    around_it = patch(
        "upstream:Runner.fits", fits_any, signatures={"upstream:Runner.fits": "self, ..."}
    )
    assert PatchSet([known]).check(VERSION) == PatchSet([around_it]).check(VERSION) == []
    file = upstream / "upstream.py"
    file.write_text(file.read_text().replace("n < 10", "n < 11"))
    assert len(PatchSet([known]).check(VERSION)) == 1
    assert PatchSet([around_it]).check(VERSION) == []
    file.write_text(file.read_text().replace("def fits(self, n)", "def fits(n, self)"))
    assert len(PatchSet([around_it]).check(VERSION)) == 1


def test_a_switch_leaves_one_out(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_FIX", "0")
    patches = PatchSet([patch("upstream:Part", other_part, switch="UPSTREAM_FIX")])
    patches.apply(VERSION)
    assert [(row.state, row.note) for row in patches.report()] == [
        ("switched off", "UPSTREAM_FIX=0")
    ]


def test_signatures() -> None:
    text = (
        "def f(self, a, /, b, c=1, *rest, d, e=2, **more): ...\ndef g(self, *, d): ...\ndef"
        " h(): ..."
    )
    found = [
        Definition("m", "f", node).signature
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert found == ["self, a, /, b, c=, *rest, d, e=, **more", "self, *, d", ""]


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.32.0+cpu", True),
        ("0.32.7", True),
        ("0.33.0", False),
        ("0.33.0rc1", False),
        ("0.31.9", False),
        ("dev", False),
        (None, False),
    ],
)
def test_a_local_version_counts_as_its_release(
    upstream: Path, version: str | None, fits: bool
) -> None:
    patches = PatchSet([patch("upstream:Part", other_part)], versions=">=0.32,<0.33")
    assert (patches.check(version) == []) is fits


def test_names_are_followed_through_imports(upstream: Path) -> None:
    sources = Sources()
    assert (
        sources.locate("upstream:aliased").module,
        sources.locate("upstream:aliased").qualname,
    ) == ("upstream_parts", "helper")
    assert (
        sources.locate("upstream:Part.name").fingerprint
        == sources.locate("upstream_parts:Part.name").fingerprint
    )
    with pytest.raises(SourceNotFoundError, match=r"upstream_parts:Part\.gone is not in"):
        sources.locate("upstream:Part.gone")


def test_a_fingerprint_sees_code_and_not_comments_docstrings_or_lines(upstream: Path) -> None:
    before = {
        name: Sources().locate(f"upstream:{name}").fingerprint
        for name in ("build", "Runner", "Runner.fits")
    }
    file = upstream / "upstream.py"
    file.write_text(
        "\n\n# moved\n"
        + file.read_text().replace('"docstring"', '"other"').replace("# a comment", "# another")
    )
    assert {name: Sources().locate(f"upstream:{name}").fingerprint for name in before} == before
    file.write_text(file.read_text().replace("n < 10", "n < 11"))
    assert Sources().locate("upstream:build").fingerprint == before["build"]
    assert Sources().locate("upstream:Runner.fits").fingerprint != before["Runner.fits"]
    assert Sources().locate("upstream:Runner").fingerprint != before["Runner"]


NAMES = """
    from dataclasses import dataclass

    @dataclass
    class Settings:
        limit: int = 0

    class Engine:
        def __init__(self):
            self.part: Settings = Settings()
            self.used = self.part.limit

        def past(self):
            from upstream_names import Settings
            return Settings()
"""


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"names": ("upstream_names:Settings", "upstream_names:Settings.limit")}, None),
        ({"names": ("upstream_names:Engine.used",)}, None),
        ({"names": ("upstream_names:Settings.most",)}, "Settings.most, which is gone"),
        ({"names": ("upstream_names:Gone",)}, "Gone is not in upstream_names's source"),
        ({"looked_up": {"upstream_names:Engine.__init__": ("Settings", "limit")}}, None),
        (
            {"looked_up": {"upstream_names:Engine.past": ("Settings",)}},
            "Engine.past does not look Settings up any more",
        ),
        (
            {"looked_up": {"upstream_names:Engine.__init__": ("most",)}},
            "Engine.__init__ does not look most up any more",
        ),
    ],
)
def test_a_name_that_is_gone_or_that_nobody_looks_up_is_a_problem(
    upstream: Path, fields: dict[str, Any], problem: str | None
) -> None:
    """A getattr with a default, or a setattr, says nothing of it; and a replacement that a local
    import passes by is never called."""
    (upstream / "upstream_names.py").write_text(textwrap.dedent(NAMES))
    _, problems = patch("upstream:build", switch="SWITCH", **fields).examine(Sources())
    assert len(problems) == (problem is not None)
    if problem is not None:
        assert problem in problems[0]
        assert "set SWITCH=0 to go on without this part" in problems[0]


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
