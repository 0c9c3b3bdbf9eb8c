"""The profile of steps: what is fitted to measurements, and what is kept on the disk."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simulation import large_gpu, profile_of, two_cores
from simulation_async import h200
from vllm_dflash import profiles
from vllm_dflash.cost_profile import Cell, Profile, fit, line, lowest
from vllm_dflash.profiles import find, keep, key_of, leave_threads, this_cpu
from vllm_dflash.steps import Work


@pytest.fixture(autouse=True)
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_kept", {})


@pytest.mark.parametrize("cost", [two_cores, large_gpu])
@pytest.mark.parametrize("rows", [1, 5, 7, 30, 100, 200, 400])
def test_steps_between_the_measured_ones(cost: Any, rows: int) -> None:
    profile = profile_of(cost, 7)
    for work in (Work(1, rows, 0), Work(1, rows, 8 * rows)):
        assert profile.of(work) == pytest.approx(cost(work), rel=0.04)


def test_more_rows_than_were_measured() -> None:
    """The last octave's line goes on."""
    profile = profile_of(large_gpu, 7, most_reqs=32)
    for rows in (512, 2048):
        assert profile.of(Work(1, rows, 0)) == pytest.approx(large_gpu(Work(1, rows, 0)), rel=0.05)


@pytest.mark.parametrize(
    ("num_reqs", "context"), [(1, 1 << 10), (1, 1 << 17), (32, 1 << 12), (8, 1 << 15)]
)
@pytest.mark.parametrize("verified", [0, 7, 15])
def test_contexts_on_a_gpu(num_reqs: int, context: int, verified: int) -> None:
    """Also of many requests, of which one alone was measured at a long context."""
    profile = profile_of(h200, 15, contexts=[1 << 14, 1 << 17])
    rows, positions = num_reqs * (1 + verified), num_reqs * context
    plain = Work(num_reqs, rows, 0, positions, rows * context)
    draft = Work(num_reqs, rows, 16 * num_reqs, positions, rows * context, 16 * positions)
    for work in (plain, draft):
        assert profile.of(work) == pytest.approx(h200(work), rel=0.07)


def test_rows_may_be_an_array() -> None:
    profile = line((1.0, 0.5), (0.25, 0.125), attend=2.0)
    rows = np.array([1.0, 3.0])
    found = profile.target_seconds(rows, 0.0, rows).tolist()
    assert found == pytest.approx([1 + 0.5 + 2, 1 + 1.5 + 6])
    assert profile.draft_seconds(8, 0.0) == pytest.approx(1.25)


def test_noise_takes_no_row_away() -> None:
    """A step with more rows that was measured shorter is taken for as long, and of three
    measurements of one the lowest counts."""
    seconds = {1: (2.0, 1.0, 9.0), 2: (0.8, 5.0, 5.0), 4: (3.0, 2.0, 4.0)}
    cells = [Cell(Work(1, rows, 0), each) for rows, times in seconds.items() for each in times]
    profile = fit([*cells, Cell(Work(1, 0, 8), 1.0)])
    assert [profile.of(Work(1, rows, 0)) for rows in (1, 2, 4)] == pytest.approx([1.0, 1.0, 2.0])


def test_nothing_takes_less_than_no_time() -> None:
    """Contexts that were measured faster than none cost nothing, and give nothing back."""
    cells = [
        Cell(Work(1, 1, 0), 1.0),
        Cell(Work(1, 8, 0), 1.0),
        Cell(Work(1, 1, 0, 100, 100), 0.5),
        Cell(Work(1, 0, 8), 1.0),
        Cell(Work(1, 0, 8, 100, 0, 800), 0.9),
    ]
    profile = fit(cells)
    assert (profile.read, profile.attend, profile.draft_attend) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("cells", [[Cell(Work(1, 1, 0), 1.0)], [Cell(Work(1, 0, 8), 1.0)], []])
def test_half_a_profile_is_none(cells: list[Cell]) -> None:
    with pytest.raises(ValueError, match="no target steps, or no drafts"):
        fit(cells)


KEY = '{"device": "a"}'
PROFILE = line((1.0, 0.5), (0.25, 0.125), read=1e-6, attend=1e-7, draft_attend=1e-8)


def test_a_second_start_reads_what_the_first_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(tmp_path, KEY) is None
    for profile in (PROFILE, replace(PROFILE, is_steady=False)):
        keep(tmp_path, KEY, profile)
        monkeypatch.setattr(profiles, "_kept", {})
        assert find(tmp_path, KEY) == profile
    assert find(tmp_path, '{"device": "b"}') is None


def test_where_nothing_can_be_written_it_holds_for_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file", KEY, PROFILE)
    assert "VLLM_CACHE_ROOT" in caplog.text
    assert find(tmp_path / "file", KEY) == PROFILE


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"target"', '"targets"'),
        lambda text: text.replace("0.25", '"a"'),
        lambda text: text.replace('"a"', '"another"').replace(r"\"a\"", r"\"b\""),
        lambda text: text.replace("1048576.0", "0.0"),
        lambda text: text.replace("1.0,", "0.0,").replace("0.25", "0.0"),
        lambda text: "[" * 100000,
        lambda text: text.replace("1.0,", "1e9,"),
        lambda text: text.replace("0.25", "-0.25"),
        lambda text: text.replace("1e-07", "-1e-07"),
    ],
    ids=[
        "cut",
        "a field gone",
        "no number",
        "another's",
        "rows",
        "no time",
        "deep",
        "more rows for less",
        "a draft below zero",
        "a context below zero",
    ],
)
def test_a_damaged_file_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    keep(tmp_path, KEY, PROFILE)
    (file,) = tmp_path.rglob("*.json")
    changed = damage(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    monkeypatch.setattr(profiles, "_kept", {})
    assert find(tmp_path, KEY) is None
    keep(tmp_path, KEY, PROFILE)
    assert find(tmp_path, KEY) == PROFILE


def config(**changed: Any) -> Any:
    def model(name: str, hidden_size: int = 64) -> Any:
        return SimpleNamespace(
            model=name,
            revision=None,
            dtype="float32",
            quantization=None,
            max_model_len=2048,
            enforce_eager=True,
            hf_text_config=SimpleNamespace(hidden_size=hidden_size, _private=3, rope=None),
        )

    given = {
        "model_config": model("target"),
        "speculative_config": SimpleNamespace(
            draft_model_config=model("drafter"), num_speculative_tokens=7
        ),
        "cache_config": SimpleNamespace(cache_dtype="auto", block_size=16),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1),
        "scheduler_config": SimpleNamespace(max_num_seqs=32, max_num_batched_tokens=2048),
        "use_v2_model_runner": False,
    }
    return SimpleNamespace(**given | changed)


def test_a_profile_holds_for_its_models_runner_device_and_version() -> None:
    keys = {
        key_of(config(), "0.32", "a"),
        key_of(config(), "0.33", "a"),
        key_of(config(), "0.32", "b"),
        key_of(config(model_config=config().speculative_config.draft_model_config), "0.32", "a"),
        key_of(config(parallel_config=SimpleNamespace(tensor_parallel_size=2)), "0.32", "a"),
        key_of(config(use_v2_model_runner=True), "0.32", "a"),
    }
    assert len(keys) == 6
    assert key_of(config(), "0.32", "a") in keys
    assert this_cpu({}) != this_cpu({"OMP_NUM_THREADS": "1"})
    assert isinstance(PROFILE, Profile)


def test_a_worker_describes_the_processor_as_the_process_that_started_it() -> None:
    """vLLM gives it another OMP_NUM_THREADS; the scheduler would not find what it measures."""
    parent: dict[str, str] = {}
    leave_threads(parent)
    worker = parent | {"OMP_NUM_THREADS": "1"}
    leave_threads(worker)
    assert this_cpu(parent) == this_cpu(worker) == this_cpu({})
    other = {"OMP_NUM_THREADS": "1"}
    leave_threads(other)
    assert this_cpu(other) != this_cpu(parent)


def test_a_folder_that_holds_another_model_has_another_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for folder, size in (("a", 64), ("b", 64), ("a", 128)):
        (tmp_path / folder / "drafter").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        given = config()
        given.speculative_config.draft_model_config.hf_text_config.hidden_size = size
        found.append(key_of(given, "0.32", "a"))
    assert len(set(found)) == 3


WORKS = [Work(1, rows, 0) for rows in (1, 2, 4, 8)]


def seconds_of(rounds: list[Any]) -> np.ndarray:
    return np.array([cell.seconds for cell in lowest(WORKS, rounds)[0]])


def test_a_slow_round_counts_as_the_others_and_what_was_held_up_does_not() -> None:
    true = np.array([3e-3, 5e-3, 8e-3, 21e-3])
    rounds = [true, 1.6 * true, 0.9 * true, true * [1, 40, 1, 1], true * [1, 1, 1, 9]]
    found = seconds_of(rounds)
    assert found / found[0] * true[0] == pytest.approx(true, rel=1e-9)
    assert found == pytest.approx(0.9 * true), "at the pace of the fastest"
    assert seconds_of(rounds[:1]) == pytest.approx(true)
    held_up = [true * [1, 1, 1, 7], true]
    assert seconds_of(held_up) == pytest.approx(true), "of two the lower"


def test_what_held_a_step_up_only_adds() -> None:
    """Also where most measurements of each step were held up. Whether steps took as long twice."""
    true = np.array([3e-3, 5e-3, 8e-3, 21e-3])
    rounds = [1.6 * true, true * [1, 40, 9, 1], true * [30, 1, 7, 2], true * [1, 40, 1, 9]]
    assert seconds_of(rounds) == pytest.approx(true)
    assert not lowest(WORKS, rounds)[1], "but one took as long twice"
    assert lowest(WORKS, [*rounds, 1.05 * true])[1]
    assert not lowest(WORKS, rounds[:1])[1]
    assert seconds_of([true * [9, 1, 1, 1]]) == pytest.approx([5e-3, *true[1:]])
