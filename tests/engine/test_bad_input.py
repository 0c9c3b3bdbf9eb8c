"""A drafter that cannot serve its target is refused when the engine's configuration is made: the
message names the remedy."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine import forks
from engine.harness import engine_env, wait_until_gone
from pairs import make_random_drafter, random_drafter_config


def make_config(
    target: Path, drafter: Path, num_speculative_tokens: int = 5, max_model_len: int = 256
) -> None:
    """What ``LLM(...)`` and ``vllm serve`` do first, in the process that the user started."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    speculative = {
        "method": "dflash",
        "model": str(drafter),
        "num_speculative_tokens": num_speculative_tokens,
    }
    EngineArgs(
        str(target),
        speculative_config=speculative,
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
    ).create_engine_config()


@pytest.fixture
def drafter(tmp_path: Path, random_drafter: Path) -> Path:
    return Path(shutil.copytree(random_drafter, tmp_path / "drafter"))


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_good_pair_passes(random_target: Path, drafter: Path) -> None:
    make_config(random_target, drafter, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 128}, ["hidden_size is 64, the drafter's is 128", "model card"]),
        ({"vocab_size": 600}, ["vocab_size is 512, the drafter's is 600", "model card"]),
        (
            {"num_target_layers": 36},
            ["number of layers", "is 5, the drafter's is 36", "model card"],
        ),
    ],
)
def test_drafter_for_another_target(
    random_target: Path, tmp_path: Path, change: dict, words: list[str]
) -> None:
    folder = make_random_drafter(tmp_path / "other", config=random_drafter_config(**change))
    with pytest.raises(ValueError, match="another target") as error:
        make_config(random_target, folder)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda raw: raw["dflash_config"].update(target_layer_ids=[1, 2, 5]),
            ["target_layer_ids [5]", "0 to 4", "deeper target, or the ids are one-based"],
        ),
        (
            lambda raw: raw["dflash_config"].update(mask_token_id=512),
            ["mask_token_id 512", "vocabulary of 512", "trained with"],
        ),
        (lambda raw: raw.pop("dflash_config"), ["dflash_config is missing", "came with"]),
        (lambda raw: raw.pop("block_size"), ["block_size is missing"]),
    ],
)
def test_bad_config(
    random_target: Path, drafter: Path, change: Callable[[dict], None], words: list[str]
) -> None:
    edit_config(drafter, change)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        make_config(random_target, drafter)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_tensor(random_target: Path, drafter: Path) -> None:
    edit_tensors(drafter, lambda t: t.pop("layers.1.self_attn.k_norm.weight"))
    with pytest.raises(
        ValueError, match=r"missing: layers\.1\.self_attn\.k_norm\.weight.*same checkpoint"
    ):
        make_config(random_target, drafter)


def test_misnamed_tensor(random_target: Path, drafter: Path) -> None:
    edit_tensors(drafter, lambda t: t.update({"fc2.weight": t.pop("fc.weight")}))
    with pytest.raises(ValueError, match=r"missing: fc\.weight; unexpected: fc2\.weight"):
        make_config(random_target, drafter)


def test_misshaped_tensor(random_target: Path, drafter: Path) -> None:
    edit_tensors(drafter, lambda t: t.update({"fc.weight": t["fc.weight"][:, :128].contiguous()}))
    with pytest.raises(ValueError, match=r"fc\.weight is \[64, 128\] and should be \[64, 192\]"):
        make_config(random_target, drafter)


def test_corrupt_file(random_target: Path, drafter: Path) -> None:
    path = drafter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read.*fetch the checkpoint again"
    ):
        make_config(random_target, drafter)


def test_too_many_speculative_tokens(random_target: Path, drafter: Path) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"num_speculative_tokens is 8.*blocks of 8 hold 1 to 7.*Set num_speculative_tokens to 7"
            r" or less"
        ),
    ):
        make_config(random_target, drafter, 8)


def test_zero_speculative_tokens(random_target: Path, drafter: Path) -> None:
    with pytest.raises(ValueError, match=r"num_speculative_tokens[\s\S]*greater than 0"):
        make_config(random_target, drafter, 0)


def test_positions_beyond_the_rotary_cache(random_target: Path, tmp_path: Path) -> None:
    """vLLM would stretch the drafter's rotary table to positions that it was never trained for."""
    folder = make_random_drafter(
        tmp_path / "short", config=random_drafter_config(max_position_embeddings=128)
    )
    with pytest.raises(
        ValueError,
        match=r"max_model_len is 256.*max_position_embeddings = 128.*--max-model-len 128",
    ):
        make_config(random_target, folder)


@pytest.mark.engine
def test_a_refused_server_leaves_nothing_running(
    random_target: Path, drafter: Path, tmp_path: Path
) -> None:
    edit_config(drafter, lambda raw: raw["dflash_config"].update(target_layer_ids=[1, 2, 9]))
    speculative = json.dumps(
        {"method": "dflash", "model": str(drafter), "num_speculative_tokens": 5}
    )
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(random_target),
        "--skip-tokenizer-init",
        "--max-model-len",
        "256",
    ]
    log = tmp_path / "log"
    server = forks.start(
        [*command, "--port", "0", "--speculative-config", speculative],
        engine_env({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        {0: Path(os.devnull), 1: log},
    )
    assert server.wait(180) != 0
    assert "target_layer_ids [9] are outside the target's 5 layers" in log.read_text()
    wait_until_gone(server.pid)
