"""The command's tools on real files: inspect says what is there, convert loses nothing, both end
with the right status.

pytest tests/unit/test_tools.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_dflash
from broken import edit, shard
from pairs import make_random_drafter, make_random_target, random_drafter_config
from variants import VARIANTS
from vllm_dflash.acceptance import Acceptance
from vllm_dflash.cli import main
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import published_format
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.tools import doctor
from vllm_dflash.tools.convert import convert
from vllm_dflash.tools.inspect import inspect_checkpoint
from vllm_dflash.tools.pair_runs import EngineError, EngineRun, ReferenceRun
from vllm_dflash.tools.repair import config_problems


@pytest.fixture
def dflare(tmp_path: Path) -> Path:
    return VARIANTS["dflare speculators"].make(tmp_path / "dflare")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Every variant to its kind's format and to speculators', and back: configuration, tensors and
    mask embedding as they were."""
    source = VARIANTS[name].make(tmp_path / "source")
    config = DrafterConfig.from_pretrained(source)
    kept = {n: t for n, t in tensors_of(source).items() if n != "t2d"}
    for format in (published_format(config), "speculators"):
        there, back = tmp_path / format, tmp_path / f"{format} and back"
        assert convert(source, there, format, verifier="target") == []
        assert convert(there, back, config.format) == []
        for folder, expected in ((there, format), (back, config.format)):
            read = DrafterConfig.from_pretrained(folder)
            assert (read, read.format) == (config, expected)
            assert_same_bits({n: t for n, t in tensors_of(folder).items() if n != "t2d"}, kept)
            assert inspect_checkpoint(folder).problems == []
            assert (folder / "mask_embedding.pt").is_file() == (
                source / "mask_embedding.pt"
            ).is_file()
            if "d2t" in kept and expected == "speculators":
                ids = torch.arange(len(kept["d2t"])) + kept["d2t"]
                assert tensors_of(folder)["t2d"].nonzero()[:, 0].tolist() == sorted(ids.tolist())
    ours, theirs = (
        load_drafter(source, torch.float32),
        load_drafter(tmp_path / published_format(config), torch.float32),
    )
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    for one, other in zip(vars(ours.own).values(), vars(theirs.own).values(), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_sharded_prefixed_and_with_what_only_training_needs(tmp_path: Path) -> None:
    source = make_random_drafter(
        tmp_path / "source",
        config=random_drafter_config(draft_vocab_size=200),
        format="speculators",
    )
    plain = tensors_of(source)
    edit(
        source,
        lambda t: t.update(
            {"verifier_norm.weight": torch.ones(64), "draft_id_to_target_id": t.pop("d2t")}
        ),
    )
    tensors = tensors_of(source)
    save_file(
        {f"model.{n}" if n.startswith("layers") else n: t for n, t in tensors.items()},
        source / "model.safetensors",
    )
    shard(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("raise SystemExit")
    assert convert(source, tmp_path / "out", "z-lab") == ["verifier_norm.weight"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert_same_bits(tensors_of(tmp_path / "out"), plain)
    assert inspect_checkpoint(tmp_path / "out").problems == []
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "a file that only its owner may read cannot be served by another user"


def test_sixteen_bits_survive(tmp_path: Path) -> None:
    source = make_random_drafter(
        tmp_path / "source", config=random_drafter_config(dtype="bfloat16")
    )
    edit(
        source, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()})
    )
    convert(source, tmp_path / "out", "speculators")
    assert all(
        torch.equal(t, tensors_of(source)[n]) and t.dtype == torch.bfloat16
        for n, t in tensors_of(tmp_path / "out").items()
    )


def test_convert_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_random_drafter(tmp_path / "source")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert main(["convert", str(source), str(full), "--to", "speculators"]) == 1
    assert "not empty: give a new folder" in capsys.readouterr().err
    assert [p.name for p in full.iterdir()] == ["notes.txt"]
    assert main(["convert", str(source), str(tmp_path / "new"), "--to", "AngelSlim"]) == 1
    assert (
        "AngelSlim holds no dflash drafter: write it as z-lab or speculators"
        in capsys.readouterr().err
    )
    windows = make_random_drafter(tmp_path / "windows")
    raw = json.loads((windows / "config.json").read_text())
    (windows / "config.json").write_text(json.dumps(raw | {"block_size": 0}))
    with pytest.raises(DrafterConfigError, match="block_size is 0"):
        convert(windows, tmp_path / "new", "speculators")
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], (
        "a half-written folder was left"
    )


def test_convert_refuses_what_it_would_pass_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target's name went nowhere; and what was written lay inside of what it was made of."""
    source = make_random_drafter(tmp_path / "source")
    flags = ["convert", str(source), str(tmp_path / "a"), "--to", "z-lab", "--verifier", "x"]
    assert main(flags) == 2
    assert "z-lab has no place for a target's name" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    with pytest.raises(DrafterConfigError, match="is in the folder that is converted"):
        convert(source, source / "sub", "z-lab")
    assert not (source / "sub").exists()


def test_convert_names_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_random_drafter(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "a"), "--to", "speculators"]) == 0
    assert "--verifier NAME writes it in" in capsys.readouterr().out
    assert (
        main(
            [
                "convert",
                str(source),
                str(tmp_path / "b"),
                "--to",
                "speculators",
                "--verifier",
                "Qwen/Qwen3-8B",
            ]
        )
        == 0
    )
    convert(tmp_path / "b", tmp_path / "c", "speculators")
    assert (
        json.loads((tmp_path / "c/config.json").read_text())["speculators_config"]["verifier"][
            "name_or_path"
        ]
        == "Qwen/Qwen3-8B"
    )


def test_inspect_says_what_it_is(dflare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dflare)]) == 0
    said = capsys.readouterr().out
    for words in (
        "speculators",
        "dflare",
        "num_speculative_tokens 1 to 7",
        "in vLLM's numbering, layer + 1: 1, 2, 3, 4, 5",
        "300 tokens, mapped by d2t",
        "lm_head.weight, d2t, mask_embedding.pt",
        "F32",
        "all 44 tensors are there and finite",
    ):
        assert words in said, words
    rows = [line.split() for line in said.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    expected = load_file(dflare / "model.safetensors")["layer_fusion_weights"].softmax(1)
    assert torch.allclose(
        torch.tensor([[float(x) for x in row[1:]] for row in rows]), expected, atol=6e-4
    )


def test_inspect_for_scripts(dflare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dflare), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (
        report["sound"],
        report["problems"],
        report["max_speculative_tokens"],
        report["vllm_layer_ids"],
    ) == (True, [], 7, [1, 2, 3, 4, 5])
    assert report["parameters"] == sum(
        t.numel() for n, t in load_file(dflare / "model.safetensors").items() if n != "d2t"
    )
    assert report["bytes"] == sum(path.stat().st_size for path in dflare.iterdir())
    assert len(report["fusion"]) == 3
    assert all(sum(row) == pytest.approx(1) for row in report["fusion"])


def test_inspect_finds_all_that_is_wrong(dflare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and tables each with their own fault; one run names every one of them."""
    edit(dflare, lambda t: t["norm.weight"][:1].fill_(float("nan")))
    edit(
        dflare,
        lambda t: t.update({"fc2.weight": t.pop("hidden_norm.weight"), "d2t": t["d2t"] + 900}),
    )
    (dflare / "mask_embedding.pt").write_bytes(b"")
    assert main(["inspect", str(dflare), "--json"]) == 1
    problems = "\n".join(json.loads(capsys.readouterr().out)["problems"])
    for words in (
        "missing: hidden_norm.weight",
        "unexpected: fc2.weight",
        "NaN or infinity in norm.weight",
        "d2t does not map",
        "mask_embedding.pt cannot",
    ):
        assert words in problems, words
    assert main(["inspect", str(dflare)]) == 1
    assert "no, 4 problems:" in capsys.readouterr().out


def test_every_bad_field_of_a_config_at_once() -> None:
    raw = {
        "architectures": ["DFlashDraftModel"],
        "hidden_size": "64",
        "intermediate_size": 112,
        "num_hidden_layers": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 3,
        "head_dim": 31,
        "max_position_embeddings": -1,
        "block_size": 1,
        "rms_norm_eps": [],
        "rope_theta": 0,
        "rope_scaling": {"rope_type": "yarn"},
        "dtype": "int4",
        "layer_types": ["full_attention"] * 3,
        "num_target_layers": 5,
        "dflash_config": {"mask_token_id": None, "target_layer_ids": [1, 2, 8]},
    }
    problems = config_problems(raw)
    for field in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "block_size",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling.factor",
        "dtype",
        "mask_token_id",
        "target_layer_ids",
        "head_dim",
    ):
        assert sum(field in str(problem) for problem in problems) >= 1, (field, problems)
    (nothing,) = config_problems([])
    assert (
        str(nothing)
        == "it holds a list, not an object of settings: use the config.json that the checkpoint"
        " came with"
    )


def test_a_path_that_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'nowhere'} is no folder: give a drafter's folder")
    assert said.count("\n") == 1
    assert main(["inspect", "nobody/nothing"]) == 1
    assert "no folder, nor a hub id that is downloaded" in capsys.readouterr().out
    assert (
        main(["doctor", "--target", "t", "--draft", "d", "--prompts", str(tmp_path / "nowhere")])
        == 2
    )


def test_doctor_prints_each_check_as_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It printed nothing until both runs had ended; what is said before plain PyTorch runs, and
    before vLLM does, is read here."""
    target, drafter = (
        make_random_target(tmp_path / "target"),
        make_random_drafter(tmp_path / "drafter"),
    )
    (tmp_path / "prompts").write_text(json.dumps({"prompt_token_ids": [5, 6, 7]}))
    said: list[str] = []

    def reference(*_: Any) -> ReferenceRun:
        said.append(capsys.readouterr().out)
        return ReferenceRun([[1]], [[1.0]], Acceptance(10, [5]), {})

    def engine(*_: Any) -> EngineRun:
        said.append(capsys.readouterr().out)
        raise EngineError("no engine")

    monkeypatch.setattr(doctor, "run_reference", reference)
    monkeypatch.setattr(doctor, "run_engine", engine)
    command = [
        "doctor",
        "--target",
        str(target),
        "--draft",
        str(drafter),
        "--prompts",
        str(tmp_path / "prompts"),
        "--max-tokens",
        "8",
    ]
    assert main(command) == 1
    said.append(capsys.readouterr().out)
    names = [
        [
            line[9:26].strip()
            for line in text.splitlines()
            if line[:8].strip() in ("ok", "warning", "error")
        ]
        for text in said
    ]
    assert names[0][:3] == ["plug-in", "checkpoint", "hidden size"]
    assert names[1:] == [["tau", "layer ids"], ["vLLM"]]
    assert said[2].endswith("Verdict: 1 error, 2 warnings.\n")
    assert main([*command, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["checks"]) == sum(map(len, names))
    assert said[3:] == ["", ""]


@pytest.mark.parametrize("command", ["status", "inspect", "convert", "doctor"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"  vllm-dflash {command}" in capsys.readouterr().out


def test_a_reader_that_stops_is_no_fault() -> None:
    """``vllm-dflash status | head -1`` ended in a traceback."""
    code = "import sys; from vllm_dflash.cli import main; sys.exit(main(['status']))"
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vllm-dflash {vllm_dflash.__version__}\n"


@pytest.mark.slow
def test_status_stays_light() -> None:
    code = (
        "import sys; from vllm_dflash.cli import main; main(['status']); print([m for m in"
        " ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_status_names_other_plug_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they replace only a process of vLLM's sees."""
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nanother = other:register\n")
    main(["status"])
    assert "other plug-ins" not in capsys.readouterr().out
    monkeypatch.syspath_prepend(tmp_path)
    main(["status"])
    assert "other plug-ins, for vLLM or of kinds: another." in capsys.readouterr().out
