"""The long proofs of `vllm-dflash up`, by hand: traffic to two replicas, one killed under load, and
1 -> 2 -> 1 by load.

    .venv/bin/python tests/prove_serve.py kill       (about 6 minutes on two cores)
    .venv/bin/python tests/prove_serve.py scale      (about 6)
    .venv/bin/python tests/prove_serve.py overhead   (about 4)

`kill` sends `vllm bench serve` traffic, then ends one replica's process while clients ask, and says
what became of every request. With `prometheus` on the path, a real one scrapes what Ray's service
discovery names.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from clients import Clients  # noqa: E402
from engine.harness import DRAFTER, PROMPTS, TARGET  # noqa: E402
from engine.test_serve import server  # noqa: E402
from examples.demos.ports import free_port  # noqa: E402
from monitoring import queries  # noqa: E402
from prometheus import scraping_ray  # noqa: E402

BODY = {"model": "pair", "max_tokens": 48, "temperature": 0}


@contextmanager
def deployment(folder: Path, replicas: str, *more: str) -> Iterator[str]:
    """`vllm-dflash up` on the embedded pair; yields its address once it serves. Its Ray files are
    in ``folder``."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm-dflash")),
        "up",
        "--target",
        str(TARGET),
        "--draft",
        str(DRAFTER),
        "-k",
        "7",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--engine-args",
        '{"kv_cache_memory_bytes": 268435456}',
        "--name",
        "pair",
        "--replicas",
        replicas,
        "--port",
        str(port),
        *more,
    ]
    began = time.monotonic()
    log = (folder / "up.log").open("w")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        env=os.environ | {"RAY_TMPDIR": str(folder)},
        start_new_session=True,
    )
    try:
        while "serving pair at" not in (folder / "up.log").read_text():
            assert process.poll() is None, (folder / "up.log").read_text()[-3000:]
            time.sleep(0.5)
        print(f"{replicas} replicas ready after {time.monotonic() - began:.0f} s", flush=True)
        yield f"http://127.0.0.1:{port}"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        print(f"stopped with {process.wait(180)} in {time.monotonic() - began:.0f} s", flush=True)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ask(
    url: str, body: dict[str, Any], seconds: float = 120, key: str | None = None
) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    call = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(call, timeout=seconds) as response:
        return json.loads(response.read())


def replicas() -> list[int]:
    """Processes of replicas, by Ray's names for them, which differ while they work and while they
    wait."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_text()
        except OSError:
            continue
        if title.startswith("ray::") and "Replica:pair" in title:
            found.append(int(path.parent.name))
    return found


def running(folder: Path) -> int:
    """Replicas that Serve counts as running."""
    # Read when Ray is imported; a cluster that `up` starts asks for tokens.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(address=_address(folder), log_to_driver=False)
    deployments = serve.status().applications["vllm-dflash"].deployments
    return sum(
        each.replica_states.get("RUNNING", 0)
        for name, each in deployments.items()
        if "pair" in name
    )


def _address(folder: Path) -> str:
    """Of the cluster whose files are in ``folder``: its raylet's command line names it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if words[0].endswith("/raylet") and any(str(folder) in word for word in words):
            return next(
                word.partition("=")[2] for word in words if word.startswith("--gcs-address")
            )
    raise AssertionError(f"no cluster has its files in {folder}")


def until(what: str, reached: Callable[[], bool], seconds: float = 240) -> float:
    """Waits; the seconds that it took."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)
    return time.monotonic() - began


class Load(Clients):
    """Clients that each ask one request after the other until they are stopped."""

    def __init__(self, url: str, clients: int) -> None:
        super().__init__(clients)
        self.outcomes: list[tuple[float, float, str]] = []
        """When it began and ended, and what came: ok, or the error."""
        self._url = url
        self._prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]

    def ask_one(self, number: int) -> None:
        began, said = time.monotonic(), "ok"
        try:
            ask(
                self._url,
                BODY | {"prompt": self._prompts[number % len(self._prompts)], "ignore_eos": True},
            )
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}: {error.read().decode()[:160]}"
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        self.outcomes.append((began, time.monotonic(), said))


def bench(url: str) -> None:
    """`vllm bench serve`, 64 requests of 8 clients."""
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "bench",
        "serve",
        "--base-url",
        url,
        "--endpoint",
        "/v1/completions",
        "--model",
        "pair",
        "--tokenizer",
        str(TARGET),
        "--dataset-name",
        "custom",
        "--dataset-path",
        str(PROMPTS),
        "--custom-output-len",
        "48",
        "--skip-chat-template",
        "--disable-shuffle",
        "--num-prompts",
        "64",
        "--max-concurrency",
        "8",
        "--ignore-eos",
        "--disable-tqdm",
    ]
    env = os.environ | {"VLLM_DFLASH": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    wanted = ("Successful", "Failed", "Output token", "Request throughput", "Mean TTFT", "P99 TTFT")
    print(
        *(line for line in out.stdout.splitlines() if line.startswith(wanted)), sep="\n", flush=True
    )
    if out.returncode:
        print(out.stderr[-2000:], flush=True)


def prove_kill(folder: Path, url: str) -> None:
    """Traffic, a replica's end, and its replacement."""
    print(f"replicas running: {running(folder)}, processes {replicas()}", flush=True)
    bench(url)
    with prometheus(folder) as look, Load(url, 8) as load:
        time.sleep(8)
        victim, killed = replicas()[0], time.monotonic()
        os.kill(victim, signal.SIGKILL)
        noticed = until("Serve to notice", lambda: running(folder) < 2, 120)
        back = until("two replicas", lambda: running(folder) == 2, 600)
        print(
            f"killed {victim}: noticed after {noticed:.1f} s, two running again after"
            f" {noticed + back:.0f} s",
            flush=True,
        )
        time.sleep(10)
        look()
    lost = [each for each in load.outcomes if each[2] != "ok"]
    print(
        f"{len(load.outcomes)} requests of 8 clients, {len(lost)} failed, longest"
        f" {max(each[1] - each[0] for each in load.outcomes):.1f} s"
    )
    print(
        "errors:",
        *(f"\n  {count} x {said}" for said, count in Counter(each[2] for each in lost).items()),
    )
    print(
        f"of the failed, began after the kill: {sum(each[0] > killed for each in lost)}", flush=True
    )


def prove_overhead(folder: Path, url: str) -> None:
    """One replica against `vllm serve` with the same drafter: the same traffic to each in turn."""
    speculative = json.dumps(
        {"method": "dflash", "model": str(DRAFTER), "num_speculative_tokens": 7}
    )
    with server("--speculative-config", speculative, "--served-model-name", "pair") as port:
        for turn in range(3):
            print(f"turn {turn}: vllm serve", flush=True)
            bench(f"http://127.0.0.1:{port}")
            print(f"turn {turn}: up, one replica", flush=True)
            bench(url)


def prove_scale(folder: Path, url: str) -> None:
    """One replica, two under load, one again."""
    assert running(folder) == 1
    with Load(url, 16) as load:
        print(
            f"1 -> 2 after {until('two replicas', lambda: running(folder) == 2, 600):.0f} s of load"
            " of 16 clients",
            flush=True,
        )
        time.sleep(60)
    print(
        f"{len(load.outcomes)} requests, {sum(each[2] != 'ok' for each in load.outcomes)} failed",
        flush=True,
    )
    print(
        f"2 -> 1 after {until('one replica', lambda: running(folder) == 1, 1200):.0f} s without"
        " load"
    )


@contextmanager
def prometheus(folder: Path) -> Iterator[Callable[[], None]]:
    """A real one on ``monitoring/prometheus/ray.yml``, fed by Ray's service discovery; what is
    yielded prints what it knows of each replica."""
    if shutil.which("prometheus") is None:
        print("no prometheus on the path: what replicas export is not looked at")
        yield lambda: None
        return
    values = {"instance": ".*", "model": ".*", "engine": ".*", "__rate_interval": "1m", "docs": ""}
    with scraping_ray(
        folder / "ray" / "prom_metrics_service_discovery.json", folder / "prometheus"
    ) as address:

        def look() -> None:
            time.sleep(15)
            for expression in (
                "vllm:generation_tokens_total",
                "vllm_dflash_output_tokens_total",
                "vllm_dflash_accepted_length_count",
            ):
                for found in queries.ask(
                    address, "query", query=f"sum by (model_name, engine) ({expression})"
                )["result"]:
                    print(expression, found["metric"], found["value"][1])
            panels = queries.panel_queries(json.loads(queries.DASHBOARD.read_text()), values)
            empty = {
                query.place
                for query in panels
                if not queries.ask(address, "query", query=query.expression)["result"]
            }
            print(
                f"{len(panels)} queries of the dashboard; without samples:"
                f" {', '.join(sorted(empty)) or 'none'}",
                flush=True,
            )

        yield look


def main() -> None:
    """Runs one of the proofs, on a deployment of its own or on one that runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    proofs = {
        "kill": (prove_kill, ["2"]),
        "scale": (prove_scale, ["1,2", "--requests-per-replica", "4"]),
        "overhead": (prove_overhead, ["1"]),
    }
    parser.add_argument("proof", choices=proofs)
    parser.add_argument("--url", help="of a deployment that runs, named pair")
    parser.add_argument("--folder", type=Path, help="its RAY_TMPDIR")
    args = parser.parse_args()
    proof, flags = proofs[args.proof]
    if args.url:
        return proof(args.folder, args.url)
    folder = Path(tempfile.mkdtemp(prefix="up-", dir="/tmp"))
    with deployment(folder, *flags) as url:
        proof(folder, url)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
