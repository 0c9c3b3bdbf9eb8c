"""What is kept of a look at upstream's source: found again as it was, and looked at anew where
anything of it is another."""

import ast
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from throwaway import fits_any, other_part, patch
from vllm_dflash import examined
from vllm_dflash.examined import Finding, cache_folder, findings
from vllm_dflash.patch import Patch
from vllm_dflash.upstream import Sources

MISSING = "relies on upstream_late:late, but module upstream_late is not installed"


def records() -> list[Patch]:
    """One that fits, one that is not needed, one whose source has changed, one of an object, and
    one that relies on a module that is not there."""
    known = Sources().locate("upstream:Runner.fits").fingerprint
    return [
        patch("upstream:Runner.fits", fits_any, {"upstream:Runner.fits": known}),
        patch("upstream:Part", other_part, unneeded=lambda sources: "not here"),
        patch("upstream:build", fits_any, {"upstream:build": "0" * 16}, needs="optional"),
        patch("upstream:Runner.part", fits_any, scope="instance"),
        patch("upstream:use", fits_any, names=("upstream_late:late",), needs="optional"),
    ]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each text that was parsed."""
    lines: list[str] = []
    parse: Callable[..., Any] = ast.parse

    def told(text: str, *args: Any, **more: Any) -> Any:
        lines.append(text)
        return parse(text, *args, **more)

    monkeypatch.setattr("vllm_dflash.upstream.ast.parse", told)
    return lines


def test_what_was_found_is_found_again_without_a_look(
    upstream: Path, tmp_path: Path, parsed: list[str]
) -> None:
    asked, folder = records(), tmp_path / "cache"
    first = findings(asked, folder)
    assert first == findings(asked, None)
    assert first[0] == Finding(None, [], ("upstream", "Runner.fits"))
    assert first[1] == Finding("not here", [], ("upstream_parts", "Part"))
    assert "whose source has changed" in first[2].problems[0]
    assert first[3] == Finding(None, [], None)
    assert MISSING in first[4].problems[0]
    parsed.clear()
    assert findings(asked, folder) == first
    assert parsed == []


@pytest.mark.parametrize("what", ["a byte", "a record", "this Python", "found elsewhere", "late"])
def test_where_anything_is_another_all_is_looked_at_anew(
    upstream: Path, tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    asked, folder, file = records(), tmp_path / "cache", upstream / "upstream.py"
    first, written = findings(asked, folder), os.stat(file)
    if what == "a byte":  # as long as before, and as old
        file.write_text(file.read_text().replace("n < 10", "n < 11"))
        os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    elif what == "a record":
        asked[0] = patch("upstream:Runner.fits", fits_any, {"upstream:Runner.fits": "1" * 16})
    elif what == "this Python":
        monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    elif what == "found elsewhere":
        other = tmp_path / "other"
        other.mkdir()
        (other / "upstream.py").write_text(file.read_text().replace("n < 10", "n < 11"))
        monkeypatch.syspath_prepend(other)
    else:
        (upstream / "upstream_late.py").write_text("late = 1\n")
    parsed.clear()
    found = findings(asked, folder)
    assert parsed
    assert found == findings(asked, None)
    assert (found == first) == (what == "this Python")


@pytest.mark.parametrize("damage", ["{", "[]", '{"ours": 1}', ""])
def test_a_damaged_file_is_written_anew(upstream: Path, tmp_path: Path, damage: str) -> None:
    asked, folder = records(), tmp_path / "cache"
    first = findings(asked, folder)
    (file,) = folder.rglob("*.json")
    kept = file.read_text()
    file.write_text(damage)
    assert findings(asked, folder) == first
    assert json.loads(file.read_text()) == json.loads(kept)


def test_where_nothing_can_be_kept_each_process_looks(upstream: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = records()
    assert findings(asked, tmp_path / "file") == findings(asked, None)


def test_the_records_of_two_places_do_not_replace_each_other(
    upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited vLLM before the installed one, and the installed one, take turns."""
    findings(records(), tmp_path / "cache")
    monkeypatch.setattr(examined, "_place", lambda: "elsewhere")
    findings(records(), tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2


def test_the_folder_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/vllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/vllm")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")
