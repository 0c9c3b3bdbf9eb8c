"""A soak: mixed random requests on a KV cache small enough to preempt, every greedy output against
its twin without speculation.

Two engines (V1, float32, the embedded pair) in processes of their own get the same requests, round
after round: prompts and outputs of random lengths, greedy and sampled, penalties, stop tokens,
logprobs, structured output, n > 1, seeds, arrivals in mid-flight. In the one with the drafter some
requests are aborted in mid-flight too. Ends with 1 at the first difference, crash or leak.

    python tests/soak.py --minutes 30       (make soak)
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from engine.harness import DRAFTER, PROMPTS, TARGET, engine_env

PAGES = 10
"""Pages of 128 tokens in the KV cache: a handful of requests fill it."""
MAX_MODEL_LEN = 512
PREFIXES = 6
"""Prompts start with one of so many texts, so that the prefix cache has hits."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}


def draw_round(
    rng: random.Random, texts: list[list[int]], size: int, vocab: int
) -> list[dict[str, Any]]:
    """``size`` random requests: prompt, sampling parameters, the engine step at which each arrives
    and, for some, is aborted."""
    requests = []
    for i in range(size):
        shared = rng.choice(texts[:PREFIXES])[: rng.randint(1, 160)] if rng.random() < 0.5 else []
        prompt = [
            *shared,
            *rng.choice(texts)[: rng.randint(1, 120)],
            *[rng.randrange(2, vocab) for _ in range(rng.randint(0, 6))],
        ]
        params: dict[str, Any] = {
            "max_tokens": rng.choice([1, 2, 8, 40, 120, 200]),
            "ignore_eos": rng.random() < 0.7,
        }
        kind = rng.choice(
            [
                "greedy",
                "greedy",
                "greedy",
                "penalties",
                "stop",
                "logprobs",
                "schema",
                "sampled",
                "seeded",
                "many",
            ]
        )
        params["temperature"] = 0.0
        if kind == "penalties":
            params |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
        elif kind == "stop":
            params |= {
                "stop_token_ids": rng.sample(range(vocab), 40),
                "min_tokens": min(params["max_tokens"], rng.choice([0, 5])),
            }
        elif kind == "logprobs":
            params |= {"logprobs": 3}
        elif kind == "schema":
            params |= {"schema": SCHEMA}
        elif kind in ("sampled", "seeded"):
            params |= {
                "temperature": rng.choice([0.3, 0.8, 1.2]),
                "top_p": rng.choice([1.0, 0.9]),
                "top_k": rng.choice([0, 20]),
            }
            params |= {"seed": rng.randrange(1000)} if kind == "seeded" else {}
        elif kind == "many":
            params |= {"n": 2, "temperature": 0.7}
        requests.append(
            {
                "id": i,
                "kind": kind,
                "prompt": prompt[: MAX_MODEL_LEN - 8],
                "params": params,
                "arrives": rng.randint(0, 60),
            }
        )
        if rng.random() < 0.1:
            requests[-1]["aborted_after"] = rng.randint(0, 40)
    return requests


def serve(drafter: str | None, results: str) -> None:
    """One engine's process: a round of requests a line on standard input, what came of it a line in
    ``results``."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    speculative: dict[str, Any] = {}
    if drafter:
        # With the controller: drafts of every length, and times without any, are the harder case.
        speculative = {
            "speculative_config": {
                "method": "dflash",
                "model": drafter,
                "num_speculative_tokens": 7,
            },
            "additional_config": {"dflash": {"adaptive": True}},
        }
    llm = LLM(
        str(TARGET),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=PAGES,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=False,
        generation_config="vllm",
        **speculative,
    )
    engine = llm.llm_engine
    with open(results, "w", buffering=1) as out:
        print(json.dumps({"ready": True}), file=out)
        for number, line in enumerate(sys.stdin):
            requests = json.loads(line)
            finished: dict[int, list[list[int]]] = {}
            aborts, step = {}, 0
            waiting = sorted(requests, key=lambda r: r["arrives"])
            while waiting or engine.has_unfinished_requests():
                while waiting and waiting[0]["arrives"] <= step:
                    request = waiting.pop(0)
                    fields = dict(request["params"], output_kind=RequestOutputKind.FINAL_ONLY)
                    if not drafter:
                        fields.pop(
                            "seed", None
                        )  # without a drafter a seed and a prompt in chunks end vLLM's CPU engine
                    if "schema" in fields:
                        fields["structured_outputs"] = StructuredOutputsParams(
                            json=fields.pop("schema")
                        )
                    engine.add_request(
                        f"{number}-{request['id']}",
                        TokensPrompt(prompt_token_ids=request["prompt"]),
                        SamplingParams(**fields),
                    )
                    if drafter and "aborted_after" in request:
                        aborts[f"{number}-{request['id']}"] = step + request["aborted_after"]
                for name in [name for name, at in aborts.items() if at <= step]:
                    engine.abort_request([name])
                    del aborts[name]
                for output in engine.step():
                    if output.finished:
                        finished[int(output.request_id.split("-")[1])] = [
                            list(o.token_ids) for o in output.outputs
                        ]
                step += 1
            metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
            wanted = (
                "num_preemptions",
                "spec_decode_num_drafts",
                "spec_decode_num_accepted_tokens",
                "prefix_cache_hits",
            )
            report = {"outputs": finished, "steps": step, "resident_mb": resident_mb()}
            print(
                json.dumps(report | {name: metrics.get(f"vllm:{name}", 0) for name in wanted}),
                file=out,
            )


def resident_mb() -> float:
    """This process's resident memory, in megabytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Engine:
    """The driver's end of one engine's process."""

    def __init__(self, drafter: Path | None, scratch: Path) -> None:
        name = "dflash" if drafter else "plain"
        self.results, self.log = scratch / f"{name}.jsonl", scratch / f"{name}.log"
        self.results.touch()
        command = [
            sys.executable,
            __file__,
            "--serve",
            str(self.results),
            *(["--drafter", str(drafter)] if drafter else []),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            text=True,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=engine_env({"OMP_NUM_THREADS": "1"}),
        )
        self.reader = self.results.open()
        self.read()

    def send(self, requests: list[dict[str, Any]]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """The next report; raises with the end of the engine's log if its process has ended."""
        text = ""
        while not text.endswith("\n"):
            text += self.reader.readline()
            if not text and self.process.poll() is not None:
                raise SystemExit(
                    "an engine ended with"
                    f" {self.process.returncode}:\n{self.log.read_text()[-5000:]}"
                )
            time.sleep(0 if text else 0.02)
        return json.loads(text)


@dataclass
class Tally:
    """What a soak has seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    aborted: int = 0
    resident_mb: list[float] = field(default_factory=list)
    plain_mb: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def compare(
        self, requests: list[dict[str, Any]], plain: dict[str, Any], dflash: dict[str, Any]
    ) -> None:
        """Greedy outputs must be equal, and each request must have ended unless it was aborted."""
        for request in requests:
            name, params = str(request["id"]), request["params"]
            twin, ours = plain["outputs"].get(name), dflash["outputs"].get(name)
            self.kinds[request["kind"]] += 1
            if ours is None or ("aborted_after" in request and ours != twin):
                assert "aborted_after" in request, f"a request was lost: {request}"
                self.aborted += 1
                continue
            assert twin is not None
            assert [len(o) > 0 for o in ours] == [True] * params.get("n", 1), (
                f"an empty output: {request}"
            )
            if params["temperature"] == 0:
                assert ours == twin, (
                    f"not the target's own output\n{request}\nwithout {twin}\nwith    {ours}"
                )
                self.compared += 1
        self.resident_mb.append(dflash["resident_mb"])
        self.plain_mb.append(plain["resident_mb"])
        self.last = dflash

    @staticmethod
    def growth_mb(resident_mb: list[float]) -> float:
        """How much the median resident memory of the last third is above that of the second; the
        first warms up."""
        third = len(resident_mb) // 3
        return (
            statistics.median(resident_mb[-third:])
            - statistics.median(resident_mb[third : 2 * third])
            if third
            else 0.0
        )


def soak(minutes: float, seed: int) -> Tally:
    """Runs for ``minutes``; raises AssertionError or SystemExit at the first thing that is
    wrong."""
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer, rng, tally = AutoTokenizer.from_pretrained(TARGET), random.Random(seed), Tally()
    texts = [
        tokenizer(json.loads(line)["prompt"])["input_ids"]
        for line in PROMPTS.read_text().splitlines()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        engines = [Engine(None, Path(scratch)), Engine(DRAFTER, Path(scratch))]
        end = time.monotonic() + minutes * 60
        with tqdm(total=round(minutes * 60), unit="s", desc="soak") as bar:
            while time.monotonic() < end:
                requests = draw_round(rng, texts, 32, len(tokenizer))
                for engine in engines:
                    engine.send(requests)
                tally.compare(requests, *[engine.read() for engine in engines])
                bar.update(round(minutes * 60 - max(0.0, end - time.monotonic())) - bar.n)
                bar.set_postfix(
                    compared=tally.compared,
                    preempted=tally.last["num_preemptions"],
                    mb=round(tally.resident_mb[-1]),
                )
        for engine in engines:
            assert engine.process.stdin is not None
            engine.process.stdin.close()
            assert engine.process.wait(60) == 0, engine.log.read_text()[-3000:]
    return tally


def report(tally: Tally) -> str:
    last = tally.last
    tau = 1 + last["spec_decode_num_accepted_tokens"] / max(1, last["spec_decode_num_drafts"])
    return (
        f"{sum(tally.kinds.values())} requests"
        f" ({', '.join(f'{n} {kind}' for kind, n in sorted(tally.kinds.items()))});"
        f" {tally.compared} greedy outputs equal to their twins', {tally.aborted} aborted,"
        f" {last['num_preemptions']} preemptions, {last['prefix_cache_hits']} prompt tokens from"
        f" the prefix cache, tau {tau:.2f}; memory {tally.resident_mb[0]:.0f} MB after the first"
        f" round, {tally.resident_mb[-1]:.0f} MB at the end"
        f" ({tally.growth_mb(tally.resident_mb):+.1f} MB from the second third to the last; without"
        f" the drafter {tally.growth_mb(tally.plain_mb):+.1f} MB)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", metavar="RESULTS", help=argparse.SUPPRESS)
    parser.add_argument("--drafter", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.drafter, args.serve)
        return 0
    tally = soak(args.minutes, args.seed)
    print(report(tally))
    assert tally.last["num_preemptions"] > 0, (
        "nothing was preempted: the KV cache is too large for this to say anything"
    )
    assert args.minutes < 10 or tally.growth_mb(tally.resident_mb) < 30, "memory grows"
    return 0


if __name__ == "__main__":
    sys.exit(main())
