"""Paths that cannot be looked at, read or written end in a refusal that names them, and links in a
folder that a command keeps are not followed.

Each of these ended in a traceback, or wrote over a file outside of the folder.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from damage import as_a_user
from vllm_dflash import files
from vllm_dflash.cli import main
from vllm_dflash.cluster.settings import ClusterError, EngineSettings
from vllm_dflash.engines.process import EngineProcess
from vllm_dflash.evaluation import bench, report
from vllm_dflash.evaluation.methods import UsageError
from vllm_dflash.files import RunError, claim
from vllm_dflash.lock import hold
from vllm_dflash.training.logs import Log

PAIR = Path(__file__).resolve().parents[2] / "examples" / "embedded_pair"
LONG = "a" * 300


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def closed(folder: Path) -> Iterator[str]:
    """A drafter in a folder that this user may not enter."""
    path = folder / "closed"
    shutil.copytree(PAIR / "dflash", path / "drafter")
    path.chmod(0)
    yield "closed/drafter"
    path.chmod(0o700)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["inspect", LONG], 1),
        (["inspect", f"/{LONG}"], 1),
        (["inspect", "~nosuchuser/x"], 1),
        (["convert", f"/{LONG}", "new", "--to", "speculators"], 1),
        (["up", "--target", f"/{LONG}", "--print-config"], 1),
        (["up", "--target", "~nosuchuser/x", "--print-config"], 1),
        (["compat", "--source", LONG], 2),
    ],
)
def test_a_path_that_cannot_be_one(
    command: list[str], status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == status
    said = "".join(capsys.readouterr())
    assert "nosuchuser" in said or LONG in said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["inspect"],
        ["up", "--print-config", "--target"],
        ["up", "--print-config", "--target", str(PAIR / "target"), "--draft"],
        ["convert", "--to", "speculators", "new"],
    ],
)
def test_a_closed_folder(
    command: list[str], closed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] == "convert":
        command = ["convert", closed, "new", "--to", "speculators"]
    else:
        command = [*command, closed]
    with as_a_user():
        assert main(command) == 1
    said = "".join(capsys.readouterr())
    assert f"{closed} cannot be looked at (Permission denied): give this user the right" in said
    assert "--out" not in said


def test_a_closed_target_of_a_batch(closed: str) -> None:
    """The refusal said to set ``--out``, which had nothing to do with it."""
    with as_a_user(), pytest.raises(ClusterError, match="cannot be looked at"):
        EngineSettings(closed)


def test_weights_that_this_user_may_not_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors said that they were not there, and the remedy was to fetch them again."""
    shutil.copytree(PAIR / "dflash", folder / "drafter")
    (folder / "drafter" / "model.safetensors").chmod(0)
    with as_a_user():
        assert main(["inspect", "drafter"]) == 1
    said = capsys.readouterr().out
    assert "model.safetensors cannot be read (Permission denied): give this user" in said
    assert "No such file" not in said


@pytest.mark.parametrize("command", [["inspect"], ["convert", "new", "--to", "speculators"]])
def test_a_folder_whose_names_this_user_may_not_see(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was said to hold no weights."""
    shutil.copytree(PAIR / "dflash", folder / "drafter")
    (folder / "drafter").chmod(0o111)
    with as_a_user():
        assert main([command[0], "drafter", *command[1:]]) == 1
    assert "drafter cannot be looked at (Permission denied)" in "".join(capsys.readouterr())


def make_dangling(folder: Path) -> str:
    (folder / "dst").symlink_to("nowhere")
    return "is there and no folder: give a new folder"


def below_a_file(folder: Path) -> str:
    (folder / "dst").write_text("mine")
    return "a file or a link is where its folder should be): give a new folder"


def read_only(folder: Path) -> str:
    (folder / "dst").mkdir()
    (folder / "dst").chmod(0o555)
    return "dst/new cannot be written (Permission denied): give a new folder"


def too_long(folder: Path) -> str:
    (folder / "dst").mkdir()
    return "cannot be written (File name too long): give a new folder"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_dangling, "dst"),
        (below_a_file, "dst/new"),
        (read_only, "dst/new"),
        (too_long, f"dst/{LONG}"),
    ],
)
def test_where_nothing_can_be_converted_to(
    make: Callable[[Path], str], name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = make(folder)
    with as_a_user():
        assert main(["convert", str(PAIR / "dflash"), name, "--to", "speculators"]) == 1
    assert said in capsys.readouterr().err
    assert not (folder / "nowhere").exists()


def test_what_can_be_converted_to(folder: Path) -> None:
    """A name of 250 characters left no room for the name of its temporary folder; a link to an
    empty folder cannot be removed as a folder is."""
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")
    for name in ("b" * 250, "link"):
        assert main(["convert", str(PAIR / "dflash"), name, "--to", "speculators"]) == 0
        assert (folder / name / "model.safetensors").is_file()
    assert (folder / "link").is_symlink()


def test_a_licence_that_this_user_may_not_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(PAIR / "dflash", folder / "drafter")
    (folder / "drafter" / "LICENSE").write_text("all")
    (folder / "drafter" / "LICENSE").chmod(0)
    (folder / "out").mkdir()
    with as_a_user():
        assert main(["convert", "drafter", "out/new", "--to", "speculators"]) == 1
    assert "LICENSE cannot be read (Permission denied): give this user" in capsys.readouterr().err
    assert list((folder / "out").iterdir()) == []


@pytest.mark.parametrize("out", [LONG, "closed/out", "readonly", "dangling"])
def test_where_no_report_can_be_written(out: str, closed: str, folder: Path) -> None:
    (folder / "readonly").mkdir(mode=0o555)
    (folder / "dangling").symlink_to("nowhere")
    with as_a_user(), pytest.raises(UsageError, match="give a folder that can be"):
        bench._new_folder(Path(out))


def test_what_no_command_has_words_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line's own refusal; an error of no file is a fault of this package's."""
    error = PermissionError(13, "Permission denied", "/a/file")
    monkeypatch.setattr("vllm_dflash.tools.inspect.run", lambda args: (_ for _ in ()).throw(error))
    assert main(["inspect", "x"]) == 2
    assert "/a/file cannot be used (Permission denied): give this" in capsys.readouterr().err
    error.filename = None
    with pytest.raises(PermissionError):
        main(["inspect", "x"])


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside of the folder ``run``; nothing may write it."""
    path = tmp_path / "victim"
    path.write_text("precious")
    (tmp_path / "run").mkdir()
    yield path
    assert path.read_text() == "precious"


def test_a_lock_that_is_a_link(victim: Path) -> None:
    """``train --out RUN`` wrote its lock over what the link led to."""
    run = victim.parent / "run"
    (run / "lock").symlink_to(victim)
    with (
        pytest.raises(RunError, match=r"lock cannot be written \(it is a link\): remove or move"),
        hold(run, "train"),
    ):
        pass
    assert (run / "lock").is_symlink()


def claimed(run: Path) -> Path:
    claim(run, "batch", {"rows": 1})
    return run / "inputs.json"


def put(run: Path) -> Path:
    files.put(run / "results.json", "new")
    return run / "results.json"


def foldered(run: Path) -> Path:
    with files.whole_folder(run / "drafter") as part:
        (part / "config.json").write_text("new")
    return run / "drafter"


def reported(run: Path) -> Path:
    for name in ("results.json", "report.md", "report.html"):
        report.put(run / name, "new")
    return run / "report.md"


def logged(run: Path) -> Path:
    log = Log(run, 0, 9)
    log.write(1, loss=1.0)
    log.close()
    return run / "log.jsonl"


def child(run: Path) -> Path:
    with EngineProcess("this", {}, run / "plain.log") as engine:
        engine.close(at_once=True)
    return run / "plain.log"


NAMES: dict[Callable[[Path], Path], str] = {
    claimed: "inputs.json",
    put: "results.json",
    foldered: "drafter",
    reported: "report.md",
    logged: "log.jsonl",
    child: "plain.log",
}


@pytest.mark.parametrize("write", NAMES)
@pytest.mark.parametrize("suffix", ["", ".part"])
def test_a_link_in_a_files_place(write: Callable[[Path], Path], suffix: str, victim: Path) -> None:
    """``batch`` wrote its record over what ``inputs.json.part`` led to, ``bench`` its engines'
    output over what a log led to."""
    run = victim.parent / "run"
    (run / (NAMES[write] + suffix)).symlink_to(victim)
    if write is claimed and not suffix:
        with pytest.raises(RunError, match="cannot be read"):
            write(run)  # a record is read before it is written
        return
    made = write(run)
    assert not made.is_symlink()
    assert made.exists()


def test_a_folder_that_is_itself_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    with hold(tmp_path / "run", "train"):
        claim(tmp_path / "run", "train", {"rows": 1})
    assert (tmp_path / "disk" / "inputs.json").is_file()
