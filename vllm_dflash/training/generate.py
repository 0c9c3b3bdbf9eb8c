"""Stage one: prompts are split, and the target answers them in vLLM, shard by shard, in a process
of its own.

A shard's answers depend on nothing but the shard, so a stage that was killed ends with the same
answers as one that was not. Held-out prompts are answered greedily past their end token, so that
drafts near the end can be judged as in decoding.

    vllm-dflash train ... --only generate
    pytest tests/unit/test_train_prompts.py tests/engine/test_train.py
"""

from pathlib import Path
from typing import Any

from vllm_dflash import contents, smollm2
from vllm_dflash.files import claim, read_record, write_record
from vllm_dflash.records import AtLeast, Optional, object_of
from vllm_dflash.training.engines import run_engines
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.prompts import Prompt, Reader, Split, split
from vllm_dflash.training.sequences import Sequences, is_finished, shard_path, write_sequences
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.tables import Data

_SPLIT = {
    "shards": AtLeast(int, 1),
    "train": AtLeast(int, 1),
    "held_out": AtLeast(int, 1),
    "keys": str,
    "responses": Optional(str),
}
"""Digests of the prompts, and of the answers that came with them; older runs have none of the
latter."""


def folder_of(settings: Settings) -> Path:
    """Where the stage keeps its shards."""
    return Path(settings.run.out) / "generate"


def held_out_tokens(settings: Settings) -> int:
    """Tokens that a held-out prompt is answered with: those to prove with, and a block for the last
    draft to be judged by."""
    return settings.prove.prove_tokens + settings.drafter.block_size


def generate(
    settings: Settings, data: Data, tokenizer: Any, vocab_size: int, dtype: str, positions: int
) -> None:
    """Runs the stage, or the rest of it.

    Args:
        data: the settings' own, with files for all prompts (``self_prompts.as_files``).
        positions: what target and drafter reach to.

    Raises:
        TrainingError: the prompts cannot be used, the stage was begun with other settings, or the
            engine failed.
    """
    folder, table = folder_of(settings), settings.generate
    claim(folder, "generate", inputs(settings, dtype))
    reader = Reader(tokenizer, vocab_size, settings.data.chat_template_kwargs, positions)
    parts = split(reader, data, settings.run.seed)
    print(parts.describe(settings.data.max_prompt_tokens))
    jobs = _jobs(settings, parts, folder)
    note = {
        "shards": len(jobs) - 1,
        "train": len(parts.train),
        "held_out": len(parts.held_out),
        **_digests(parts),
    }
    found = _read_split(settings)
    if found is None:
        write_record(folder / "split.json", note)
    else:
        _check_split(folder / "split.json", found, note)
    todo = [job for job in jobs if not is_finished(Path(job["path"]))]
    for job in [job for job in todo if not job["prompts"]]:
        write_sequences(Path(job["path"]), job["answered"])
    todo = [job for job in todo if job["prompts"]]
    if todo:
        longest = max(len(p.ids) for p in [*parts.train, *parts.held_out])
        answer(
            settings, dtype, longest + max(table.response_tokens, held_out_tokens(settings)), todo
        )


def answer(
    settings: Settings,
    dtype: str,
    room: int,
    jobs: list[dict[str, Any]],
    shown: tuple[str, str] = ("generate", " answers"),
) -> None:
    """Has the target answer these jobs, each a shard, in sequences of up to ``room`` tokens.

    Args:
        shown: the progress line's title and unit.

    Raises:
        TrainingError: an engine failed.
    """
    args, engines = engine_args(settings, dtype, room), settings.generate.engines
    if settings.generate.engines_on_ray:
        from vllm_dflash.training.ray_engines import answer_on_ray

        answer_on_ray(args, jobs, engines, shown)
    else:
        run_engines("generate", args, jobs, engines, shown)


def inputs(settings: Settings, dtype: str) -> dict[str, Any]:
    """What the answers depend on."""
    ours = {
        name: getattr(settings.generate, name)
        for name in ("response_tokens", "temperature", "top_p", "top_k", "ignore_eos", "shard_size")
    }
    return ours | {
        "target": smollm2.exact(settings.run.target),
        "target_files": contents.of_folder(settings.run.target),
        "dtype": dtype,
        "seed": settings.run.seed,
        "held_out_tokens": held_out_tokens(settings),
    }


def sequences(settings: Settings) -> Sequences:
    """What is trained on.

    Raises:
        TrainingError: the stage has not been run to its end.
    """
    note = _read_split(settings)
    if note is None or not all(
        is_finished(shard_path(folder_of(settings), i)) for i in range(note["shards"])
    ):
        raise TrainingError(f"{folder_of(settings)} is not finished: run the stage generate first")
    return Sequences(folder_of(settings), note["shards"])


def held_out(settings: Settings) -> Sequences:
    """The held-out prompts with their greedy answers; raises as ``sequences``."""
    if not is_finished(shard_path(folder_of(settings) / "held-out", 0)):
        raise TrainingError(
            f"{folder_of(settings) / 'held-out'} is not finished: run the stage generate first"
        )
    return Sequences(folder_of(settings) / "held-out", 1)


def prompts_digest(settings: Settings) -> str | None:
    """Stands for the prompts that the stage was run with; None where it was not. Raises RunError
    where its record is damaged."""
    note = _read_split(settings)
    return None if note is None else str(note["keys"])


def _read_split(settings: Settings) -> dict[str, Any] | None:
    path = folder_of(settings) / "split.json"
    return read_record(
        path,
        _SPLIT,
        "remove it, and run the stage generate again with the same prompts: finished shards are"
        " kept",
    )


def _check_split(path: Path, found: dict[str, Any], note: dict[str, Any]) -> None:
    """Refuses prompts or answers other than those that the folder was begun with."""
    what = None
    if found["keys"] != note["keys"]:
        what = "the prompts are"
    elif found.get("responses", note["responses"]) != note["responses"]:
        what = "the prompts are the same, but the responses beside them are"
    if what is not None:
        raise TrainingError(
            f"{what} not those that {path} was written for: give the same files, or choose another"
            " --out"
        )
    if any(found[name] != note[name] for name in ("shards", "train", "held_out")):
        raise TrainingError(f"{path} does not fit its prompts: remove it, and it is written anew")


def _digests(parts: Split) -> dict[str, str]:
    import hashlib

    keys, responses = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for prompt in [*parts.held_out, *parts.train]:
        keys.update(prompt.key)
        responses.update(prompt.response_key)
    return {"keys": keys.hexdigest(), "responses": responses.hexdigest()}


def _jobs(settings: Settings, parts: Split, folder: Path) -> list[dict[str, Any]]:
    """One a shard, the held-out one first: where it goes, what is answered already, what is asked
    and how."""
    table, size = settings.generate, settings.generate.shard_size
    sampling = {
        "temperature": table.temperature,
        "top_p": table.top_p,
        "top_k": table.top_k,
        "max_tokens": table.response_tokens,
        "ignore_eos": table.ignore_eos,
    }
    greedy = {"temperature": 0.0, "max_tokens": held_out_tokens(settings), "ignore_eos": True}
    asked = [Prompt(p.ids) for p in parts.held_out]
    jobs = [_job(shard_path(folder / "held-out", 0), asked, greedy, 0)]
    for index, at in enumerate(range(0, len(parts.train), size)):
        jobs.append(
            _job(
                shard_path(folder, index),
                parts.train[at : at + size],
                sampling,
                settings.run.seed + at,
            )
        )
    return jobs


def _job(path: Path, prompts: list[Prompt], sampling: dict[str, Any], seed: int) -> dict[str, Any]:
    answered = [([*p.ids, *p.response], len(p.ids)) for p in prompts if p.response is not None]
    asked = [p.ids for p in prompts if p.response is None]
    return {
        "path": str(path),
        "count": len(asked),
        "answered": answered,
        "prompts": asked,
        "sampling": sampling,
        "seed": seed,
    }


def engine_args(settings: Settings, dtype: str, room: int) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` for sequences of up to ``room`` tokens.

    Raises:
        TrainingError: the setting engine_args is no JSON object.
    """
    try:
        more = object_of(settings.generate.engine_args)
    except ValueError:
        raise TrainingError(
            f"engine_args is {settings.generate.engine_args!r}: give a JSON object of arguments of"
            " vLLM's LLM"
        ) from None
    return {
        "model": smollm2.resolve(settings.run.target),
        "dtype": dtype,
        "max_model_len": room,
        "max_num_seqs": settings.generate.num_seqs,
        "seed": 0,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "trust_remote_code": settings.run.trust_remote_code,
        # A shard must not depend on what was cached before it.
        "enable_prefix_caching": False,
    } | more
