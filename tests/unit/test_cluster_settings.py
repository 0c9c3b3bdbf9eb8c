"""Engine arguments and what Ray reserves for them; flags; the differences between nodes. No Ray is
needed."""

import argparse
import os
from pathlib import Path

import pytest

from vllm_dflash.cluster import command, connection
from vllm_dflash.cluster.connection import differences
from vllm_dflash.cluster.serve import Serving, exposure
from vllm_dflash.cluster.settings import (
    ClusterError,
    EngineSettings,
    engine_args,
    environment,
    uses_ray,
)


def test_a_drafter_and_its_figures() -> None:
    args = engine_args(
        EngineSettings(
            "org/target",
            "org/drafter",
            num_speculative_tokens=7,
            dtype="float32",
            max_model_len=512,
        )
    )
    assert args == {
        "model": "org/target",
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "max_model_len": 512,
        "speculative_config": {
            "method": "dflash",
            "model": "org/drafter",
            "num_speculative_tokens": 7,
        },
        "per_request_spec_decode_metrics": "summary",
    }


def test_without_a_drafter_nothing_of_it_is_asked() -> None:
    """vLLM refuses figures of drafts where there are none."""
    assert engine_args(EngineSettings("org/target")).keys() == {
        "model",
        "dtype",
        "tensor_parallel_size",
    }


def test_folders_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's folder is another one."""
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = EngineSettings("target", "./target")
    assert engine_args(settings)["model"] == str(tmp_path / "target")
    assert settings.local_paths == {
        "target": str(tmp_path / "target"),
        "draft": str(tmp_path / "target"),
    }


def test_on_a_cpu() -> None:
    """A cache of a share of the machine's memory, and threads bound to the same cores, are what two
    engines there would get."""
    settings = EngineSettings(
        "org/target", device="cpu", engine_args={"kv_cache_memory_bytes": 1 << 28}
    )
    assert engine_args(settings)["kv_cache_memory_bytes"] == 1 << 28
    assert engine_args(settings)["enforce_eager"]
    assert environment(settings) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert settings.bundles == [{"CPU": 1.0}]


def test_ranks_on_gpus_are_placed_by_ray() -> None:
    settings = EngineSettings("org/target", tensor_parallel_size=4)
    assert uses_ray(settings)
    assert settings.bundles == [{"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}]
    assert not uses_ray(
        EngineSettings(
            "org/target", tensor_parallel_size=4, engine_args={"distributed_executor_backend": "mp"}
        )
    )
    assert not uses_ray(EngineSettings("org/target", tensor_parallel_size=2, device="cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu': one of cuda, cpu"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0: give 1 or more"),
        ({"num_speculative_tokens": 7}, "there is no drafter: give draft, or leave it out"),
        ({"draft": "/nowhere/at/all"}, "draft is /nowhere/at/all, where there is no folder"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        EngineSettings("org/target", **changes)


def test_flags_of_both_commands_describe_the_same_engine() -> None:
    engine = [
        "--target",
        "org/target",
        "--draft",
        "org/drafter",
        "-k",
        "7",
        "--engine-args",
        '{"max_num_seqs": 8}',
        "--device",
        "cpu",
    ]
    for add, more in (
        (command.add_batch_flags, ["in.jsonl", "--out", "out"]),
        (command.add_up_flags, []),
    ):
        parser = argparse.ArgumentParser()
        add(parser)
        settings = command.settings_of(parser.parse_args([*more, *engine]))
        assert settings == EngineSettings(
            "org/target", "org/drafter", "cpu", 7, engine_args={"max_num_seqs": 8}
        )


def test_engine_args_that_are_no_object() -> None:
    parser = argparse.ArgumentParser()
    command.add_up_flags(parser)
    with pytest.raises(ClusterError, match="give a JSON object"):
        command.settings_of(
            parser.parse_args(["--target", "org/target", "--engine-args", "max_num_seqs=8"])
        )


def test_differences_between_nodes_name_the_remedy() -> None:
    here = {
        "versions": {"vLLM": "0.32.0", "ray": "2.60.0"},
        "checkpoints": {"target": ("/t", "aa"), "draft": ("/d", "bb")},
    }
    there = {
        "versions": {"vLLM": "0.31.0", "ray": "2.60.0"},
        "checkpoints": {"target": ("/t", "cc"), "draft": ("/d", None)},
    }
    assert differences(here, here) == []
    assert differences(here, there) == [
        "vLLM is 0.31.0, here it is 0.32.0: install the same on every node",
        "the target /t is another one (its config.json differs): copy the same to every node",
        "the draft /d is not there: put it on every node under that path, or give a hub id",
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_an_address_that_others_reach_is_warned_of(host: str) -> None:
    assert "asks nobody for a key" in (exposure(Serving(EngineSettings("t"), "t", host=host)) or "")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_the_loopback_is_not(host: str) -> None:
    assert exposure(Serving(EngineSettings("t"), "t", host=host)) is None


@pytest.mark.parametrize(
    ("address", "backend", "local"),
    [(None, "mp", True), ("auto", "mp", False), (None, "ray", False)],
)
def test_ray_on_one_machine_listens_there_alone(
    monkeypatch: pytest.MonkeyPatch, address: str | None, backend: str, local: bool
) -> None:
    """Ray's variable is set before it is imported, and not for what the process starts later."""
    monkeypatch.setattr(os, "environ", {} if address is None else {"RAY_ADDRESS": address})

    def seen() -> None:
        raise ClusterError(str(os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")))

    monkeypatch.setattr(connection, "_import_ray", seen)
    engine = EngineSettings(
        "t", device="cpu", engine_args={"distributed_executor_backend": backend}
    )
    with pytest.raises(ClusterError, match="0" if local else "None"), connection.connect(engine, 1):
        pass
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
