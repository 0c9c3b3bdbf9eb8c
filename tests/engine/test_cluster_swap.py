"""A rolling swap of three replicas on Ray under load: none fails, all have the new drafter
afterwards, and a bad one leaves all with the old.

Needs ``pip install 'vllm-dflash[ray]'``.

    pytest -s tests/engine/test_cluster_swap.py
"""

import json
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from engine.harness import TARGET, held_out_prompts, run_engine
from engine.test_swap import drafters
from prove_serve import BODY, ask, deployment
from vllm_dflash.cli import main
from vllm_dflash.weights.identity import id_of_folder

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]
__all__ = ["drafters"]  # the fixture


def test_three_replicas(drafters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = held_out_prompts(6)
    expected = run_engine(TARGET, None, prompts, max_tokens=48)[0].tokens
    stop, answered, wrong = threading.Event(), [0], []

    def client(at: int) -> None:
        while not stop.is_set():
            at = (at + 1) % len(prompts)
            body: dict[str, Any] = {**BODY, "prompt": prompts[at], "return_token_ids": True}
            try:
                tokens = ask(url, body)["choices"][0]["token_ids"]
            except (OSError, urllib.error.HTTPError, LookupError) as error:
                wrong.append(repr(error))
                continue
            answered[0] += 1
            if tokens != expected[at]:
                wrong.append((at, tokens))

    folder = tmp_path / "ray"
    folder.mkdir()
    with deployment(folder, "3", "--swap-from", str(drafters)) as url:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        assert main(["swap", "--server", url, "noisy"]) == 0
        said = capsys.readouterr().out
        assert f"{id_of_folder(drafters / 'noisy')} on 3 replicas, one after another" in said
        assert main(["swap", "--server", url, "nan"]) == 1
        assert "NaN" in capsys.readouterr().err
        assert main(["swap", "--server", url, "good"]) == 0
        time.sleep(3)
        stop.set()
        for thread in threads:
            thread.join()
    print(json.dumps({"answered": answered[0], "wrong": wrong[:3]}))
    assert answered[0] > 20
    assert wrong == []
