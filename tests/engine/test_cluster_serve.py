"""``vllm-dflash up`` on a real cluster: it answers as one process does, the plug-in is in every
process, it asks for its API key, it stops when told, and nothing stays.

One replica; two, a killed one and scaling are in ``tests/prove_serve.py``, to be run by hand. Needs
``pip install 'vllm-dflash[ray]'``.

    pytest -s tests/engine/test_cluster_serve.py
"""

import json
import os
import re
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest

from engine.cluster_harness import PYTHONPATH, plugin_processes
from engine.harness import PROMPTS, TARGET, held_out_prompts, run_engine
from prove_serve import BODY, ask, deployment

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
KINDS = (
    "vllm-dflash up",
    r"ray::\S+vllm-dflash[#:]Replica",
    r"ray::\S+vllm-dflash[#:]Ingress",
    "VLLM::EngineCore",
    "VLLM::Worker",
)
"""Processes by their names; Ray calls a replica by its actor's name or, once it has answered, by
its class and deployment."""


KEY = "sk-of-a-test"


def status(url: str, key: str | None) -> int:
    """What a GET with this API key is answered with."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=60
        ) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("signalled", [KeyboardInterrupt, SystemExit])
def test_a_signal_while_the_replicas_start(
    signalled: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that goes on, Serve went on starting them without the command."""
    import ray.serve
    import ray.serve.llm

    from vllm_dflash.cluster import serve
    from vllm_dflash.cluster.settings import EngineSettings

    deleted: list[str] = []

    def interrupted(*args: object, **kwargs: object) -> None:
        raise signalled

    monkeypatch.setattr(serve, "connect", lambda *a, **k: nullcontext({"env_vars": {}}))
    monkeypatch.setattr(serve, "check_engine", lambda *args: None)
    monkeypatch.setattr(ray.serve, "start", lambda **kwargs: None)
    monkeypatch.setattr(ray.serve, "run", interrupted)
    monkeypatch.setattr(ray.serve, "delete", deleted.append)
    monkeypatch.setattr(ray.serve.llm, "build_openai_app", lambda args: None)
    with pytest.raises(signalled):
        serve.up(serve.Serving(EngineSettings(str(TARGET), device="cpu"), "name"))
    assert deleted == [serve.APPLICATION]


def test_it_answers_from_processes_that_all_have_the_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    reports, files = (
        tmp_path / "reports",
        Path(os.environ.get("TMPDIR", "/tmp"), f"up-{os.getpid()}"),
    )
    reports.mkdir()
    files.mkdir()
    monkeypatch.setenv("VLLM_DFLASH_REPORT", str(reports))
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with deployment(files, "1") as url:
        prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:4]]
        answers = [
            ask(url, BODY | {"prompt": prompt, "ignore_eos": True}, key=KEY)["choices"][0]["text"]
            for prompt in prompts
        ]
        for path, key in (
            ("/v1/completions", None),
            ("/v1/models", "wrong"),
            ("/tokenize", None),
            ("/docs", None),
        ):
            assert status(url + path, key) == 401, path
        assert status(f"{url}/v1/models", KEY) == 200
        processes = plugin_processes(reports)
    print("", *processes, sep="\n  ")
    assert all(processes.values())
    assert [kind for kind in KINDS if not any(re.search(kind, name) for name in processes)] == []
    assert not [name for name in plugin_processes(reports) if "Worker" in name], (
        "something was left running"
    )
    monkeypatch.delenv("PYTHONPATH")
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    plain = run_engine(TARGET, None, held_out_prompts(4), max_tokens=BODY["max_tokens"])[0]
    assert answers == [tokenizer.decode(tokens) for tokens in plain.tokens]
