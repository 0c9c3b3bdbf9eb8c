"""The stage before all others, for ``--prompts self:N``: the target writes its own user turns, part
by part.

A part depends on nothing but its number, and parts are looked through in their order, so a stage
that was killed ends with the same prompts as one that was not. What is kept is a file of prompts as
any other, ``prompts/prompts.jsonl``, to be read and used again.

    vllm-dflash train ... --prompts self:20000 --only prompts
    pytest tests/unit/test_train_self_prompts.py
"""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dflash import contents, smollm2
from vllm_dflash.files import checksum, claim, read_record, whole_file, write_record
from vllm_dflash.json_text import loads
from vllm_dflash.records import AtLeast
from vllm_dflash.regular import check_input
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.generate import answer
from vllm_dflash.training.prompts import Reader
from vllm_dflash.training.sequences import Shard, is_finished, shard_path
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.tables import Data, SelfPrompts
from vllm_dflash.training.turns import Sieve, Turn, find_turn, opening_ids

_FIRST_GUESS = 0.7
"""Share of turns that are kept, until some were seen."""
_TOO_FEW = 0.02
"""Share of a round's turns below which no more are asked for."""
_TURN = {"header": [int], "rest": str, "stops": [int], "mark": str, "endless": bool}
_NOTE = {
    "prompts": AtLeast(int, 1),
    "written": AtLeast(int, 1),
    "left_out": {},
    "bytes": AtLeast(int, 0),
    "sha256": str,
}


def folder_of(settings: Settings) -> Path:
    """Where the stage keeps its parts and its file."""
    return Path(settings.run.out) / "prompts"


def path_of(settings: Settings) -> Path:
    """The prompts, JSON lines."""
    return folder_of(settings) / "prompts.jsonl"


def as_files(settings: Settings) -> Data:
    """The table [data] with the stage's file for ``self:N``.

    Raises:
        TrainingError: the stage has not been run to its end, or its file was changed since.
    """
    data, path = settings.data, path_of(settings)
    if not data.own_prompts:
        return data
    note = _note(settings)
    if note is None:
        raise TrainingError(f"{folder_of(settings)} is not finished: run the stage prompts first")
    if not path.is_file() or checksum(path) != note["sha256"]:
        raise TrainingError(
            f"{path} is not as it was written: remove {path.with_suffix('.json')}, and the stage"
            " prompts writes it again"
        )
    return replace(data, prompts=(*data.files, str(path)))


def write_prompts(settings: Settings, target: Any, positions: int) -> None:
    """Runs the stage, or the rest of it; nothing where no ``self:N`` is asked for.

    Args:
        target: a ``training.target.Target``.
        positions: what target and drafter reach to.

    Raises:
        TrainingError: the target cannot write turns, too few of them are kept, or the engine
            failed.
    """
    folder, wanted = folder_of(settings), settings.data.own_prompts
    if not wanted:
        return
    most = most_tokens(settings)
    claim(folder, "prompts", inputs(settings, target.dtype, most))
    if (note := _note(settings)) is not None:
        print(describe(note))
        return
    reader = Reader(
        target.tokenizer, target.shape.vocab_size, settings.data.chat_template_kwargs, positions
    )
    turn = _turn(settings, target, reader)
    begun = [
        [*turn.header, *ids]
        for ids in opening_ids(target.tokenizer, turn, openings(settings.self_prompts))
    ]
    sieve, rows, part, size = (
        Sieve(target.tokenizer, turn, settings.self_prompts),
        list[str](),
        0,
        part_size(settings),
    )
    while True:
        before, first = len(rows), part
        while len(rows) < wanted and is_finished(shard_path(folder, part)):
            rows += _kept(
                sieve, reader, Shard(shard_path(folder, part)), settings.data.max_prompt_tokens
            )
            part += 1
        if len(rows) >= wanted:
            break
        written = part * size
        if part > first and len(rows) - before < _TOO_FEW * (part - first) * size:
            raise TrainingError(
                f"the target writes too few turns that can be used: {len(rows)} of {written} were"
                f" kept (left out: {_reasons(sieve.left_out)}). Ask for fewer, change the limits of"
                " the table [self_prompts], or give files of prompts"
            )
        share = len(rows) / written if written and rows else _FIRST_GUESS
        more = math.ceil((wanted - len(rows)) / share / size)
        answer(
            settings,
            target.dtype,
            max(map(len, begun)) + most,
            _jobs(settings, turn, begun, most, range(part, part + more)),
            ("prompts", " turns"),
        )
    _write(settings, rows[:wanted], part * size, dict(sieve.left_out))


def inputs(settings: Settings, dtype: str, most: int) -> dict[str, Any]:
    """What the prompts depend on."""
    table = {
        name: value
        for name, value in settings.to_dict()["self_prompts"].items()
        if name not in ("self_most_tokens", "self_openings")
    }
    if (
        settings.self_prompts.self_openings
    ):  # without it as in runs from before there was the setting
        table["self_openings"] = openings(settings.self_prompts)
    return table | {
        "target": smollm2.exact(settings.run.target),
        "target_files": contents.of_folder(settings.run.target),
        "dtype": dtype,
        "seed": settings.run.seed,
        "self_most_tokens": most,
        "self prompts": settings.data.own_prompts,
        "part": part_size(settings),
        "max_prompt_tokens": settings.data.max_prompt_tokens,
        "chat_template_kwargs": settings.data.chat_template_kwargs,
    }


def openings(table: SelfPrompts) -> list[str]:
    """What turns begin with, in their rotation.

    Raises:
        TrainingError: the file holds no such list.
    """
    if not table.self_openings:
        return [""]
    path = Path(table.self_openings)
    try:
        check_input(path)
        found = loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"self_openings: {path} cannot be read as JSON: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(s, str) for s in found):
        raise TrainingError(
            f'self_openings: {path} is no list of texts: write one, such as ["", "Explain"]'
        )
    return found


def most_tokens(settings: Settings) -> int:
    """Of a turn that is sampled: as set, or a quarter of what a prompt may have."""
    return settings.self_prompts.self_most_tokens or max(
        settings.self_prompts.self_least_tokens + 1, settings.data.max_prompt_tokens // 4
    )


def part_size(settings: Settings) -> int:
    """Turns a part."""
    return min(settings.generate.shard_size, settings.data.own_prompts)


def first_seed(settings: Settings) -> int:
    """Of the first turn; each has the next. All turns begin alike, so runs whose seeds are
    neighbours must not share them."""
    return int.from_bytes(
        hashlib.blake2b(f"prompts {settings.run.seed}".encode(), digest_size=6).digest()
    )


def describe(note: dict[str, Any]) -> str:
    """One line for the user."""
    left = f"; left out: {_reasons(note['left_out'])}" if note["left_out"] else ""
    return f"{note['prompts']} prompts of {note['written']} turns that the target wrote{left}"


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{n} {why}" for why, n in sorted(left_out.items())) or "none"


def _note(settings: Settings) -> dict[str, Any] | None:
    return read_record(
        path_of(settings).with_suffix(".json"),
        _NOTE,
        "remove it, and the stage prompts ends again from its parts",
    )


def _turn(settings: Settings, target: Any, reader: Reader) -> Turn:
    """What the first run found: a template may write today's date, and a run may last longer."""
    path = folder_of(settings) / "turn.json"
    found = read_record(
        path, _TURN, f"remove {folder_of(settings)} to begin the stage prompts anew"
    )
    if found is None:
        eos = target.config.eos_token_id
        own = getattr(target.tokenizer, "eos_token_id", None)
        ends = [*(eos if isinstance(eos, list) else [eos]), own]
        turn = find_turn(
            target.tokenizer,
            reader.template_args,
            sorted({token for token in ends if token is not None}),
        )
        write_record(path, vars(turn))
        return turn
    return Turn(**found)


def _jobs(
    settings: Settings, turn: Turn, begun: list[list[int]], most: int, parts: range
) -> list[dict[str, Any]]:
    """The parts to write; the turns begin with ``begun`` in rotation, whatever the parts' size."""
    size, table = part_size(settings), settings.self_prompts
    sampling = {
        "temperature": table.self_temperature,
        "top_p": table.self_top_p,
        "max_tokens": most,
        # The stops are the turn's, not the engine's.
        "ignore_eos": True,
        "stop_token_ids": turn.stops,
    }
    return [
        {
            "path": str(shard_path(folder_of(settings), part)),
            "count": size,
            "answered": [],
            "prompts": [begun[i % len(begun)] for i in range(part * size, (part + 1) * size)],
            "sampling": sampling,
            "seed": first_seed(settings) + part * size,
        }
        for part in parts
    ]


def _kept(sieve: Sieve, reader: Reader, shard: Shard, longest: int) -> list[str]:
    """Lines of JSON for the turns of a part that are kept."""
    rows = []
    for sample in (shard[i] for i in range(len(shard))):
        text = sieve.keep(sample.tokens[len(sieve.turn.header) :].tolist())
        if text is None:
            continue
        messages = [{"role": "user", "content": text}]
        try:
            ids = reader.chat(messages, "a turn")
        except TrainingError:
            sieve.left_out["refused by the template"] += 1
            continue
        if len(ids) > longest:
            sieve.left_out["too long"] += 1
            continue
        # The ids too: a template that writes today's date would make other prompts of the text
        # tomorrow.
        rows.append(json.dumps({"messages": messages, "prompt_token_ids": ids}, ensure_ascii=False))
    return rows


def _write(settings: Settings, rows: list[str], written: int, left_out: dict[str, int]) -> None:
    path = path_of(settings)
    with whole_file(path) as file:
        file.write("".join(f"{row}\n" for row in rows).encode())
    note = {
        "prompts": len(rows),
        "written": written,
        "left_out": left_out,
        "bytes": path.stat().st_size,
        "sha256": checksum(path),
    }
    write_record(path.with_suffix(".json"), note)
    print(describe(note))
