"""Another drafter in an engine that runs: what it drafts then is the new one's, what it writes
stays the target's, and a bad one changes nothing.

    pytest tests/engine/test_swap.py
"""

import http.client
import json
import random
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients import Clients
from engine import forks
from engine.harness import DRAFTER, TARGET, held_out_prompts, run_engine
from engine.reloads import MAX_TOKENS, job, redraw, run, wrong_drafts
from engine.test_serve import fork, metric, request, server, until_it_says
from vllm_dflash.cli import main
from vllm_dflash.swap.turns import PATH
from vllm_dflash.weights.identity import id_of_folder

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ALWAYS = ("--additional-config", '{"dflash": {"adaptive": false}}')
"""Flags: without them the noisy drafter is soon not asked any more, and its tau cannot be told."""
DRAFTS = 400
"""Between two swaps. Their tau tells a drafter from the noisy one: it is known to a fortieth."""
EXTENSION = {"worker_extension_cls": "vllm_dflash.swap.worker.DrafterSwap"}


def spoiled(folder: Path, new: Path, name: str, value: float) -> Path:
    """A copy whose tensor ``name`` holds ``value`` once."""
    shutil.copytree(folder, new)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = value
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return new


@pytest.fixture(scope="module")
def reports(
    random_target: Path, random_drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, dict[str, Any]]]:
    """By runner, what an engine wrote and drafted after each change."""
    folder = tmp_path_factory.mktemp("swaps")
    other = redraw(random_drafter, folder / "other", ".", 7)
    bad = spoiled(random_drafter, folder / "bad", "norm.weight", torch.nan)
    paths = {"first": random_drafter, "other": other, "refused": bad, "back": random_drafter}

    @cache
    def of(runner: str) -> dict[str, dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"how": "nothing"}]
        steps += [{"how": "draft swap", "path": path} for path in list(paths.values())[1:]]
        plain = job(random_target, None, [{"how": "nothing"}], runner)
        swapping = job(random_target, random_drafter, steps, runner, **EXTENSION)
        (alone,), found = run([plain, swapping], runner)
        by_step = dict(zip(paths, found, strict=True))
        return {"plain": alone} | {
            name: report | {"path": paths["other" if name == "refused" else name]}
            for name, report in by_step.items()
        }

    return of


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("step", ["first", "other", "refused", "back"])
def test_an_engine(
    reports: Callable[[str], dict[str, dict[str, Any]]], random_target: Path, runner: str, step: str
) -> None:
    """Drafts are plain PyTorch's with the drafter in force; the text is the target's alone."""
    found = reports(runner)
    if step == "refused":
        assert "NaN" in found[step]["error"]
    else:
        assert found[step]["error"] is None
    assert found[step]["tokens"] == found["plain"]["tokens"]
    assert all(len(tokens) == MAX_TOKENS[runner] for tokens in found[step]["tokens"])
    wrong, count = wrong_drafts(found[step], random_target, found[step]["path"])
    assert wrong == 0
    assert count > 20


class Mixture(Clients):
    """Requests without a pause: greedy ones, each against what plain decoding writes, sampled ones,
    and streams that are broken off."""

    def __init__(self, port: int, prompts: list[list[int]], expected: list[list[int]]) -> None:
        super().__init__(4)
        self.port, self.prompts, self.expected = port, prompts, expected
        self.greedy = self.sampled = self.broken = 0
        self.wrong: list[Any] = []
        self._dice = [random.Random(seed) for seed in range(4)]

    def ask_one(self, number: int) -> None:
        dice = self._dice[number]
        at, kind = dice.randrange(len(self.prompts)), dice.random()
        body = {
            "model": "embedded",
            "prompt": self.prompts[at],
            "max_tokens": len(self.expected[at]),
            "temperature": 0,
            "return_token_ids": True,
        }
        try:
            if kind < 0.1:
                self._break_off(body | {"stream": True})
            elif kind < 0.25:
                request(self.port, "/v1/completions", body | {"temperature": 1.0})
                self.sampled += 1
            else:
                answer = json.loads(request(self.port, "/v1/completions", body))
                self.greedy += 1
                if answer["choices"][0]["token_ids"] != self.expected[at]:
                    self.wrong.append((at, answer["choices"][0]["token_ids"]))
        except Exception as error:
            self.wrong.append(repr(error))

    def _break_off(self, body: dict[str, Any]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        connection.getresponse().read(200)
        connection.close()
        self.broken += 1


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``make_drafters``."""
    return make_drafters(tmp_path_factory.mktemp("drafters"))


def make_drafters(folder: Path) -> Path:
    """A folder of drafters: ``good``, ``noisy`` (the same with noise, so that tau tells), and some
    that are refused."""
    shutil.copytree(DRAFTER, folder / "good")
    shutil.copytree(DRAFTER, folder / "noisy")
    tensors = load_file(DRAFTER / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            noise = torch.randn(tensor.shape, generator=generator) * 0.6 * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "noisy" / "model.safetensors", metadata={"format": "pt"})
    (folder / "noisy" / "training.json").unlink()
    spoiled(folder / "good", folder / "nan", "norm.weight", torch.nan)
    shutil.copytree(folder / "good", folder / "smaller")
    config = json.loads((folder / "smaller" / "config.json").read_text())
    config["block_size"] = 4
    (folder / "smaller" / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def swappable(
    drafters: Path, *more: str, ends_itself: bool = False, logs: list[Path] | None = None
) -> Iterator[int]:
    """A server with the endpoint, on the loopback; ``ends_itself`` as ``server``'s. Its log's place
    is added to ``logs``."""
    speculative = json.dumps({"method": "dflash", "model": str(drafters / "good")})
    flags = (
        "--speculative-config",
        speculative,
        "--middleware",
        "vllm_dflash.swap.endpoint.DrafterEndpoint",
        "--worker-extension-cls",
        EXTENSION["worker_extension_cls"],
        *ALWAYS,
        *more,
    )
    env = {"VLLM_DFLASH_SWAP_FROM": str(drafters)}

    def start(command: list[str], env: dict[str, str], log: Path) -> forks.Fork:
        (logs if logs is not None else []).append(log)
        return fork(command, env, log)

    with server(*flags, env=env, start=start, ends_itself=ends_itself) as port:
        yield port


def which(port: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request(port, PATH))
    return found


def tau_since(port: int, before: tuple[float, float]) -> float:
    drafts, accepted = (now - then for now, then in zip(counts(port), before, strict=True))
    return 1 + accepted / drafts


def counts(port: int) -> tuple[float, float]:
    names = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    return metric(port, names[0]), metric(port, names[1])


def test_the_key_and_the_log(drafters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a key nobody swaps without it; and after a restart the command line's drafter serves."""
    logs: list[Path] = []
    with swappable(drafters, "--api-key", "secret", logs=logs) as port:
        url = f"http://127.0.0.1:{port}"
        until_it_says(port, "vllm_dflash_drafter_serving_since_seconds{")  # before any request
        assert main(["swap", "--server", url, "noisy"]) == 2
        assert "asks for its API key" in capsys.readouterr().err
        assert main(["swap", "--server", url, "noisy", "--api-key", "wrong"]) == 2
        assert "refuses the API key that was given" in capsys.readouterr().err
        assert main(["swap", "--server", url, "absent", "--api-key", "secret"]) == 1
        assert "no drafter is swapped in: " in logs[0].read_text()
        assert main(["swap", "--server", url, "noisy", "--api-key", "secret"]) == 0
        assert main(["swap", "--server", url, "--api-key", "secret"]) == 0
        log = logs[0].read_text()
        assert "Failed to load weights" not in log, "all that came has found its place"
        assert id_of_folder(drafters / "noisy") in capsys.readouterr().out
    with swappable(drafters) as port:
        assert which(port)["id"] == id_of_folder(drafters / "good")


def test_swaps_under_load(drafters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four clients without a pause, a swap every second or more in each of the two ways that keep
    context, refusals between: no request fails, no answer differs from plain decoding's, and tau is
    that of the drafter in force."""
    prompts = held_out_prompts(16)
    expected = run_engine(TARGET, None, prompts, max_tokens=64)[0].tokens
    ids = {name: id_of_folder(drafters / name) for name in ("good", "noisy")}
    taus: dict[str, list[float]] = {"good": [], "noisy": []}
    with swappable(drafters) as port, Mixture(port, prompts, expected) as clients:
        url = f"http://127.0.0.1:{port}"
        assert which(port)["id"] == ids["good"]
        assert which(port)["proved_tau"] == pytest.approx(5.46, abs=0.01)
        for turn in range(6):
            name = ("noisy", "good")[turn % 2]
            context = ("recompute", "leave")[turn // 2 % 2]
            assert main(["swap", "--server", url, name, "--context", context]) == 0
            assert which(port)["id"] == ids[name]
            for bad in ("nan", "smaller", "absent"):
                with pytest.raises(urllib.error.HTTPError):
                    request(port, PATH, {"drafter": bad})
            assert which(port)["id"] == ids[name]
            before, until = counts(port), time.monotonic() + 60
            while counts(port)[0] < before[0] + DRAFTS:
                assert time.monotonic() < until, "hardly anything is drafted"
                time.sleep(0.2)
            taus[name].append(tau_since(port, before))
        page = request(port, "/metrics")
        assert f'drafter_id="{ids["good"]}"' in page
        assert f'drafter_id="{ids["noisy"]}"' not in page, "the series of the one before has ended"
        swapped = 'result="swapped"'
        assert [
            line.rpartition(" ")[2]
            for line in page.splitlines()
            if line.startswith("vllm_dflash_drafter_swaps_total") and swapped in line
        ] == ["6.0"]
        refused = [
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith("vllm_dflash_drafter_swaps_total") and 'result="refused"' in line
        ]
        assert refused == [18.0], "absent folders too, which no rank was asked for"
    print(f"{clients.greedy} greedy, {clients.sampled} sampled, {clients.broken} broken; {taus}")
    assert clients.greedy > 40
    assert clients.wrong == []
    assert min(taus["good"]) > 1.2 * max(taus["noisy"]), taus


def test_a_public_address_without_a_key(drafters: Path) -> None:
    """The server does not start."""
    with pytest.raises(AssertionError, match="--api-key"), swappable(drafters, "--host", "0.0.0.0"):
        pass
