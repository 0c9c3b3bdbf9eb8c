"""What is published: the wheel has every folder with code, the source distribution all of the
checkout, and the README no dead link."""

import importlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from vllm_dflash.cli import main
from vllm_dflash.install_cpu import installed_requirements, own_requirements, write_name_wheel

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    """setuptools leaves out a folder that is not listed, and only a user of the wheel would
    notice."""
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "vllm_dflash").rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"vllm_dflash.patches"}


def test_entry_points_lead_to_functions():
    project = PROJECT["project"]
    for target in [
        *project["scripts"].values(),
        *project["entry-points"]["vllm.general_plugins"].values(),
    ]:
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_package_alone_pulls_neither_torch_nor_vllm():
    assert not [
        line
        for line in own_requirements(["test", "dev"])
        if line.startswith(("torch", "vllm", "transformers", "nvidia"))
    ]


def test_the_name_wheel_holds_metadata_only(tmp_path):
    """vLLM asks for the version of a distribution 'vllm', and takes its CPU platform from the
    '+cpu' in it."""
    path = write_name_wheel(tmp_path, "0.32.0")
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"vllm-0.32.0+cpu.dist-info"}
        assert (
            "Version: 0.32.0+cpu\n" in archive.read("vllm-0.32.0+cpu.dist-info/METADATA").decode()
        )


def build(kind: str, source: Path, into: Path) -> Path:
    """Builds a ``wheel`` or an ``sdist`` as pip would, and returns its path."""
    code = (
        "import sys; from setuptools import build_meta; print('\\n' +"
        f" build_meta.build_{kind}(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of the checkout, unpacked: building writes into the
    source."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    by_name = shutil.ignore_patterns(*ignored, ".git")

    def ignore(parent: str, names: list[str]) -> set[str]:
        return by_name(parent, names) | {
            name for name in names if str(Path(parent, name).relative_to(ROOT)) in ignored
        }

    shutil.copytree(ROOT, folder / "checkout", ignore=ignore, symlinks=True)
    # tarfile's own filters are missing in Python 3.11 before 3.11.4; the archive is ours.
    shutil.unpack_archive(build("sdist", folder / "checkout", folder), folder / "unpacked")
    return next((folder / "unpacked").iterdir())


@pytest.mark.slow
def test_the_source_distribution_has_all_of_the_checkout(sdist: Path) -> None:
    """It had no changelog, tests, documents, examples nor Makefile: nobody could have run a test
    from it."""
    checkout = sdist.parents[1] / "checkout"
    here = {
        str(path.relative_to(checkout))
        for path in checkout.rglob("*")
        if path.is_file() and ".egg-info" not in str(path)
    }
    there = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert here - there == set()
    assert {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "tests/conftest.py",
        "docs/log.md",
        "examples/demo.py",
    } <= there


@pytest.mark.slow
def test_a_wheel_comes_out_of_the_source_distribution(sdist: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", sdist, tmp_path)) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_dflash").rglob("*.py")}
    assert modules | {"vllm_dflash/py.typed", "vllm_dflash/patches/v1_proposer.py"} <= names
    assert "Keywords: vllm" in metadata
    assert "Project-URL: DFlash (paper), https://arxiv.org/abs/" in metadata
    assert "Provides-Extra: cpu" in metadata
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata) == []


def test_links_of_the_readme_become_text_on_a_package_index() -> None:
    description = runpy.run_path(str(ROOT / "setup.py"))["description"]
    assert (
        description(
            "[docs/log.md](docs/log.md), [here](#a), [paper](https://x.org/a),"
            " [examples/](examples)"
        )
        == "docs/log.md, [here](#a), [paper](https://x.org/a), examples/ (examples)"
    )


def test_the_cpu_build_is_installed_from_a_wheel_too() -> None:
    """install_cpu.py read pyproject.toml of the checkout, which is not in a wheel: there it ended
    with a traceback."""
    lines = [
        "tqdm",
        'rich>=13; python_version > "3"',
        'ruff==1; extra == "dev"',
        "ray; sys_platform == 'linux' and extra == 'ray'",
    ]
    assert installed_requirements(lines, []) == lines[:2]
    assert installed_requirements(lines, ["dev", "ray"]) == [
        *lines[:2],
        "ruff==1",
        "ray; sys_platform == 'linux'",
    ]


def test_status_says_how_to_get_a_vllm_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra `cpu` was empty: it installed nothing, and said nothing.

    No extra can install vLLM's CPU build. This one brings what the command for that needs.
    """
    monkeypatch.setattr("vllm_dflash.cli.status.installed_vllm", lambda: None)
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'vllm-dflash[cuda]'" in out
    # The patches were said not to fit a vLLM "None".
    assert "plug-in      off: vLLM is not installed" in out
    assert "fit" not in out.partition("\n\n")[0]
    assert "None" not in out
    assert "none is applied or was checked here" in out
    both_steps = "[cpu]' && python -m vllm_dflash.install_cpu"
    assert both_steps in out
    assert both_steps in (ROOT / "README.md").read_text()
    assert {"pip", "transformers"} <= set(PROJECT["project"]["optional-dependencies"]["cpu"])


_WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "vllm", "transformers", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from vllm_dflash.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "D"],
        ["convert", "D", "E", "--to", "speculators"],
        ["doctor", "--target", "T", "--draft", "D"],
        ["train", "--target", "T", "--prompts", "P", "--out", "O"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_needs_torch_says_how_to_get_it(tmp_path: Path, command: list[str]) -> None:
    """With the wheel alone inspect, convert and doctor ended in a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "which is not installed here; it comes with vLLM:\n" in done.stderr
    assert "  for a GPU: pip install 'vllm-dflash[cuda]'\n" in done.stderr


def test_the_extra_cpu_brings_no_build_that_the_second_step_would_have_to_undo() -> None:
    needs = PROJECT["project"]["optional-dependencies"]["cpu"]
    assert not [line for line in needs if line.startswith(("torch", "vllm", "nvidia"))]


def test_project_urls_are_addresses_that_the_documents_name() -> None:
    """Without a public address of its own the project names the papers of its two kinds."""
    kinds = (ROOT / "docs" / "kinds.md").read_text()
    for address in PROJECT["project"]["urls"].values():
        assert address.removeprefix("https://arxiv.org/abs/") in kinds


def recipe(target: str) -> list[str]:
    """The lines of a target of the Makefile."""
    _, _, rest = (ROOT / "Makefile").read_text().partition(f"\n{target}:")
    return [line for line in rest.partition("\n\n")[0].splitlines() if line.startswith("\t")]


def test_a_wheel_is_not_packed_from_what_was_built_before() -> None:
    """A module that had been deleted since the last `make wheel` was in the next one: setuptools
    packs all of build/lib."""
    assert recipe("wheel")[0].startswith("\t@rm -rf build ")


def test_clean_removes_all_that_is_built() -> None:
    """It left the site. gpu-results/ holds measurements, which nothing makes again."""
    [line] = recipe("clean")
    kept = {"__pycache__", "node_modules", "examples/embedded_pair/run", "gpu-results"}
    ignored = {each.rstrip("/") for each in (ROOT / ".gitignore").read_text().split()}
    removed = line.replace("$(VENV)", ".venv").split()
    assert sorted(ignored - kept - set(removed)) == []
