"""One TOML file or flags: names, types and ranges are checked, flags overrule, and a contradiction
is refused with its remedy."""

from pathlib import Path
from typing import Any

import pytest

from vllm_dflash import kinds
from vllm_dflash.cli import main
from vllm_dflash.training.errors import SettingsError
from vllm_dflash.training.pipeline import fit_lengths
from vllm_dflash.training.settings import STAGES, every_field, load

NEEDED = {"target": "t", "out": "o", "prompts": ("p",)}


def test_every_setting_is_a_flag_of_its_own() -> None:
    names = [item.name for _, item in every_field()]
    assert len(set(names)) == len(names)
    assert all(item.metadata["help"] for _, item in every_field())


def test_a_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\ntarget = "t"\nout = "o"\n[data]\nprompts = ["a", "b"]\n[train]\nlr = 1e-3\nsteps ='
        " 5\n[drafter]\ntarget_layer_ids = [1, 2]\n"
    )
    found = load(str(path), {"lr": "2e-3", "target_layer_ids": "3,4"})
    assert (found.train.lr, found.train.steps, found.data.prompts) == (2e-3, 5, ("a", "b"))
    assert found.drafter.target_layer_ids == (3, 4)
    assert found.prove.tolerance == 0.02


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": ""}, "target is not set: give the model to draft for with --target"),
        ({"prompts": ()}, "prompts is not set: give files of JSON lines"),
        ({"steps": "many"}, "steps is 'many': give a whole number"),
        ({"steps": 0}, "steps is 0: at least 1"),
        ({"seed": str(2**70)}, f"seed is {2**70}: at least 0 and at most {2**62}"),
        ({"steps": 10**400}, "at least 1 and at most"),
        ({"epochs": "inf"}, "epochs is inf: at least 0.001 and at most"),
        ({"lr": "nan"}, "lr is nan: at least 0"),
        ({"top_p": 1.5}, "top_p is 1.5: at least 0.01 and at most 1"),
        ({"kind": "eagle"}, f"kind is 'eagle': one of {', '.join(kinds.names())}"),
        ({"cache": "yes"}, "cache is 'yes': give true or false"),
        ({"target_layer_ids": "1,x"}, "target_layer_ids is '1,x': give a list"),
        ({"batch_size": 10, "workers": 4}, "batch_size 10 does not split into 4 workers"),
        ({"batch_size": 12, "micro_batch": 5}, "make it a multiple of workers x micro_batch"),
        ({"weighting": "dpace", "gamma_start": 1.0}, "dpace, which has no gamma"),
        ({"init": "d", "init_from_target": True}, "begins from one of them"),
        ({"parallel": "fsdp"}, "one worker has nobody to share with: set workers"),
        ({"extract_with": "vllm"}, "each step takes them from transformers: set cache too"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as found:
        load(None, NEEDED | changes)
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train\n", "cannot be read as TOML"),
        ("[trian]\nlr = 1\n", "'trian' is no table: one of [run], [data]"),
        (
            "[train]\nlearning_rate = 1\n",
            "[train] has no 'learning_rate': it has anchors, attention",
        ),
        ("lr = 1\n", "'lr' is no table"),
        ("[train]\nsteps = 1.5\n", "steps is 1.5: give a whole number"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as found:
        load(str(path), NEEDED)
    assert words in str(found.value)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for words in (
        "--only STAGE",
        "[train]",
        "peak learning rate (default: 0.0006)",
        "examples:",
        "goes on with the same command",
        *STAGES,
    ):
        assert " ".join(words.split()) in " ".join(said.split())


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--target", "t"]) == 2
    assert "vllm-dflash train: out is not set" in capsys.readouterr().err


def test_lengths_fit_the_target_where_nobody_sets_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Training for the embedded target, which has 512 positions, was refused unless one knew two
    flags."""
    settings = load(None, NEEDED)
    assert fit_lengths(settings, 40960) == settings
    assert capsys.readouterr().err == ""
    found = fit_lengths(settings, 512)
    assert (found.data.max_prompt_tokens, found.generate.response_tokens) == (512 - 256 - 16, 256)
    assert (
        "reach to 512 tokens: max_prompt_tokens is 240, response_tokens 256"
        in capsys.readouterr().err
    )
    found = fit_lengths(load(None, NEEDED | {"response_tokens": 400}), 512)
    assert (found.data.max_prompt_tokens, found.generate.response_tokens) == (112, 400)
    with pytest.raises(
        SettingsError,
        match=r"max_prompt_tokens 300 and response_tokens 256 .* do not fit into the 512 tokens",
    ):
        fit_lengths(load(None, NEEDED | {"max_prompt_tokens": 300}), 512)
    with pytest.raises(SettingsError, match="prove_tokens 256 and a block"):
        fit_lengths(settings, 256)
