"""What is read of upstream's source before anything is patched: fingerprints, signatures, names."""

import ast
import textwrap
from pathlib import Path
from typing import Any

import pytest

from throwaway import VERSION, fits_any, other_part, patch
from vllm_dflash.patching import PatchSet
from vllm_dflash.upstream import Definition, SourceNotFoundError, Sources


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
