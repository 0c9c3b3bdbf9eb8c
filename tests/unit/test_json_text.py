"""JSON is read one way everywhere: a key given twice and a nesting that is no file's are refused.

Of two values of a key Python's reader takes the last without a word: a drafter of block size 8 was
served at 16, and accepted 1.77 tokens a step in place of 3.90.
"""

import ast
import json
from pathlib import Path

import pytest

from broken import refused, shard
from pairs import make_random_drafter
from unit.test_checks import configure
from vllm_dflash import records
from vllm_dflash.json_text import MOST_LEVELS, RepeatedKeyError, loads
from vllm_dflash.records import RecordError

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_dflash"
READ_WHAT_A_PROGRAM_WROTE = {
    "engines/child.py": "its parent's messages",
    "engines/process.py": "its child's messages",
    "evaluation/server.py": "vLLM's answers, and its benchmark's results",
    "files.py": "a copy of a value",
    "humaneval.py": "a file whose checksum is known",
    "smollm2.py": "sizes that files are compared with",
    "training/logs.py": "entries of its own, of which a damaged one is left out",
    "training/ray_engines.py": "a job of its own",
    "training/recorder.py": "requests that vLLM's server has answered",
    "training/recordable.py": "answers of vLLM's server",
    "training/sequences.py": "the header of a file whose checksum is known",
}
"""Modules that call Python's reader itself."""


def test_nobody_else_calls_pythons_reader() -> None:
    calls = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("load", "loads")
        and ast.unparse(node.value) == "json"
    }
    assert calls == READ_WHAT_A_PROGRAM_WROTE.keys() | {"json_text.py"}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": {}, "c": 2, "a": 3}}]'])
def test_a_key_given_twice(text: str) -> None:
    for given in (text, text.encode(), text.encode("utf-16")):
        with pytest.raises(RepeatedKeyError, match='it gives the key "a" twice') as error:
            loads(given)
        assert error.value.key == "a"


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth(pair: tuple[str, str]) -> None:
    """The depth that Python's reader takes depends on its caller's; a row just below it ended a
    batch run in a RecursionError when it was written."""
    begin, end = pair
    most = MOST_LEVELS // begin.replace('{"a":', "[").count("[")
    text = begin * most + "1" + end * most
    assert json.dumps(loads(text)).replace(" ", "") == text
    for depth in (most + 1, 982, 100_000):
        with pytest.raises(ValueError, match="more than 200 levels deep"):
            loads(begin * depth + "1" + end * depth)
    assert len(loads(f"[{', '.join(['[[]]'] * 1000)}]")) == 1000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_key_given_twice_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    folder = _with_block_size_twice(tmp_path / "d")
    if name == "config.json":
        message = refused(folder, "gives the key 'block_size' twice", "give it once")
        assert str(folder / name) in message
        return
    make_random_drafter(folder)
    index = shard(folder)
    places = json.loads(index.read_text())["weight_map"]
    twice = json.dumps(places).replace("{", f"{{{json.dumps(min(places))}: null, ")
    index.write_text(f'{{"weight_map": {twice}}}')
    refused(folder, "is no safetensors index", "twice")


@pytest.mark.vllm
def test_vllm_is_told_the_same(tmp_path: Path, random_target: Path) -> None:
    folder = _with_block_size_twice(tmp_path / "d")
    with pytest.raises(ValueError, match="gives the key 'block_size' twice"):
        configure(random_target, folder)


def test_a_key_given_twice_in_a_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(records.as_text({"steps": 3}).replace("{", '{"steps": 2,'))
    with pytest.raises(RecordError, match=r"record.json cannot be read \(it gives the key"):
        records.read(path, {"steps": int})
    with pytest.raises(ValueError, match="twice"):
        records.object_of('{"a": 1, "a": 2}')


def _with_block_size_twice(folder: Path) -> Path:
    make_random_drafter(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}") + ', "block_size": 16}')
    return folder
