"""The wheel: every folder with code is in it, and the entry points lead somewhere."""

import importlib
import tomllib
import zipfile
from pathlib import Path

from vllm_dflash.install_cpu import own_requirements, write_name_wheel

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    """setuptools leaves out a folder that is not listed, and only a user of the wheel would notice."""
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vllm_dflash").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"vllm_dflash.patches"}


def test_entry_points_lead_to_functions():
    project = PROJECT["project"]
    for target in [*project["scripts"].values(), *project["entry-points"]["vllm.general_plugins"].values()]:
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_package_alone_pulls_neither_torch_nor_vllm():
    assert not [line for line in own_requirements(["test", "dev", "cpu"]) if line.startswith(("torch", "vllm", "transformers", "nvidia"))]


def test_the_name_wheel_holds_metadata_only(tmp_path):
    """vLLM asks for the version of a distribution 'vllm', and takes its CPU platform from the '+cpu' in it."""
    path = write_name_wheel(tmp_path, "0.32.0")
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"vllm-0.32.0+cpu.dist-info"}
        assert "Version: 0.32.0+cpu\n" in archive.read("vllm-0.32.0+cpu.dist-info/METADATA").decode()
