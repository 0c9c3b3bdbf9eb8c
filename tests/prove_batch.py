"""The long proofs of `vllm-dflash batch`, by hand: 512 prompts on two replicas with a kill between,
and 200,000 rows with flat memory.

    .venv/bin/python tests/prove_batch.py rows --folder /tmp/proof  (8 minutes on two cores)
    .venv/bin/python tests/prove_batch.py stream --folder /tmp/proof     (about 3)
    .venv/bin/python tests/prove_batch.py overhead --folder /tmp/proof   (about 5)

`rows` runs the command itself, ends it with SIGKILL in mid-run, runs it again, and compares with
vLLM's LLM without a drafter in one process. `stream` answers with a stand-in for the engine, and
watches the memory of this process and of the actors.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cluster_workers import Counting, StandIn  # noqa: E402
from engine.harness import DRAFTER, PROMPTS, TARGET  # noqa: E402
from vllm_dflash.cluster.batch import Job, complete  # noqa: E402
from vllm_dflash.cluster.parts import index  # noqa: E402
from vllm_dflash.cluster.settings import EngineSettings  # noqa: E402

ROWS, TOKENS = 512, 48
ENGINE = EngineSettings(
    str(TARGET),
    str(DRAFTER),
    "cpu",
    7,
    dtype="float32",
    max_model_len=512,
    engine_args={"kv_cache_memory_bytes": 1 << 28},
)
SAMPLING = {"temperature": 0.0, "max_tokens": TOKENS}


def write_rows(path: Path) -> list[str]:
    """512 different prompts, cut from the embedded pair's 128."""
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    prompts = [text[: len(text) * share // 4] for share in (4, 3, 2, 1) for text in texts][:ROWS]
    path.write_text(
        "".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts))
    )
    return prompts


def one_process(prompts: list[str], path: Path, drafted: bool = False) -> dict:
    """vLLM's own LLM, without a drafter unless ``drafted``: what the rows have to equal, and the
    time it takes. Kept in ``path``."""
    if not path.is_file():
        code = (
            "import json, sys, time\nfrom vllm import LLM, SamplingParams\njob ="
            " json.load(sys.stdin)\nbegan = time.monotonic()\nllm = LLM(**job['args'])\nready ="
            " time.monotonic()\noutputs = llm.generate(job['prompts'],"
            " SamplingParams(**job['sampling']), use_tqdm=False)\nended = time.monotonic()\nrows ="
            " [[o.outputs[0].text, o.outputs[0].finish_reason, len(o.outputs[0].token_ids)] for o"
            " in outputs]\njson.dump({'rows': rows, 'start': ready - began, 'seconds': ended -"
            " ready}, open(job['out'], 'w'))\n"
        )
        args = {
            "model": str(TARGET),
            "dtype": "float32",
            "max_model_len": 512,
            "kv_cache_memory_bytes": 1 << 28,
            "enforce_eager": True,
        }
        job = {"args": args, "prompts": prompts, "sampling": SAMPLING, "out": str(path)}
        if drafted:
            args |= {"max_num_seqs": 32}
            args["speculative_config"] = {
                "method": "dflash",
                "model": str(DRAFTER),
                "num_speculative_tokens": 7,
            }
        env = os.environ | {
            "VLLM_DFLASH": str(int(drafted)),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(job), text=True, env=env, check=True
        )
    return json.loads(path.read_text())


def command(folder: Path) -> list[str]:
    """The command under test."""
    return [
        str(Path(sys.executable).with_name("vllm-dflash")),
        "batch",
        str(folder / "rows.jsonl"),
        "--out",
        str(folder / "answers"),
        "--target",
        str(TARGET),
        "--draft",
        str(DRAFTER),
        "--device",
        "cpu",
        "-k",
        "7",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--engine-args",
        '{"kv_cache_memory_bytes": 268435456}',
        "--replicas",
        "2",
        "--max-tokens",
        str(TOKENS),
        "--rows-per-part",
        "16",
    ]


def prove_rows(folder: Path) -> None:
    """512 rows, killed once."""
    prompts = write_rows(folder / "rows.jsonl")
    expected = one_process(prompts, folder / "one-process.json")
    parts = index([str(folder / "rows.jsonl")], 16).parts
    answers, began = folder / "answers", time.monotonic()
    first = subprocess.Popen(command(folder), start_new_session=True)
    while len(list(answers.glob("part-*.jsonl"))) < 10:
        assert first.poll() is None, "the command ended by itself"
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    seconds = time.monotonic() - began
    kept = {path.name: path.stat().st_mtime_ns for path in answers.glob("part-*.jsonl")}
    print(
        f"killed after {seconds:.0f} s with {len(kept)} of {len(parts)} parts written", flush=True
    )
    time.sleep(10)
    began = time.monotonic()
    subprocess.run(command(folder), check=True)
    print(f"the rest: {time.monotonic() - began:.0f} s")
    assert all((answers / name).stat().st_mtime_ns == written for name, written in kept.items()), (
        "a part was done twice"
    )
    rows = [
        json.loads(line)
        for path in sorted(answers.glob("part-*.jsonl"))
        for line in path.read_text().split("\n")
        if line
    ]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [
        [r["completion"], r["finish_reason"], r["completion_tokens"]] for r in rows
    ] == expected["rows"]
    print(
        f"{ROWS} rows, each once, all equal to one process without a drafter"
        f" ({expected['start']:.0f} s start, {expected['seconds']:.0f} s)"
    )


def prove_sums(folder: Path) -> None:
    """Again without a kill, with the engines' own counters: they have to be the sums over the
    rows."""
    write_rows(folder / "rows.jsonl")
    os.environ["PYTHONPATH"] = str(HERE)
    out, began = folder / f"sums-{os.getpid()}", time.monotonic()
    sums = complete(Job([str(folder / "rows.jsonl")], out, ENGINE, SAMPLING, 2, 16), Counting)
    engines = [json.loads(path.read_text()) for path in (out / "_batch").glob("counters-*")]
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        print(
            f"{name}: rows {sums[name]}, engines"
            f" {' + '.join(f'{engine[name]:.0f}' for engine in engines)}"
        )
        assert sums[name] == sum(engine[name] for engine in engines)
    print(
        f"{len(engines)} engines, {time.monotonic() - began:.0f} s in all, tau"
        f" {1 + sums['accepted_tokens'] / sums['drafts']:.3f}"
    )


def prove_overhead(folder: Path) -> None:
    """One replica against vLLM's LLM with the same drafter in one process, 32 requests at a time,
    from the first row to the last; three turns.

    Set OMP_NUM_THREADS: Ray gives an actor its own number of threads otherwise.
    """
    prompts = write_rows(folder / "rows.jsonl")
    engine = replace(ENGINE, engine_args=ENGINE.engine_args | {"max_num_seqs": 32})
    ratios = []
    for turn in range(3):
        alone = one_process(prompts, folder / f"drafted-{os.getpid()}-{turn}.json", drafted=True)
        out = folder / f"overhead-{os.getpid()}-{turn}"
        complete(Job([str(folder / "rows.jsonl")], out, engine, SAMPLING, 1, 32))
        written = sorted(path.stat().st_mtime for path in out.glob("part-*"))
        # The engine has begun before the first part is there: parts of as many rows, from the end
        # of one to the end of the last.
        batch = (written[-1] - written[0]) * len(written) / (len(written) - 1)
        ratios.append(batch / alone["seconds"])
        print(
            f"{ROWS} rows: {alone['seconds']:.1f} s in one process, {batch:.1f} s through Ray Data",
            flush=True,
        )
    print(
        f"through Ray Data / in one process: {sorted(ratios)[1]:.3f} (median of"
        f" {', '.join(f'{ratio:.3f}' for ratio in ratios)})"
    )


def prove_stream(folder: Path) -> None:
    """200,000 rows of 2 kB through the stand-in."""
    path, count = folder / "many.jsonl", 200_000
    with path.open("w") as file:
        file.writelines(
            json.dumps({"id": i, "prompt": f"{i} " + "x" * 2000}) + "\n" for i in range(count)
        )
    os.environ["PYTHONPATH"] = str(HERE)
    samples: list[tuple[float, float, float]] = []
    stop, began = threading.Event(), time.monotonic()
    watcher = threading.Thread(target=_watch, args=(samples, stop, began))
    watcher.start()
    sums = complete(Job([str(path)], folder / f"stream-{os.getpid()}", ENGINE, {}, 2, 64), StandIn)
    stop.set()
    watcher.join()
    assert (sums["rows"], sums["failed"]) == (count, 0)
    print(
        f"{count} rows, {path.stat().st_size / 1e6:.0f} MB in {time.monotonic() - began:.0f}"
        " s\nseconds  this process, MB  largest actor, MB"
    )
    for sample in samples[:: max(1, len(samples) // 12)]:
        print(f"{sample[0]:7.0f}  {sample[1]:16.0f}  {sample[2]:17.0f}")


def _watch(samples: list[tuple[float, float, float]], stop: threading.Event, began: float) -> None:
    while not stop.wait(1):
        actors = [
            _resident(p.parent)
            for p in Path("/proc").glob("[0-9]*/cmdline")
            if _command(p).startswith("ray::") and "IDLE" not in _command(p)
        ]
        samples.append(
            (time.monotonic() - began, _resident(Path("/proc/self")), max(actors, default=0.0))
        )


def _command(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _resident(process: Path) -> float:
    try:
        return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def main() -> None:
    """Runs one of the proofs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    proofs = {
        "rows": prove_rows,
        "sums": prove_sums,
        "stream": prove_stream,
        "overhead": prove_overhead,
    }
    parser.add_argument("proof", choices=proofs)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "prove-batch")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    proofs[args.proof](args.folder)


if __name__ == "__main__":
    main()
