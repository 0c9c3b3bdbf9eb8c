"""The whole circle on a server: a target with a merged LoRA, its old drafter, recorded traffic, a
refresh of 16 steps, and the new drafter in the running server.

    pytest -s tests/engine/test_refresh.py
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import forks
from engine.harness import DRAFTER, engine_env
from engine.test_serve import request, server
from engine.test_swap import ALWAYS, EXTENSION, counts, tau_since, which
from vllm_dflash.cli import main
from vllm_dflash.weights.identity import id_of_folder

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
LEARNED = str(16 * 16 * 32 * 7)
"""Drafted tokens: 16 steps with the settings of refresh.toml. (A budget in minutes is tried by
test_follow_refresh.py.)"""


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded target after a LoRA on another kind of text, and prompts of it."""
    folder = tmp_path_factory.mktemp("finetuned")
    script, log = ROOT / "examples" / "follow" / "finetune.py", folder / "log"
    command = [str(script), "--out", str(folder), "--steps", "24", "--prompts", "88"]
    status = forks.start(command, engine_env(), {0: Path(os.devnull), 1: log}).wait(900)
    assert status == 0, log.read_text()
    return folder


def asked(port: int, rows: list[str], **more: object) -> None:
    """Eight at a time."""

    def ask(row: str) -> None:
        body = {"model": "embedded", "max_tokens": 64, "temperature": 0, **json.loads(row), **more}
        body["prompt"] = body.pop("prompt_token_ids")
        request(port, "/v1/completions", body)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, rows))


def test_the_circle(finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tau of the server rises with the swap, on prompts that nothing was trained on."""
    rows = (finetuned / "prompts.jsonl").read_text().splitlines()
    drafters, traffic = tmp_path / "drafters", tmp_path / "traffic"
    shutil.copytree(DRAFTER, drafters / "first")
    speculative = json.dumps({"method": "dflash", "model": str(drafters / "first")})
    flags = [
        "--speculative-config",
        speculative,
        "--middleware",
        "vllm_dflash.training.recorder.TrafficRecorder",
        "--middleware",
        "vllm_dflash.swap.endpoint.DrafterEndpoint",
        "--worker-extension-cls",
        EXTENSION["worker_extension_cls"],
        *ALWAYS,
    ]
    env = {"VLLM_DFLASH_RECORD": str(traffic), "VLLM_DFLASH_SWAP_FROM": str(drafters)}
    with server(*flags, env=env, model=finetuned / "target") as port:
        before = counts(port)
        asked(port, rows[:24], ignore_eos=True)  # which is not recorded
        old = tau_since(port, before)
        asked(port, rows[24:88])
        url, out = f"http://127.0.0.1:{port}", drafters / "refreshed"
        toml, text = tmp_path / "refresh.toml", (ROOT / "examples/follow/refresh.toml").read_text()
        # Nobody reads tau on the way, which would be measured after each step.
        toml.write_text(text.replace("[train]", "[train]\neval_every = 16"))
        command = ["refresh", str(toml), "--server", url, "--traffic", str(traffic), "--swap"]
        command += [
            "--out",
            str(out),
            "--tokens",
            LEARNED,
            "--held-out",
            "24",
            "--dtype",
            "float32",
        ]
        assert main([*command, "--when-below", "0.95"]) == 0
        journal = (out / "journal.txt").read_text()
        print(journal)
        assert "round 1, kept: tau" in journal
        assert which(port)["id"] == id_of_folder(out / "drafter")
        before = counts(port)
        asked(port, rows[:24], ignore_eos=True)
        new = tau_since(port, before)
        print(f"served: tau {old:.2f} -> {new:.2f}")
        assert new > old
        capsys.readouterr()
        # The drafter was swapped in since the last look: the next one judges it.
        assert main([*command, "--when-below", "0.5"]) == 0
        assert "is new since the last look" in capsys.readouterr().out
    note = json.loads((out / "drafter" / "refresh.json").read_text())
    assert note["tau"] > note["tau_before"]
