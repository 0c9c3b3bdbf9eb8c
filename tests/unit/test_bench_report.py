"""From runs to files: ratios only where their baseline ran, failures named, and an HTML file that
fetches nothing."""

import builtins
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from damage import DENIALS, as_a_user
from vllm_dflash.evaluation.bench import Bench, UnwritableError
from vllm_dflash.evaluation.html import page as write_page
from vllm_dflash.evaluation.methods import Drafter, parse_methods
from vllm_dflash.evaluation.report import as_markdown, short_lines, write
from vllm_dflash.evaluation.summary import BEST_FIXED, BEST_SCHEDULE, rows
from vllm_dflash.evaluation.sweep import Record

METHODS = "plain,dflash:3,dflash:7,adaptive,native:7,suffix"
SPEED = {"plain": 100.0, "dflash:3": 180.0, "dflash:7": 150.0, "adaptive": 171.0, "native:7": 120.0}
EXTERNAL = re.compile(
    r"""(src|href|action|data)\s*=\s*["'](?!\#)|url\((?!\#)|@import|"""
    r"<script|<link|<iframe|<!ENTITY",
    re.IGNORECASE,
)


def make_record(names, concurrency=(1, 8)):
    """Two repeats, the second on a machine half as fast."""
    record = Record()
    for repeat, slowness in ((1, 1.0), (2, 2.0)):
        for point in range(2 * len(concurrency)):
            for name in names:
                run = {
                    "repeat": repeat,
                    "point": point,
                    "method": name,
                    "tokens_per_second": SPEED[name] / slowness,
                    "step_ms": 5.0 * slowness,
                    "early_tokens_per_second": SPEED[name] / slowness,
                    "requests": 16,
                    "ttft_p50_ms": 9.0,
                    "ttft_p95_ms": 12.0,
                    "tpot_p50_ms": 2.0,
                    "tpot_p95_ms": 3.0,
                    "memory_mib": 900.0,
                    "committed_per_request_step": 1.0,
                    "steps": 90,
                    "verified": 0,
                    "wasted": 0,
                    "drafts": 0,
                    "accepted": 0,
                    "reached": [],
                    "accepted_at": [],
                    "agrees_with_vllm": True,
                    "preemptions": 0,
                    "differing_from_own_first": 0,
                }
                if name != "plain":
                    run |= {
                        "drafts": 10,
                        "verified": 30,
                        "accepted": 15,
                        "wasted": 15,
                        "reached": [10, 8, 5],
                        "accepted_at": [8, 5, 2],
                    }
                    run["differing_from_plain"] = 3 if name == "native:7" else 0
                record.runs.append(run)
    return record


def make_results(names=tuple(SPEED), methods=METHODS, dtype="float32"):
    parsed = parse_methods(methods, {"one": Drafter("/one", 7)})
    record = make_record(names)
    points = [
        {
            "prompt_set": "held<out",
            "prompt_tokens": None,
            "temperature": t,
            "concurrency": c,
            "num_prompts": 16,
        }
        for t in (0, 1)
        for c in (1, 8)
    ]
    reason = "arctic-inference is not installed: pip install arctic-inference==0.1.1"
    return {
        "complete": True,
        "repeats_done": 2,
        "began": "2026-01-01T00:00:00+00:00",
        "seconds": 61.0,
        "command": ["vllm-dflash", "bench", "--out", "a b"],
        "versions": {"vllm": "0.32.0"},
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64"},
        "settings": {"target": "T", "dtype": dtype, "repeats": 2},
        "methods": [
            {
                "name": m.name,
                "what": "w",
                "state": "ran" if m.name in names else "did not run",
                "reason": None if m.name in names else reason,
                "engine": {"device": "CPU", "threads": 2},
            }
            for m in parsed
        ],
        "points": points,
        "rows": rows(record, len(points), parsed),
        "runs": record.runs,
    }


@pytest.mark.slow
def test_a_load_in_phases_against_the_best_schedule():
    """The schedule takes of each phase the method with the least median seconds: 1 s of dflash:7
    and 2 s of plain, for 30 tokens."""
    seconds = {"plain": (4.0, 2.0), "dflash:7": (1.0, 6.0), "adaptive": (1.1, 2.2)}
    record, parsed = Record(), parse_methods("plain,dflash:7,adaptive", {"one": Drafter("/one", 7)})
    for run in make_record(list(seconds)).runs:
        if run["point"] == 0:
            slowness = run["repeat"]
            phases = [
                {
                    "concurrency": c,
                    "seconds": slowness * s,
                    "tokens": t,
                    "drafts": 10 * (run["method"] != "plain"),
                    "accepted": 5 * i,
                }
                for i, (c, s, t) in enumerate(
                    zip((1, 32), seconds[run["method"]], (10, 20), strict=True)
                )
            ]
            record.runs.append(
                run
                | {
                    "phases": phases,
                    "tokens_per_second": 30 / slowness / sum(seconds[run["method"]]),
                }
            )
    found = {row["method"]: row for row in rows(record, 1, parsed)}
    against = found["adaptive"]["against"]
    assert against[BEST_SCHEDULE]["tokens_per_second"]["median"] == pytest.approx(3 / 3.3)
    assert against[BEST_FIXED]["method"] == "plain"
    assert [
        (p["concurrency"], p["seconds"]["median"], p["tau"]) for p in found["adaptive"]["phases"]
    ] == [(1, 1.1 * 1.5, 1.0), (32, 2.2 * 1.5, 1.5)]
    results = make_results() | {
        "rows": list(found.values()),
        "points": [make_results()["points"][0] | {"swing": [1, 32]}],
    }
    text = as_markdown(results)
    assert "| adaptive | 1.65 (1.10–2.20), 1.00 | 3.30 (2.20–4.40), 1.50 |" in text
    assert "x best schedule" in text
    assert "in phases: 1, 32" in text
    assert not EXTERNAL.search(write_page(results))


def row(results, method, point=0):
    return next(row for row in results["rows"] if (row["method"], row["point"]) == (method, point))


def test_ratios_are_paired():
    """Throughputs spread by a factor of two, their ratios not at all."""
    found = row(make_results(), "dflash:3")
    assert found["tokens_per_second"] == {"median": 135.0, "low": 90.0, "high": 180.0}
    assert found["against"]["plain"]["tokens_per_second"] == {
        "median": 1.8,
        "low": 1.8,
        "high": 1.8,
    }
    assert found["against"]["native:7"]["tokens_per_second"]["median"] == 1.5
    assert found["against"]["native:7"]["step_ms"]["median"] == 1.0
    assert found["tau"] == 2.5
    assert found["acceptance"] == [0.8, 0.625, 0.4]


def test_adaptive_against_the_best_fixed_choice():
    best = row(make_results(), "adaptive")["against"][BEST_FIXED]
    assert best["method"] == "dflash:3"
    assert best["tokens_per_second"]["median"] == pytest.approx(0.95)
    assert BEST_FIXED not in row(make_results(), "dflash:7")["against"]
    assert BEST_FIXED not in row(make_results(("plain", "adaptive")), "adaptive")["against"], (
        "no fixed K ran"
    )


def test_no_ratio_without_its_baseline():
    results = make_results(("dflash:3", "adaptive"))
    assert row(results, "dflash:3")["against"] == {}
    assert "x plain" not in as_markdown(results)


def test_markdown():
    text = as_markdown(make_results())
    assert "| 1 | dflash:3 | 135.0 (90.0–180.0) | 1.80 | 1.80 | 1.50 | 1.00 |" in text
    assert "arctic-inference is not installed" in text
    assert "NO: 3 of 16 differ" in text
    assert "'a b'" in text
    widths = {
        line.count("|")
        for line in text.split("## held<out, temperature 0")[1].split("\n\n")[1].splitlines()
    }
    assert len(widths) == 1


@pytest.mark.slow
def test_an_overview_by_prompt_set():
    """tau by prompt set, and where a method was the slowest, were to be gathered from all
    tables."""
    results = make_results()
    worst = row(results, "adaptive", point=3)["against"]["plain"]["tokens_per_second"]
    worst.update(median=0.96, low=0.96)
    text = as_markdown(results)
    [title, _, header, _, *lines] = text.split("## Methods")[1].split("## ")[1].splitlines()
    assert title == "tau; x plain: 1 at a time"
    assert header == (
        "| method | held<out, temperature 0 | held<out, temperature 1 | least x plain anywhere |"
    )
    assert "| plain | – | – | – |" in lines
    assert (
        "| dflash:3 | 2.50; 1.80 | 2.50; 1.80 | 1.80: held<out, temperature 0, 1 at a time |"
        in (lines)
    )
    assert (
        "| adaptive | 2.50; 1.71 | 2.50; 1.71 | 0.96: held<out, temperature 1, 8 at a time |"
        in (lines)
    )
    assert "<h2>tau; x plain: 1 at a time</h2>" in write_page(results)
    results["points"] = results["points"][:2]
    results["rows"] = [each for each in results["rows"] if each["point"] < 2]
    assert "at a time\n\n| method" not in as_markdown(results), "one table says it all"


def test_bfloat16_outputs_are_counted_not_judged():
    text = as_markdown(make_results(dtype="bfloat16"))
    assert "| 3 of 16 differ |" in text
    assert "NO:" not in text


def test_what_spoils_figures_is_said():
    results = make_results()
    row(results, "dflash:7")["agrees_with_vllm"] = False
    row(results, "dflash:7")["preemptions"] = 4
    row(results, "plain")["differing_from_own_first"] = 2
    row(results, "plain")["repeats"] = 1
    text = as_markdown(results)
    for words in (
        "own counters differ",
        "4 preemptions",
        "2 outputs differ from those of its own first repeat",
        "1 of 2 repeats, then it ended",
    ):
        assert words in text
    results["complete"], results["repeats_done"] = False, 1
    assert "NOT COMPLETE: 1 of 2 repeats" in as_markdown(results)


@pytest.mark.slow
def test_files(tmp_path):
    """The HTML stands alone: nothing in it is fetched, its SVGs are well formed, and text from
    outside is escaped."""
    pytest.importorskip("matplotlib")
    results = make_results()
    write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    page = (tmp_path / "report.html").read_text()
    assert EXTERNAL.search(page) is None
    assert "held&lt;out" in page
    assert "held<out" not in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 2, "one for each temperature"
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert "dflash:3" in svg
        assert set(re.findall(r"https?://[^\"']+", svg)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.md",
        "results.json",
    ]


def test_a_report_of_nothing(tmp_path):
    results = make_results(())
    write(results, tmp_path)
    assert "did not run" in (tmp_path / "report.html").read_text()
    assert any("arctic-inference" in line for line in short_lines(results))


def test_without_matplotlib(tmp_path, monkeypatch):
    imported = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "vllm_dflash.evaluation.plots", raising=False)
    monkeypatch.delattr("vllm_dflash.evaluation.plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    write(make_results(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "pip install &#x27;vllm-dflash[bench]&#x27;" in page
    assert "<svg" not in page
    assert "dflash:3" in page


def test_lines_for_the_terminal():
    lines = short_lines(make_results())
    assert any(
        re.fullmatch(r"\s+1  dflash:3\s+135\.0\s+2\.50\s+7\.50  1\.80", line) for line in lines
    )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One that has nothing to report yet."""
    found = Bench.__new__(Bench)
    found._out = tmp_path
    monkeypatch.setattr(Bench, "results", lambda self: {})
    monkeypatch.setattr("vllm_dflash.evaluation.report.as_markdown", lambda results: "")
    monkeypatch.setattr("vllm_dflash.evaluation.report.page", lambda results: "")
    return found


@pytest.mark.parametrize("denial", [denial for denial in DENIALS if denial != "no listing"])
def test_a_folder_without_permission(bench: Bench, denial: str) -> None:
    bench._out.chmod(DENIALS[denial])
    try:
        with (
            as_a_user(),
            pytest.raises(UnwritableError, match=r"Permission denied.*give another --out"),
        ):
            bench.write()
    finally:
        bench._out.chmod(0o755)


@pytest.mark.parametrize("name", ["results.json", "report.md", "report.html"])
def test_a_report_that_cannot_be_written(tmp_path: Path, bench: Bench, name: str) -> None:
    """A folder in a file's place: named, with what to do. A full disk is the same kind of error."""
    (tmp_path / name).mkdir()
    with pytest.raises(
        UnwritableError, match=rf"{name}.*free some space, remove what is in its place"
    ):
        bench.write()
