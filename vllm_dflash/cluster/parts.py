"""The input of a batch run cut into parts, each of which becomes one output file, whole or not
there: that is all there is to resuming.

JSON lines are handled as text until a row is answered, so rows may have any fields. Limits: files,
which all nodes see under the same path; a part is held in memory (``rows_per_part`` rows). Parquet
takes pyarrow, which comes with Ray.

    pytest tests/unit/test_cluster_parts.py
"""

import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash.cluster.settings import ClusterError
from vllm_dflash.files import whole_file
from vllm_dflash.json_text import loads
from vllm_dflash.progress import Progress
from vllm_dflash.records import AtLeast, misfit
from vllm_dflash.regular import check_input

FORMATS = (".jsonl", ".parquet")
_BLOCK = 1 << 22
"""Bytes of a Parquet file in memory while its checksum is made."""
_RESULT_TYPES = {
    "completion": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "drafts": "int64",
    "draft_tokens": "int64",
    "accepted_tokens": "int64",
    "error": "string",
}
"""The columns that a run adds, with their types in Parquet."""
RESULT_FIELDS = tuple(_RESULT_TYPES)
_RESULT_SHAPE = {
    name: (str if kind == "string" else AtLeast(int, 0), None)
    for name, kind in _RESULT_TYPES.items()
}


@dataclass(frozen=True)
class Part:
    """Rows that lie together in one file."""

    number: int
    path: str
    start: int
    """JSON lines: the byte where the first row begins. Parquet: the file's row that is the
    first."""
    first_line: int
    """The first row's place in its file, from 1."""
    rows: int

    @property
    def name(self) -> str:
        """Of its output file."""
        return f"part-{self.number:06d}{Path(self.path).suffix}"


@dataclass(frozen=True)
class Input:
    """All parts, and what tells one input from another."""

    parts: list[Part]
    fingerprint: str
    """Of the files' names and contents."""

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def index(paths: Sequence[str], rows_per_part: int) -> Input:
    """Reads the files once, a line at a time, and cuts them; empty lines are no rows.

    Raises:
        ClusterError: a file is missing, empty, or of another format than the others.
    """
    kinds = {Path(path).suffix for path in paths}
    if len(kinds) > 1 or not kinds <= set(FORMATS):
        raise ClusterError(
            f"the input is {', '.join(paths)}: give files that all end in"
            f" {' or all in '.join(FORMATS)}"
        )
    parts: list[Part] = []
    whole = 0
    for path in paths:
        absolute = str(Path(path).resolve())
        try:
            check_input(path)
            cut = _cut_lines if path.endswith(".jsonl") else _cut_parquet
            whole = cut(absolute, rows_per_part, parts, zlib.crc32(Path(path).name.encode(), whole))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{path} cannot be read ({error}): give a file of JSON lines or Parquet"
            ) from None
    if not parts:
        raise ClusterError(
            f'{", ".join(paths)}: no rows; give at least one, such as {{"prompt": "..."}}'
        )
    return Input(parts, f"{whole:08x}")


def _cut_lines(path: str, rows_per_part: int, parts: list[Part], whole: int) -> int:
    """Appends the file's parts, and returns the checksum over all of it."""
    start = at = rows = number = first = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            whole = zlib.crc32(line, whole)
            if line.strip():
                if rows == 0:
                    start, first = at, number
                rows += 1
            at += len(line)
            if rows == rows_per_part:
                parts.append(Part(len(parts), path, start, first, rows))
                rows = 0
    if rows:
        parts.append(Part(len(parts), path, start, first, rows))
    return whole


def _cut_parquet(path: str, rows_per_part: int, parts: list[Part], whole: int) -> int:
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(path)
    for start in range(0, metadata.num_rows, rows_per_part):
        parts.append(
            Part(len(parts), path, start, start + 1, min(rows_per_part, metadata.num_rows - start))
        )
        if start == 0:
            _check_columns(parts[-1])
    # All of it, as of JSON lines: the footer's statistics stay what they are through many an edit.
    with (
        open(path, "rb") as file,
        Progress(
            total=Path(path).stat().st_size,
            desc=f"reading {Path(path).name}",
            unit="B",
            unit_scale=True,
            leave=False,
        ) as bar,
    ):
        while block := file.read(_BLOCK):
            whole = zlib.crc32(block, whole)
            bar.update(len(block))
    return whole


def _check_columns(part: Part) -> None:
    """Refuses columns that can be read, and not be written beside the answers: as the file's first
    part would be.

    Raises:
        ClusterError: a column has another's name, or Arrow has no way back for its type.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    names = parquet.read_schema(part.path).names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ClusterError(f"{part.path} has {twice!r} for two columns: give each its own name")
    rows = [row for row, _ in _read_parquet(part)]
    for field in _kept_fields(part.path):
        if "time64[ns]" in str(field.type):
            raise ClusterError(
                f"{part.path}: column {field.name!r} has times of a day in nanoseconds, of which"
                " Python keeps microseconds: cast it to time64[us], or leave it out"
            )
        values = [{field.name: row.get(field.name)} for row in rows]
        try:
            file = io.BytesIO()
            parquet.write_table(pa.Table.from_pylist(values, schema=pa.schema([field])), file)
            parquet.read_table(file)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ClusterError(
                f"{part.path}: column {field.name!r} of type {field.type} cannot be written beside"
                f" the answers ({error}): leave it out, or give it as another type, such as text"
            ) from None


def _kept_fields(path: str) -> list[Any]:
    """The fields of a Parquet file that its output has too; any may be null there, as in a row that
    cannot be read."""
    import pyarrow.parquet as parquet

    return [
        field.with_nullable(True)
        for field in parquet.read_schema(path).remove_metadata()
        if field.name not in _RESULT_TYPES
    ]


def read(part: Part) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row with what is wrong with it: a line that is no JSON object comes as ``{"line":
    text}``."""
    if part.path.endswith(".parquet"):
        yield from _read_parquet(part)
        return
    with open(part.path, "rb") as file:
        file.seek(part.start)
        number, left = part.first_line, part.rows
        while left:
            line = file.readline()
            if not line:
                raise ClusterError(
                    f"{part.path} has become shorter while it was read: leave the input as it is"
                    " until the run is done"
                )
            if line.strip():
                yield _parse(line, number)
                left -= 1
            number += 1


def _parse(line: bytes, number: int) -> tuple[dict[str, Any], str | None]:
    text = line.decode(errors="replace").rstrip("\r\n")
    try:
        row = loads(line)
    except ValueError as error:
        return {"line": text}, f"line {number} is no JSON ({error}): give one object a line"
    try:
        # It is written beside its answer.
        json.dumps(row, allow_nan=False)
    except ValueError:
        return {"line": text}, (
            f"line {number} holds NaN, Infinity or a number past 1.8e308, which JSON cannot hold"
            " beside its answer: give null or text in its place"
        )
    if not isinstance(row, dict):
        return {"line": text}, f'line {number} is no object: give one such as {{"prompt": "..."}}'
    return row, None


def _read_parquet(part: Part) -> list[tuple[dict[str, Any], str | None]]:
    import pyarrow.parquet as parquet

    rows: list[tuple[dict[str, Any], str | None]] = []
    with parquet.ParquetFile(part.path) as file:
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            first, last = max(part.start, begin), min(part.start + part.rows, end)
            if first < last:
                for batch in file.iter_batches(part.rows, row_groups=[group]):
                    low, high = max(first, begin), min(last, begin + batch.num_rows)
                    if low < high:
                        rows += _rows_of(batch.slice(low - begin, high - low), low + 1)
                    begin += batch.num_rows
            begin = end
    return rows


def _rows_of(batch: Any, first: int) -> list[tuple[dict[str, Any], str | None]]:
    """The rows of a record batch whose first is the file's row ``first``; one that has no form in
    Python comes without that field."""
    try:
        return [(row, None) for row in batch.to_pylist()]
    except (ValueError, OverflowError):  # text that is no UTF-8, times that Python has no dates for
        if batch.num_rows > 1:
            return [
                pair
                for i in range(batch.num_rows)
                for pair in _rows_of(batch.slice(i, 1), first + i)
            ]
    row, problems = {}, []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            problems.append(f"row {first}: {name} cannot be read ({error}): mend it")
    return [(row, "; ".join(problems))]


def write(part: Part, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the part's output: rows in the input's order, with ``RESULT_FIELDS`` set. Whole or not
    at all."""
    with whole_file(folder / part.name) as file:
        if part.path.endswith(".jsonl"):
            file.writelines(_line(row) for row in rows)
            return
        import pyarrow as pa
        import pyarrow.parquet as parquet

        # The input's own types: a part in which a column is empty would otherwise get another one
        # than the rest.
        results = [pa.field(name, getattr(pa, kind)()) for name, kind in _RESULT_TYPES.items()]
        schema = pa.schema([*_kept_fields(part.path), *results])
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), file)


def _line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON; half of a surrogate pair, which JSON's escapes may hold and UTF-8
    may not, as the escape that it came as."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def read_output(part: Part, folder: Path) -> list[dict[str, Any]]:
    """The results (``RESULT_FIELDS``) of each row of a part that was written.

    Raises:
        ClusterError: the file is not as it was written.
    """
    path = folder / part.name
    try:
        rows = _read_results(path)
        problem = next((m for row in rows if (m := misfit(row, _RESULT_SHAPE, "a row"))), None)
        if problem is None and len(rows) != part.rows:
            problem = f"{len(rows)} rows, not {part.rows}"
    except (OSError, ValueError) as error:
        problem = str(error).partition("\n")[0]
    if problem is not None:
        raise ClusterError(
            f"{path} is not as it was written ({problem}): remove it, and its rows are answered"
            " again"
        )
    return rows


def _read_results(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as file:
            return file.read(
                [name for name in file.schema_arrow.names if name in _RESULT_TYPES]
            ).to_pylist()
    return [loads(line.decode()) for line in path.read_bytes().split(b"\n") if line]
