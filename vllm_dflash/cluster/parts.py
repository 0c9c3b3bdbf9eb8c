"""The input of a batch run cut into parts, each of which becomes one output file, whole or not there: that is all there is to resuming.

JSON lines are handled as text until a row is answered, so rows may have any fields. Limits: files, which all nodes see under the same path;
a part is held in memory (``rows_per_part`` rows). Parquet takes pyarrow, which comes with Ray.

    pytest tests/unit/test_cluster_parts.py
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dflash.cluster.settings import ClusterError
from vllm_dflash.training.files import whole_file

FORMATS = (".jsonl", ".parquet")
_RESULT_TYPES = {
    "completion": "string", "finish_reason": "string", "prompt_tokens": "int64", "completion_tokens": "int64", "drafts": "int64",
    "draft_tokens": "int64", "accepted_tokens": "int64", "error": "string",
}  # fmt: skip
"""The columns that a run adds, with their types in Parquet."""
RESULT_FIELDS = tuple(_RESULT_TYPES)


@dataclass(frozen=True)
class Part:
    """Rows that lie together in one file."""

    number: int
    path: str
    start: int
    """JSON lines: the byte where the first row begins. Parquet: the file's row that is the first."""
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
        raise ClusterError(f"the input is {', '.join(paths)}: give files that all end in {' or all in '.join(FORMATS)}")
    parts: list[Part] = []
    whole = 0
    for path in paths:
        absolute = str(Path(path).resolve())
        try:
            cut = _cut_lines if path.endswith(".jsonl") else _cut_parquet
            whole = cut(absolute, rows_per_part, parts, zlib.crc32(Path(path).name.encode(), whole))
        except (OSError, ValueError) as error:
            raise ClusterError(f"{path} cannot be read ({error}): give a file of JSON lines or Parquet") from None
    if not parts:
        raise ClusterError(f'{", ".join(paths)}: no rows; give at least one, such as {{"prompt": "..."}}')
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
        parts.append(Part(len(parts), path, start, start + 1, min(rows_per_part, metadata.num_rows - start)))
    # Row groups' places and statistics: nobody reads all of a file that is larger than memory to tell it from another.
    said = json.dumps([metadata.to_dict(), Path(path).stat().st_size], default=repr, sort_keys=True)
    return zlib.crc32(said.encode(), whole)


def read(part: Part) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row with what is wrong with it: a line that is no JSON object comes as ``{"line": text}``."""
    if part.path.endswith(".parquet"):
        yield from ((row, None) for row in _read_parquet(part))
        return
    with open(part.path, "rb") as file:
        file.seek(part.start)
        number, left = part.first_line, part.rows
        while left:
            line = file.readline()
            if not line:
                raise ClusterError(f"{part.path} has become shorter while it was read: leave the input as it is until the run is done")
            if line.strip():
                yield _parse(line, number)
                left -= 1
            number += 1


def _parse(line: bytes, number: int) -> tuple[dict[str, Any], str | None]:
    text = line.decode(errors="replace").rstrip("\r\n")
    try:
        row = json.loads(line)
    except ValueError as error:
        return {"line": text}, f"line {number} is no JSON ({error}): give one object a line"
    if not isinstance(row, dict):
        return {"line": text}, f'line {number} is no object: give one such as {{"prompt": "..."}}'
    return row, None


def _read_parquet(part: Part) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = []
    with parquet.ParquetFile(part.path) as file:
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            first, last = max(part.start, begin), min(part.start + part.rows, end)
            if first < last:
                for batch in file.iter_batches(part.rows, row_groups=[group]):
                    low, high = max(first, begin), min(last, begin + batch.num_rows)
                    if low < high:
                        rows += batch.slice(low - begin, high - low).to_pylist()
                    begin += batch.num_rows
            begin = end
    return rows


def write(part: Part, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the part's output: rows in the input's order, with ``RESULT_FIELDS`` set. Whole or not at all."""
    with whole_file(folder / part.name) as file:
        if part.path.endswith(".jsonl"):
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
            return
        import pyarrow as pa
        import pyarrow.parquet as parquet

        # The input's own types: a part in which a column is empty would otherwise get another one than the rest.
        given = [field for field in parquet.read_schema(part.path).remove_metadata() if field.name not in _RESULT_TYPES]
        schema = pa.schema([*given, *((name, getattr(pa, kind)()) for name, kind in _RESULT_TYPES.items())])
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), file)


def read_output(part: Part, folder: Path) -> list[dict[str, Any]]:
    """The rows of a part that was written."""
    path = folder / part.name
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
