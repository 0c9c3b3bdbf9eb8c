"""The input of a batch run in parts: every row in one part, in order, with all that it held."""

import json
from pathlib import Path
from typing import Any

import pytest

from damage import DAMAGES, DENIALS, REMEDY, as_a_user
from vllm_dflash.cluster import parts
from vllm_dflash.cluster.batch import STATE, Job, complete
from vllm_dflash.cluster.rows import failed, sampling_of
from vllm_dflash.cluster.settings import ClusterError, EngineSettings
from vllm_dflash.files import RunError
from vllm_dflash.json_text import MOST_LEVELS
from vllm_dflash.prompts import PromptError


def lines(path: Path, *rows: str) -> str:
    path.write_text("".join(rows))
    return str(path)


def all_rows(found: parts.Input) -> list[dict[str, Any]]:
    return [row for part in found.parts for row, problem in parts.read(part) if problem is None]


def test_every_line_once_and_in_order(tmp_path: Path) -> None:
    """Two files, empty lines, other than ASCII, and no line end at the end of a file."""
    first = lines(
        tmp_path / "a.jsonl",
        *(json.dumps({"prompt": f"é{i}", "id": i}, ensure_ascii=False) + "\n\n" for i in range(5)),
    )
    second = lines(tmp_path / "b.jsonl", '{"prompt": "x", "id": 5}\r\n', '{"prompt": "y", "id": 6}')
    found = parts.index([first, second], 2)
    assert [part.rows for part in found.parts] == [2, 2, 1, 2]
    assert [row["id"] for row in all_rows(found)] == list(range(7))
    assert found.rows == 7


def test_a_broken_line_is_a_row_that_says_where_it_is(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", '{"prompt": "x"}\n', "\n", '{"prompt": \n', "[1]\n")
    (part,) = parts.index([path], 8).parts
    rows = list(parts.read(part))
    assert rows[0] == ({"prompt": "x"}, None)
    assert rows[1][0] == {"line": '{"prompt": '}
    assert rows[1][1].startswith("line 3 is no JSON")
    assert rows[2] == ({"line": "[1]"}, 'line 4 is no object: give one such as {"prompt": "..."}')


def test_output_is_read_back_and_holds_the_input(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", '{"prompt": "x", "tags": [1, "two"]}\n', "broken\n")
    (part,) = parts.index([path], 8).parts
    parts.write(
        part, tmp_path, [row | failed(problem or "no") for row, problem in parts.read(part)]
    )
    assert part.name == "part-000000.jsonl"
    assert [row["error"][:6] for row in parts.read_output(part, tmp_path)] == ["no", "line 2"]
    assert parts.read_output(part, tmp_path)[0]["tags"] == [1, "two"]


def test_parquet_keeps_types_over_parts_and_row_groups(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    table = pa.table(
        {
            "prompt": [f"p{i}" for i in range(10)],
            "score": pa.array([None] * 9 + [1.5], pa.float32()),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    found = parts.index([str(tmp_path / "a.parquet")], 3)
    assert [part.rows for part in found.parts] == [3, 3, 3, 1]
    assert [row["prompt"] for row in all_rows(found)] == [f"p{i}" for i in range(10)]
    for part in found.parts:
        parts.write(part, tmp_path, [row | failed("no") for row, _ in parts.read(part)])
    schemas = [parquet.read_schema(tmp_path / part.name) for part in found.parts]
    assert all(schema == schemas[0] for schema in schemas)
    assert schemas[0].field("score").type == pa.float32()
    assert schemas[0].names[-8:] == list(parts.RESULT_FIELDS)


def test_another_input_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = parts.index([lines(path, '{"prompt": "x"}\n')], 8).fingerprint
    assert parts.index([str(path)], 8).fingerprint == first
    assert parts.index([lines(path, '{"prompt": "y"}\n')], 8).fingerprint != first


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([["a 1st", "def f(x):", "z last"]], [["a 1st", "def h(q):", "z last"]]),
        ([["a", "b", "c", "z"]], [["a", "c", "b", "z"]]),
        ([["a", "b"], ["y", "z"]], [["a", "b"], ["z", "y"]]),
    ],
)
def test_an_edited_parquet_file_has_another_fingerprint(
    tmp_path: Path, before: list[list[str]], after: list[list[str]]
) -> None:
    """Its fingerprint was the footer's statistics and the file's size: with the same least and
    greatest prompt the answers to the old prompts stayed, beside those to the new ones."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    path, found = tmp_path / "a.parquet", []
    for columns in (before, before, after):
        named = {f"column {i}": column for i, column in enumerate(columns)}
        parquet.write_table(pa.table(named), path)
        found.append((parts.index([str(path)], 8).fingerprint, path.stat().st_size))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] == found[2][1]


def test_statistics_of_parquet_are_not_read(tmp_path: Path) -> None:
    """Dates past Python's year 9999 ended index in an OverflowError, nanoseconds without pandas in
    a ValueError, text that is no UTF-8 in a UnicodeDecodeError."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    for kind, values in (
        (pa.date32(), pa.array([2**30, 1], pa.int32())),
        (pa.timestamp("us"), pa.array([2**62, 1])),
        (pa.timestamp("ns"), pa.array([1, 2])),
        (pa.string(), pa.array([b"\xff", b"a"])),
    ):
        table = pa.table({"prompt": ["a", "b"], "other": values.view(kind)})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert parts.index([str(tmp_path / "a.parquet")], 8).rows == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jsonl", "b.parquet"], "give files that all end in .jsonl or all in .parquet"),
        (["a.csv"], "give files that all end in .jsonl or all in .parquet"),
        (["missing.jsonl"], "missing.jsonl cannot be read"),
        (["empty.jsonl"], "no rows"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(ClusterError, match=message):
        parts.index(names, 8)


def test_an_input_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", '{"prompt": "x"}\n', '{"prompt": "y"}\n')
    (part,) = parts.index([path], 8).parts
    lines(tmp_path / "a.jsonl", '{"prompt": "x"}\n')
    with pytest.raises(ClusterError, match="has become shorter"):
        list(parts.read(part))


DEEP = '{"prompt": "x", "note": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "x", "note": "\\ud83d"}', None),
        ('{"\\udc00": 1, "prompt": "x"}', None),
        ('{"prompt": "x", "note": ' + "1" * 5000 + "}", "is no JSON"),
        (DEEP, "is no JSON"),
        *(
            (
                '{"prompt": "x", "note": ' + "[" * depth + "]" * depth + "}",
                None if depth < MOST_LEVELS else "is no JSON (it is nested more than 200 levels",
            )
            for depth in (100, MOST_LEVELS - 1, MOST_LEVELS, *range(250, 1100, 50), 982)
        ),
        ('{"prompt": "x", "prompt": "y"}', 'it gives the key "prompt" twice'),
        ('{"prompt": "x", "note": NaN}', "which JSON cannot hold"),
        ('{"prompt": "x", "note": [{"a": -Infinity}]}', "line 2 holds NaN, Infinity or a number"),
        ('{"prompt": "x", "other": 1e999}', "give null or text in its place"),
        ('{"prompt": "\\u0000"}', None),
    ],
)
def test_a_row_that_is_hard_to_write_costs_itself_alone(
    tmp_path: Path, line: str, problem: str | None
) -> None:
    """Half of a surrogate pair once ended the job in ``encode``, and deep nesting in a
    RecursionError, and the next run again. NaN was written back, which is no JSON.

    Whether a depth is taken does not depend on the stack: each is answered and written as it came,
    or is a row with an error.
    """
    path = lines(tmp_path / "in.jsonl", '{"prompt": "a"}\n', line + "\n", '{"prompt": "b"}\n')
    (part,) = parts.index([path], 8).parts
    parts.write(
        part, tmp_path, [row | failed(problem or "unanswered") for row, problem in parts.read(part)]
    )
    out = parts.read_output(part, tmp_path)
    assert [row["error"] for row in (out[0], out[2])] == ["unanswered"] * 2
    assert (problem or "unanswered") in out[1]["error"]
    if out[1]["error"] == "unanswered":
        assert str(json.loads(line)) == str(
            {name: value for name, value in out[1].items() if name in json.loads(line)}
        )
    else:
        assert out[1]["line"] == line


@pytest.mark.parametrize("own", [0, 5, "", [], False])
def test_sampling_parameters_that_are_no_object(own: Any) -> None:
    """0, "", [] and false were taken for none."""
    with pytest.raises(PromptError, match=r"sampling_params is .*: give an object such as"):
        sampling_of({"sampling_params": own}, {"max_tokens": 4})


def test_sampling_parameters_over_the_runs() -> None:
    defaults = {"max_tokens": 4, "seed": 1}
    for none in ({}, {"sampling_params": None}, {"sampling_params": {}}):
        assert sampling_of(none, defaults) == defaults
    own = {"sampling_params": {"max_tokens": 8, "top_p": None}}
    assert sampling_of(own, defaults) == {"max_tokens": 8, "seed": 1}


def test_a_parquet_row_that_is_hard_to_read_costs_itself_alone(tmp_path: Path) -> None:
    """Text that is no UTF-8, and a time that Python has no date for."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    prompts = pa.array([b"a", b"\xff", b"c", b"d"], pa.binary()).view(pa.string())
    times = pa.array([0, 0, 2**60, 0], pa.timestamp("ms"))
    parquet.write_table(pa.table({"prompt": prompts, "time": times}), tmp_path / "a.parquet")
    (part,) = parts.index([str(tmp_path / "a.parquet")], 8).parts
    rows = list(parts.read(part))
    assert [problem is None for _, problem in rows] == [True, False, False, True]
    assert rows[1][1].startswith("row 2: prompt cannot be read")
    assert rows[2][1].startswith("row 3: time cannot be read")
    parts.write(part, tmp_path, [row | failed(problem or "no") for row, problem in rows])
    assert [row["error"][:5] for row in parts.read_output(part, tmp_path)] == [
        "no",
        "row 2",
        "row 3",
        "no",
    ]
    assert parquet.read_table(tmp_path / part.name).column("prompt").to_pylist() == [
        "a",
        None,
        "c",
        "d",
    ]


@pytest.mark.parametrize("name", ["bool8", "list of uuid", "struct of json", "prompt", "x"])
def test_parquet_columns_that_cannot_be_written_back(tmp_path: Path, name: str) -> None:
    """They ended the run when the first part was written, its rows answered."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    prompts = pa.array(["a", "b"])
    if name in ("prompt", "x"):
        table = pa.table([prompts] * 3, names=["prompt", name, name][-3:])
        words = f"has '{name}' for two columns: give each its own name"
    else:
        of = pa.ExtensionArray.from_storage
        column = {
            "bool8": lambda: of(pa.bool8(), pa.array([1, 0], pa.int8())),
            "list of uuid": lambda: pa.ListArray.from_arrays(
                [0, 1, 2], of(pa.uuid(), pa.array([b"0" * 16] * 2, pa.binary(16)))
            ),
            "struct of json": lambda: pa.StructArray.from_arrays(
                [of(pa.json_(), pa.array(["1", "2"]))], names=["x"]
            ),
        }[name]()
        table = pa.table({"prompt": prompts, "other": column})
        words = "column 'other' of type .* cannot be written beside the answers"
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ClusterError, match=words):
        parts.index([str(tmp_path / "a.parquet")], 8)


def test_times_that_python_has_not(tmp_path: Path) -> None:
    """Their nanoseconds were lost in the output without a word."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    times = pa.array([[1]], pa.list_(pa.time64("ns")))
    parquet.write_table(pa.table({"prompt": ["a"], "at": times}), tmp_path / "a.parquet")
    with pytest.raises(ClusterError, match="column 'at' has times of a day in nanoseconds"):
        parts.index([str(tmp_path / "a.parquet")], 8)


def test_a_bad_row_of_a_parquet_column_without_nulls(tmp_path: Path) -> None:
    """It is null in the output, which the column's field did not allow: the run ended there."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with vllm-dflash[ray]")
    schema = pa.schema([pa.field("prompt", pa.string(), nullable=False)])
    prompts = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table([prompts], schema=schema), tmp_path / "a.parquet")
    (part,) = parts.index([str(tmp_path / "a.parquet")], 8).parts
    parts.write(
        part, tmp_path, [row | failed(problem or "no") for row, problem in parts.read(part)]
    )
    assert [row["error"][:5] for row in parts.read_output(part, tmp_path)] == ["no", "row 2"]
    assert parquet.read_table(tmp_path / part.name)["prompt"].to_pylist() == ["a", None]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts(tmp_path: Path, suffix: str, damage: str) -> None:
    """Whatever becomes of an output file, it is taken or named, with what to do."""
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="pyarrow comes with vllm-dflash[ray]")
        pytest.importorskip("pyarrow.parquet").write_table(
            pa.table({"prompt": ["a", "b"]}), tmp_path / "in.parquet"
        )
    else:
        lines(tmp_path / "in.jsonl", '{"prompt": "a"}\n', '{"prompt": "b"}\n')
    (part,) = parts.index([str(tmp_path / f"in{suffix}")], 8).parts
    parts.write(part, tmp_path, [row | failed("no") for row, _ in parts.read(part)])
    if not DAMAGES[damage](tmp_path / part.name):
        return
    said = ""
    try:
        with as_a_user():
            assert len(parts.read_output(part, tmp_path)) == 2
    except ClusterError as error:
        said = str(error)
    assert not said or (
        str(tmp_path / part.name) in said and "remove it, and its rows are answered again" in said
    )


@pytest.fixture
def finished(tmp_path: Path) -> Job:
    """A batch run whose rows are all answered, so that no engine is needed to go on with it."""
    job = Job(
        [lines(tmp_path / "in.jsonl", '{"prompt": "a"}\n', '{"prompt": "b"}\n')],
        tmp_path / "out",
        EngineSettings("t"),
    )
    (part,) = parts.index(job.inputs, job.rows_per_part).parts
    job.out.mkdir()
    parts.write(part, job.out, [row | failed("no") for row, _ in parts.read(part)])
    assert go_on(job) is None
    return job


def go_on(job: Job) -> str | None:
    """The refusal; None where all rows are found answered."""
    try:
        with as_a_user():
            assert complete(job)["failed"] == 2
    except (ClusterError, RunError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["inputs.json", "summary.json", "lock"])
def test_damaged_state(finished: Job, name: str, damage: str) -> None:
    """A run goes on, or says which file and what to do. The lock is there after a kill."""
    path = finished.out / STATE / name
    if name == "lock":
        path.write_text('{"command": "vllm-dflash batch", "pid": 1, "host": "h", "since": "now"}\n')
    DAMAGES[damage](path)
    said = go_on(finished)
    assert said is None or (str(path) in said and REMEDY.search(said)), said


@pytest.mark.parametrize("denial", DENIALS)
@pytest.mark.parametrize("name", [".", STATE])
def test_a_folder_without_permission(finished: Job, name: str, denial: str) -> None:
    folder = finished.out / name
    folder.chmod(DENIALS[denial])
    try:
        said = go_on(finished)
    finally:
        folder.chmod(0o755)
    assert said is None or (str(finished.out) in said and REMEDY.search(said)), said
    assert said is not None or denial in ("no listing", "no writing")
