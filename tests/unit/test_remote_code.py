"""The code that a checkpoint brings is never run, and nobody is asked at the terminal, unless the
user has said so."""

import ast
import builtins
import json
from pathlib import Path

import pytest

from vllm_dflash.hub import load_tokenizer
from vllm_dflash.tools.pair_checks import tokenizer_checks
from vllm_dflash.training.settings import load
from vllm_dflash.training.target import find_target

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "examples" / "embedded_pair" / "target"
LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModel", "AutoProcessor")
ELSEWHERE = {"vllm_dflash/smollm2.py", "examples/embedded_pair/prompts.py"}
"""The first reads a tokenizer out of a GGUF file; the other is no part of the package."""


def folder_with_code(folder: Path) -> Path:
    """A tokenizer and a config whose classes are the folder's own; ``ran`` appears beside them
    where that code is run."""
    folder.mkdir()
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\nfrom transformers import"
        " PretrainedConfig, PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):"
        " pass\nclass OwnConfig(PretrainedConfig): model_type = 'own'\n"
    )
    (folder / "tokenizer.json").write_bytes((TARGET / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
            }
        )
    )
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
    raw = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(raw | dict.fromkeys(names, 8)))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked at the terminal; the answer is yes."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    return questions


def test_a_tokenizer_with_code_of_its_own(tmp_path: Path, asked: list[str]) -> None:
    """`doctor` once left transformers' question to the terminal, and with a y on standard input the
    code ran."""
    folder = folder_with_code(tmp_path / "drafter")
    load_tokenizer(folder)
    assert (asked, (folder / "ran").exists()) == ([], False)


def test_a_target_with_code_of_its_own(tmp_path: Path, asked: list[str]) -> None:
    """And where the user does say so, it runs."""
    folder = folder_with_code(tmp_path / "target")
    flags = {"target": str(folder), "out": "o", "prompts": ("p",)}
    with pytest.raises(Exception, match="cannot be read"):
        find_target(load(None, flags))
    assert (asked, (folder / "ran").exists()) == ([], False)
    find_target(load(None, flags | {"trust_remote_code": True}))
    assert (asked, (folder / "ran").exists()) == ([], True)


def test_every_call_says_it() -> None:
    """Each of transformers' loaders in the package, its patches and its examples."""
    calls = []
    for path in [
        p
        for folder in ("vllm_dflash", "patches", "examples")
        for p in (ROOT / folder).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) in LOADERS
            ):
                said = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
                calls.append((f"{path.relative_to(ROOT)}:{node.lineno}", said))
    assert len(calls) > 4
    assert [where for where, said in calls if not said] == []
    # One place for all: a second one once left the question open, and another took a panic for the
    # command's end.
    assert {where.partition(":")[0] for where, _ in calls} - ELSEWHERE == {"vllm_dflash/hub.py"}


@pytest.mark.parametrize(
    "text",
    ["{}", "{", '{"version": "1.0", "model": {"type": "BPE"}}', "null", '{"model": {"type": "X"}}'],
)
def test_a_broken_tokenizer_is_a_warning(tmp_path: Path, text: str) -> None:
    """The tokenizers library raises Exception itself, which once ended the command."""
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    assert load_tokenizer(tmp_path) is None
    from vllm_dflash.config import DrafterConfig

    drafter = DrafterConfig.from_pretrained(TARGET.parent / "dflash")
    checks = tokenizer_checks(drafter, tmp_path, load_tokenizer(TARGET))
    assert (checks[0].name, checks[0].state) == ("tokenizer", "warning")
