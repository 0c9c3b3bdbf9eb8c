"""``vllm-dflash batch``: every row of a data set through a target and its drafter, by Ray Data over
one engine a replica.

The input is cut into parts; Ray Data hands them to a pool of actors, and again to another where one
is lost. An answered part is a file that is whole or not there, so running the same command again
does what is left. Ray Data LLM's own processor is not used: its rows carry neither the finish
reason nor what was accepted, and it has no place for a row that ends the engine (docs/cluster.md).

    vllm-dflash batch prompts.jsonl --target T --draft D --out answers
    pytest tests/engine/test_cluster_batch.py
"""

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash import contents
from vllm_dflash.acceptance import tau
from vllm_dflash.cluster import parts
from vllm_dflash.cluster.command import settings_of
from vllm_dflash.cluster.completer import COUNTED, Completer, count
from vllm_dflash.cluster.connection import check_installed, connect
from vllm_dflash.cluster.room import RETRIES, Room
from vllm_dflash.cluster.rows import check_sampling
from vllm_dflash.cluster.settings import ClusterError, EngineSettings, engine_args, uses_ray
from vllm_dflash.files import RunError, claim, write_record
from vllm_dflash.lock import hold
from vllm_dflash.progress import Progress
from vllm_dflash.records import object_of

STATE = "_batch"
"""The folder in the output that holds no rows: readers of data sets pass over names that begin with
an underscore."""
_PLACED_S = 45
"""Until every replica's process has started, which does not wait for its engine; otherwise Ray
waits for room for ever."""
_PARTS_IN_FLIGHT = 2
"""A replica: while the last rows of one part end, the next part's fill the engine."""


@dataclass(frozen=True)
class Job:
    """A run."""

    inputs: Sequence[str]
    """Files of JSON lines or Parquet."""
    out: Path
    engine: EngineSettings
    sampling: dict[str, Any] = field(default_factory=dict)
    """Of vLLM's ``SamplingParams``."""
    replicas: int = 1
    rows_per_part: int = 64
    max_errors: int | None = None
    """Rows that may fail, those of earlier runs included; None: any number."""


def run(args: argparse.Namespace) -> int:
    """The command; 0 where every row was answered, 1 where a row or the run failed."""
    try:
        job = Job(
            args.inputs,
            args.out,
            settings_of(args),
            _sampling(args),
            args.replicas,
            args.rows_per_part,
            args.max_errors,
        )
        summary = complete(job)
    except RunError as error:
        print(f"vllm-dflash batch: {error}", file=sys.stderr)
        return 1
    print(_describe(summary, job.out))
    return 1 if summary["failed"] else 0


def complete(job: Job, completer: Any = Completer) -> dict[str, Any]:
    """Answers what is left of the input and returns the sums over all of it, those of earlier runs
    included.

    Raises:
        ClusterError: the input cannot be used, the cluster cannot run it, or more than
            ``max_errors`` rows failed; or the run's sampling parameters are none of vLLM's.
        RunError: the output was begun with other settings, another command is at work there, or the
            disk is full.
    """
    with hold(job.out / STATE, "vllm-dflash batch"):
        return _complete(job, completer)


def _complete(job: Job, completer: Any) -> dict[str, Any]:
    found = parts.index(job.inputs, job.rows_per_part)
    args = engine_args(job.engine)
    # Before the output is claimed for them. The replicas check them where there is no vLLM here.
    if not all((job.out / part.name).exists() for part in found.parts):
        with contextlib.suppress(ImportError):
            check_sampling(job.sampling)
        check_installed()
    claim(
        job.out / STATE,
        "batch",
        {
            "input": found.fingerprint,
            "rows_per_part": job.rows_per_part,
            "engine": args,
            "target_files": contents.of_folder(job.engine.target),
            "sampling": job.sampling,
        },
    )
    sums = dict.fromkeys(("rows", "failed", *COUNTED), 0)
    todo = []
    for part in found.parts:
        if (job.out / part.name).exists():
            _add(sums, count(parts.read_output(part, job.out)))
            _check_errors(job, sums)
        else:
            todo.append(part)
    began, before = time.monotonic(), sums["completion_tokens"]
    with (
        Progress(total=found.rows, initial=sums["rows"], unit=" rows", smoothing=0.1) as bar,
        contextlib.closing(_answer(job, todo, args, completer)) as answers,
    ):
        for done in answers if todo else ():
            _add(sums, done)
            _check_errors(job, sums)
            bar.update(done["rows"])
            bar.set_postfix_str(
                _progress(sums, (sums["completion_tokens"] - before) / (time.monotonic() - began))
            )
    write_record(job.out / STATE / "summary.json", sums)
    return sums


def _answer(
    job: Job, todo: list[parts.Part], args: dict[str, Any], completer: Any
) -> Generator[dict[str, int], None, None]:
    """The sums over each part as it is written, in any order."""
    with connect(job.engine, job.replicas) as runtime_env:
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        room, finished = Room(_group_of(job.engine)), False
        context = copy.copy(DataContext.get_current())
        context.enable_progress_bars = False  # ours is the only one
        context.wait_for_min_actors_s = _PLACED_S
        with DataContext.current(context):  # a data set keeps the one that it was made in
            items = ray.data.from_items(
                [asdict(part) for part in todo], override_num_blocks=len(todo)
            )
            done = items.map_batches(
                completer,
                batch_size=1,
                compute=ActorPoolStrategy(
                    size=job.replicas,
                    max_tasks_in_flight_per_actor=_PARTS_IN_FLIGHT,
                    max_concurrent_calls_per_actor=_PARTS_IN_FLIGHT,
                ),
                fn_constructor_kwargs={
                    "engine_args": args,
                    "sampling": job.sampling,
                    "folder": str(job.out.resolve()),
                },
                runtime_env=runtime_env,
                ray_remote_args_fn=room.options,
                **_reserve(job.engine),
            )
        try:
            yield from done.iter_rows()
            finished = True
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(
                f"the cluster had room, but {job.replicas} replicas did not start within"
                f" {_PLACED_S} s: another job has taken it, or its nodes are slow to start"
                " processes; look at `ray status`, and run the command again"
            ) from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                f"{_cause(error)}\na replica's process ended, and {RETRIES} more that its rows were"
                " given to, or it cannot start: look at Ray's logs of it, and for a lack of memory."
                " What is answered is kept: mend this, and run the command again"
            ) from error
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"{_cause(error)}\nwhat is answered is kept: mend this, and run the command again"
            ) from error
        finally:
            room.give_back(calm=finished)


def _cause(error: BaseException) -> str:
    """What an actor failed with, without the layers that Ray puts around it."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return str(error).strip() or type(error).__name__


def _group_of(engine: EngineSettings) -> list[dict[str, float]] | None:
    """The bundles of a placement group that a replica needs: where vLLM starts its ranks as Ray
    actors of its own, these take the rest of the group. None elsewhere."""
    bundles = engine.bundles
    return bundles if len(bundles) > 1 and uses_ray(engine) else None


def _reserve(engine: EngineSettings) -> dict[str, float]:
    """What Ray keeps for the process of one replica."""
    if _group_of(engine) is not None:
        return {"num_cpus": 1, "num_gpus": 0}
    return {
        f"num_{kind.lower()}s": sum(bundle.get(kind, 0) for bundle in engine.bundles)
        for kind in ("CPU", "GPU")
    }


def _add(sums: dict[str, int], more: dict[str, int]) -> None:
    for name in sums:
        sums[name] += int(more[name])


def _check_errors(job: Job, sums: dict[str, int]) -> None:
    """Ends the run, with the sums of what was done, once more rows failed than may."""
    if job.max_errors is None or sums["failed"] <= job.max_errors:
        return
    write_record(job.out / STATE / "summary.json", sums)
    raise ClusterError(
        f"{sums['failed']} of {sums['rows']} rows failed, and --max-errors is {job.max_errors}:"
        f" their field error in {job.out} says why. Raise --max-errors to go on; or mend what is"
        " wrong, and remove the part files that hold them to have them answered again"
    )


def _progress(sums: dict[str, int], tokens_per_second: float) -> str:
    text = f"{tokens_per_second:.0f} tokens/s"
    if (mean := tau(sums["accepted_tokens"], sums["drafts"])) is not None:
        text += f", tau {mean:.2f}"
    return text + (f", {sums['failed']} failed" if sums["failed"] else "")


def _describe(sums: dict[str, int], out: Path) -> str:
    lines = [f"{out}: {sums['rows']} rows, {sums['completion_tokens']} tokens"]
    if (mean := tau(sums["accepted_tokens"], sums["drafts"])) is not None:
        lines.append(
            f"  {sums['drafts']} drafts, {sums['accepted_tokens']} of {sums['draft_tokens']} tokens"
            f" accepted, tau {mean:.2f}"
        )
    if sums["failed"]:
        lines.append(f"  {sums['failed']} rows failed: their field error says why")
    return "\n".join(lines)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    try:
        more = object_of(args.sampling)
    except ValueError:
        raise ClusterError(
            f"--sampling is {args.sampling!r}: give a JSON object of vLLM's sampling parameters"
        ) from None
    return {"temperature": args.temperature, "max_tokens": args.max_tokens} | more
