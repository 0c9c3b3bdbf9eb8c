"""What `make compat` and `make compat-test` do before vLLM is looked at: fetching a release's
Python, and laying it over the kernels."""

import subprocess
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.version import Version

from compat import overlay, wheel

VERSIONS = "vllm (9.1.0)\nAvailable versions: 9.1.0, 9.0.1, 8.2.0\n  INSTALLED: 8.2.0+cpu\n"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip was asked for; its answers are made up."""
    calls: list[str] = []

    def pip(arguments: list[str], **options: object) -> SimpleNamespace:
        calls.append(arguments[0])
        if arguments[0] == "download":
            with zipfile.ZipFile(
                Path(arguments[arguments.index("--dest") + 1])
                / "vllm-9.1.0-cp38-abi3-linux_x86_64.whl",
                "w",
            ) as archive:
                for name in (
                    "vllm/__init__.py",
                    "vllm/v1/core.py",
                    "vllm/_C.abi3.so",
                    "vllm-9.1.0.dist-info/METADATA",
                ):
                    archive.writestr(name, "")
        return SimpleNamespace(stdout=VERSIONS, stderr="", returncode=0)

    monkeypatch.setattr(wheel, "_pip", pip)
    monkeypatch.setattr(wheel, "CACHE", tmp_path)
    return calls


def test_the_newest_release_in_a_range_is_found(asked: list[str]) -> None:
    assert [str(wheel.newest(versions)) for versions in ("", "<9.1", ">=8,<9")] == [
        "9.1.0",
        "9.0.1",
        "8.2.0",
    ]
    with pytest.raises(SystemExit, match=r"the index has no vLLM >=10"):
        wheel.newest(">=10")


def test_a_wheel_is_unpacked_once_and_without_its_kernels(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "vllm-9.1.0.part").mkdir()  # a run that was stopped
    folder = wheel.fetch(Version("9.1.0"))
    assert sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    ) == ["vllm-9.1.0.dist-info/METADATA", "vllm/__init__.py", "vllm/v1/core.py"]
    assert wheel.fetch(Version("9.1.0")) == folder
    assert asked == ["download"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vllm-9.1.0", "wheels"]
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_damaged_wheel_is_fetched_anew(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed, pip took it for downloaded, and every run ended in a traceback."""
    whole = wheel._pip

    def half(arguments: list[str], **options: object) -> SimpleNamespace:
        done = whole(arguments, **options)
        for path in (tmp_path / "wheels").iterdir():
            path.write_bytes(path.read_bytes()[:200])
        return done

    with monkeypatch.context() as patched:
        patched.setattr(wheel, "_pip", half)
        with pytest.raises(SystemExit, match=r"vLLM 9.1.0 is damaged .* run this again"):
            wheel.fetch(Version("9.1.0"))
    assert wheel.fetch(Version("9.1.0")).is_dir()


def test_without_a_cpu_build_the_overlay_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(overlay, "version", version)
    with pytest.raises(SystemExit, match="run `make install`"):
        overlay.make(tmp_path / "vllm-9.1.0")


@pytest.mark.slow
def test_the_overlay_has_one_release_over_the_kernels_of_another(tmp_path: Path) -> None:
    """Child processes see it too, and all other packages, ours included."""
    source = tmp_path / "vllm-9.1.0"
    (source / "vllm").mkdir(parents=True)
    (source / "vllm" / "__init__.py").write_text("HERE = 9\n")
    python = overlay.make(source)
    code = (
        "import vllm, vllm_dflash, torch, importlib.metadata as m, pathlib, subprocess, sys\nassert"
        " vllm.HERE == 9 and m.version('vllm') == '9.1.0+cpu', (vllm, m.version('vllm'))\nassert"
        " any(p.name == 'dflash' for p in m.entry_points(group='vllm.general_plugins'))\nkernels ="
        " list(pathlib.Path(vllm.__file__).parent.glob('*.so'))\nassert kernels and"
        " all(k.resolve().is_file() and k.is_symlink() for k in kernels), kernels\nassert"
        " subprocess.run([sys.executable, '-c', 'import vllm; vllm.HERE']).returncode == 0\n"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = python.parents[1].stat().st_mtime_ns
    assert overlay.make(source) == python
    assert python.parents[1].stat().st_mtime_ns == made
    # Half there, Python found the installed vLLM instead, and its tests passed in this one's name.
    (found,) = python.parents[1].glob("lib/python*/site-packages/vllm/__init__.py")
    found.unlink()
    assert overlay.make(source) == python
    assert found.read_text() == "HERE = 9\n"
