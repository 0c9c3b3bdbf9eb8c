"""`vllm-dflash compat`: two throw-away vLLMs side by side, and this package's own imports."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vllm_dflash.tools.compat as compat
from releases import OLDEST
from vllm_dflash.cli import main
from vllm_dflash.patch import Patch
from vllm_dflash.tools.imported import imported_names
from vllm_dflash.upstream import SourceNotFoundError, Sources

INIT = """
import typing
from . import envs
if typing.TYPE_CHECKING:
    from vllm.llm import LLM
else:
    def __getattr__(name): ...
"""
OLD = {
    "__init__.py": INIT,
    "_version.py": f"__version__ = version = '{OLDEST}.0'\n",
    "envs.py": "HOME = '/'\n",
    "llm.py": "class LLM:\n    def chat(self): return 1\n",
    "ops.py": "def norm(x): return x\ndef rope(x): return x\n",
    "parts.py": (
        "from vllm.star import *\nLIMIT: int = 4\ntry:\n    from vllm.ops import rope\nexcept"
        " ImportError:\n    rope = None\n"
    ),
    "star.py": "def shared(): return 'old'\n",
    "runner.py": (
        "class Runner:\n    @property\n    def size(self):\n        return 1\n\n    def"
        " other(self):\n        return 2\n\ndef build(kind):\n    return Runner()\n"
    ),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write(tmp_path / "old", OLD)


def newer(tmp_path: Path, version: str = f"{OLDEST}.9", **changes: str) -> Path:
    files = OLD | {"_version.py": f"__version__ = version = '{version}'\n"}
    return write(tmp_path / "new", files | {f"{name}.py": text for name, text in changes.items()})


def patch(old: Path, *names: str, target: str = "vllm.runner:build", **changes: Any) -> Patch:
    """A patch that relies on ``names`` as they are in the old source."""
    prints = {name: Sources(old).locate(name).fingerprint for name in names}
    fields: dict[str, Any] = dict(
        target=target, fingerprints=prints, why="", until="", replace=patch
    )
    return Patch(**fields | changes)


def states(patches: list[Patch], new: Path, old: Path) -> list[str]:
    found = compat.check_patches(patches, compat.release_in(new), compat.release_in(old))
    return [finding.state for finding in found]


def test_a_patch_is_the_same_changed_or_gone(tmp_path: Path, old: Path) -> None:
    moved = "# a comment\n" + OLD["runner.py"].replace(
        "class Runner:", 'class Runner:\n    """Runs."""\n'
    )
    patches = [
        patch(old, "vllm.runner:Runner.size"),
        patch(old, "vllm.runner:Runner.other"),
        patch(old, target="vllm.runner:build"),
    ]
    assert states(patches, newer(tmp_path, runner=moved), old) == ["same", "same", "same"]
    assert states(patches, newer(tmp_path, runner=moved.replace("return 1", "return 7")), old) == [
        "changed",
        "same",
        "same",
    ]
    assert states(
        patches, newer(tmp_path, runner=moved.replace("def other", "def another")), old
    ) == ["same", "gone", "same"]
    assert (
        states(patches, newer(tmp_path, runner=moved.replace("def build", "def make")), old)
        == ["gone"] * 3
    )


def test_only_the_definitions_that_changed_are_shown(tmp_path: Path, old: Path) -> None:
    new = newer(
        tmp_path,
        runner=OLD["runner.py"]
        .replace("return 1", "return 7")
        .replace("return Runner()", "return None"),
    )
    found = compat.check_patches(
        [patch(old, "vllm.runner:Runner.size")], compat.release_in(new), compat.release_in(old)
    )
    assert found[0].names[1].diff.splitlines() == [
        f"--- {OLDEST}.0  vllm.runner:Runner.size",
        f"+++ {OLDEST}.9  vllm.runner:Runner.size",
        "@@ -1,3 +1,3 @@",
        "     @property",
        "     def size(self):",
        "-        return 1",
        "+        return 7",
    ]


def test_a_patch_that_a_release_does_not_need_asks_for_nothing(tmp_path: Path, old: Path) -> None:
    patches = [
        patch(
            old,
            unneeded=lambda sources: (
                "mended" if "7" in sources.text(sources.find("vllm.runner:Runner")) else None
            ),
        )
    ]
    new = newer(tmp_path, runner=OLD["runner.py"].replace("return 1", "return 7"))
    assert states(patches, new, old) == ["not needed"]
    assert states(patches, newer(tmp_path), old) == ["same"]


def test_a_release_outside_of_the_supported_range_asks_for_work(tmp_path: Path) -> None:
    release = compat.release_in(newer(tmp_path, version="9.0.0"))
    assert "vLLM 9.0.0 is not in" in "".join(compat.to_do(release, [], []))


def test_a_difference_that_the_patch_knows_asks_for_nothing(tmp_path: Path, old: Path) -> None:
    """A body of which another fingerprint is on record, and one that something is only run before
    or after."""
    new = newer(
        tmp_path,
        runner=OLD["runner.py"].replace("return 1", "return 7").replace("return 2", "return 8"),
    )
    prints = {
        str(root): Sources(root).locate("vllm.runner:Runner.size").fingerprint
        for root in (old, new)
    }
    both = {"vllm.runner:Runner.size": prints}
    patches = [
        patch(old, fingerprints=both),
        patch(old, signatures={"vllm.runner:Runner.other": "self, ..."}),
    ]
    patches.append(patch(old, signatures={"vllm.runner:Runner.other": "self, kind"}))
    assert states(patches, new, old) == ["known", "known", "changed"]
    found = compat.check_patches(patches[:2], compat.release_in(new), compat.release_in(old))
    assert list(compat.to_do(compat.release_in(new), found, [])) == []


def test_imported_names_of_every_sort_are_found(old: Path) -> None:
    names = [
        "vllm:LLM",
        "vllm:envs",
        "vllm.parts:shared",
        "vllm.parts:LIMIT",
        "vllm.parts:rope",
        "vllm:envs.HOME",
    ]
    found = [Sources(old).find(name) for name in names]
    assert [(d.module, d.qualname) for d in found] == [
        ("vllm.llm", "LLM"),
        ("vllm.envs", ""),
        ("vllm.star", "shared"),
        ("vllm.parts", "LIMIT"),
        ("vllm.ops", "rope"),
        ("vllm.envs", "HOME"),
    ]
    for name in ("vllm:gone", "vllm.gone:name", "vllm.runner:Runner.gone"):
        with pytest.raises(SourceNotFoundError):
            Sources(old).find(name)
    with pytest.raises(SourceNotFoundError, match="neither a class nor a function"):
        Sources(old).locate("vllm.parts:LIMIT")


def test_source_that_this_python_cannot_read_is_reported(old: Path) -> None:
    write(old, {"runner.py": "def build(:\n"})
    with pytest.raises(SourceNotFoundError, match=r"vllm\.runner.*line 1"):
        Sources(old).find("vllm.runner:build")


def test_what_we_import_is_read_from_syntax_trees(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text(
        "from vllm import ops as native, LLM\nimport vllm.parts\nfrom vllm_other import thing\nfrom"
        " . import vllm\ndef f():\n    from vllm.runner import Runner\n    return"
        " native.norm(Runner), LLM.chat, vllm.parts.LIMIT\n"
    )
    assert imported_names("vllm", [package]) == {
        name: {"package/code.py"}
        for name in (
            "vllm.parts:",
            "vllm.parts:LIMIT",
            "vllm.runner:Runner",
            "vllm:LLM",
            "vllm:LLM.chat",
            "vllm:ops",
            "vllm:ops.norm",
        )
    }


def test_imported_names_are_the_same_changed_or_gone(tmp_path: Path, old: Path) -> None:
    """Of a module the names that are used count; what a class inherits cannot be told from its text
    and is left out."""
    names = {
        f"vllm:{name}": ["a.py"]
        for name in ("ops", "ops.norm", "ops.rope", "LLM", "LLM.chat", "LLM.inherited")
    }
    changed = {
        "ops": "def rope(x): return -x\n",
        "llm": "class LLM:\n    def chat(self): return 2\n",
    }
    found = compat.check_names(
        names, compat.release_in(newer(tmp_path, **changed)), compat.release_in(old)
    )
    assert {finding.name: finding.state for finding in found} == {
        "vllm:ops.norm": "gone",
        "vllm:ops.rope": "changed",
        "vllm:LLM": "changed",
    }
    assert list(compat.to_do(compat.release_in(old), [], found)) == [
        "a.py: vllm:ops.norm is gone: find what took its place"
    ]


def test_the_command_ends_with_1_where_something_is_to_do(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "ALL", (patch(old, "vllm.runner:Runner.size"),))
    monkeypatch.setattr(compat, "imported_names", lambda package: {"vllm:LLM": {"a.py"}})
    assert main(["compat", "--source", str(newer(tmp_path)), "--against", str(old)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    new = newer(
        tmp_path, runner=OLD["runner.py"].replace("return 1", "return 7"), llm="class LLM: ...\n"
    )
    assert main(["compat", "--source", str(new), "--against", str(old)]) == 1
    out = capsys.readouterr().out
    assert "1 changed" in out
    assert "+        return 7" in out
    assert f"accept {Sources(new).locate('vllm.runner:Runner.size').fingerprint}" in out
    assert main(["compat", "--source", str(new), "--against", str(old), "--no-diffs"]) == 1
    out = capsys.readouterr().out
    assert "  changed    vllm:LLM  (a.py)" in out
    assert not [line for line in out.splitlines() if line.startswith(("+", "-", "@@"))]
    assert main(["compat", "--source", str(tmp_path)]) == 2
    assert "give the folder that holds vllm/" in capsys.readouterr().err


def test_without_an_installed_vllm_names_are_still_looked_for(old: Path) -> None:
    found = compat.check_names(
        {"vllm:LLM": ["a.py"], "vllm:Gone": ["a.py"], "vllm:LLM.inherited": ["a.py"]},
        compat.release_in(old),
        None,
    )
    assert {finding.name: finding.state for finding in found} == {
        "vllm:LLM": "same",
        "vllm:Gone": "gone",
    }


@pytest.mark.slow
def test_the_installed_vllm_has_what_we_rely_on() -> None:
    """In a process of its own: neither vLLM nor torch is imported for it."""
    code = (
        "import importlib.util, pathlib, sys; from vllm_dflash.cli import main\n"
        "folder = pathlib.Path(importlib.util.find_spec('vllm').origin).parents[1]\n"
        "status = main(['compat', '--source', str(folder)])\n"
        "assert not {'torch', 'vllm'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "nothing to do" in done.stdout


def test_parameters_and_attributes_are_read_from_source(old: Path) -> None:
    code = (
        "class Engine:\n    limit: int\n    def start(self, a, /, b=1, *more, c, d=2, **rest):\n   "
        "     self.on = True\n"
    )
    sources = Sources(write(old, {"engine.py": code}))
    assert (
        sources.locate("vllm.engine:Engine.start").signature
        == "self, a, /, b=, *more, c, d=, **rest"
    )
    has = [
        sources.has_attribute(f"vllm.engine:Engine.{name}")
        for name in ("start", "limit", "on", "off")
    ]
    assert has == [True, True, True, False]
