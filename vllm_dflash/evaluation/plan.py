"""What a benchmark is going to do, decided from its command line before anything starts.

pytest tests/unit/test_bench_plan.py
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash import humaneval, smollm2
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.evaluation.lengths import positions_of
from vllm_dflash.evaluation.methods import (
    DEFAULT_METHODS,
    FIXED,
    Drafter,
    Method,
    UsageError,
    parse_methods,
)
from vllm_dflash.evaluation.server import NAME, Server, connect
from vllm_dflash.evaluation.sweep import BASELINE
from vllm_dflash.evaluation.workload import (
    DATASETS,
    RANDOM,
    Lengths,
    Point,
    PromptSet,
    dataset_prompts,
    file_prompts,
    humaneval_prompts,
    points,
    random_prompts,
)
from vllm_dflash.hub import TargetError, drafter_folder, load_config, load_tokenizer, no_drafter_at
from vllm_dflash.records import object_of

EMBEDDED = Path(__file__).resolve().parents[2] / "examples" / "embedded_pair"
"""The pair that a checkout has; a wheel has none."""
_OWN_ARGS = frozenset({"model", "speculative_config", "max_num_seqs", "dtype", "max_model_len"})
_OWN_SPEC_ARGS = frozenset({"method", "model", "num_speculative_tokens"})


@dataclass(frozen=True)
class Plan:
    """All that is asked for, checked."""

    target: str
    methods: Sequence[Method]
    points: Sequence[Point]
    prompt_sets: Mapping[str, PromptSet]
    max_tokens: Lengths
    repeats: int
    dtype: str
    max_model_len: int
    engine_args: Mapping[str, Any]
    spec_args: Mapping[str, Any] = field(default_factory=dict)
    server: Server | None = None
    server_url: str = ""
    fresh_engines: bool = False
    slice_seconds: float = 0.0
    break_even: bool = False
    """Whether all drafts are rejected, and the tau that drafting needs is what is asked for."""

    def requests(self, point: Point) -> list[tuple[list[int], int]]:
        """Prompt and number of tokens to generate of each phase's requests, one phase after the
        other."""
        prompts, counts = (
            self.prompt_sets[point.prompt_set],
            [phase.num_prompts for phase in point.phases],
        )
        each = [
            zip(prompts.take(count, point.prompt_tokens), self.max_tokens.take(count), strict=True)
            for count in counts
        ]
        return list(itertools.chain.from_iterable(each))

    @property
    def settings(self) -> dict[str, Any]:
        """For the report: what all methods share."""
        shared = {
            "target": smollm2.name_of(self.target),
            "max_tokens": str(self.max_tokens),
            "repeats": self.repeats,
            "fresh_engines": self.fresh_engines or None,
            "slice_seconds": self.slice_seconds,
            "break_even": self.break_even or None,
        }
        if self.server is not None:
            return shared
        return shared | {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "engine_args": dict(self.engine_args) or None,
            "spec_args": dict(self.spec_args) or None,
        }


def make_plan(args: argparse.Namespace) -> Plan:
    """Reads models' configs and prompts, and refuses what cannot be done.

    Raises:
        UsageError, PromptError: with what to give instead.
    """
    model, root = connect(args.server) if args.server else ("", "")
    target = args.target or root or str(_embedded("target"))
    methods = (
        [Method(NAME, NAME)]
        if args.server
        else parse_methods(args.methods or _default_methods(args), _drafters(args), args.eagle3)
    )
    if args.break_even:
        _check_break_even(args, methods)
    tokenizer = load_tokenizer(target)
    prompt_sets = _prompt_sets(args, target, tokenizer)
    every = points(
        list(prompt_sets),
        args.prompt_tokens or [None],
        args.temperature,
        args.concurrency,
        _num_prompts(args.num_prompts, args.concurrency),
        args.swing,
    )
    server = _server(args, target, tokenizer, model) if args.server else None
    needed = _model_len(args, every, prompt_sets, methods, _positions(args, target))
    return Plan(
        target,
        methods,
        every,
        prompt_sets,
        args.max_tokens,
        args.repeats,
        args.dtype,
        args.max_model_len or needed,
        _json_object("--engine-args", args.engine_args, '{"enforce_eager": false}', _OWN_ARGS),
        _json_object(
            "--spec-args", args.spec_args, '{"rejection_sample_method": "standard"}', _OWN_SPEC_ARGS
        ),
        server,
        args.server or "",
        args.fresh_engines,
        args.slice,
        args.break_even,
    )


def _default_methods(args: argparse.Namespace) -> str:
    return f"{BASELINE},{FIXED}" if args.break_even else DEFAULT_METHODS


def _check_break_even(args: argparse.Namespace, methods: Sequence[Method]) -> None:
    kinds = {method.kind for method in methods}
    if args.server or args.swing or kinds - {BASELINE, FIXED} or len(kinds) < 2:
        raise UsageError(
            f"--break-even compares {BASELINE} with {FIXED}, on engines of its own at steady loads:"
            f" leave out --server and --swing, and give --methods such as {BASELINE},{FIXED}:3"
        )
    if args.max_tokens.most < 2:
        raise UsageError(
            "--break-even times steps that decode, and a request's first token is its prompt's:"
            " give --max-tokens 2 or more, such as 32"
        )


def _server(args: argparse.Namespace, target: str, tokenizer: Any, model: str) -> Server:
    """The running server that is measured."""
    if args.swing:
        raise UsageError(
            "--swing needs the bench's own engines: leave out --server, or sweep --concurrency"
        )
    if tokenizer is None:
        raise UsageError(
            f"{target} has no tokenizer, which turns prompts into text: give --target, the"
            " model's folder or hub id"
        )
    return Server(args.server, target, tokenizer, model)


def _model_len(
    args: argparse.Namespace,
    every: Sequence[Point],
    prompt_sets: Mapping[str, PromptSet],
    methods: Sequence[Method],
    positions: int | None,
) -> int:
    """Positions that the longest request needs where every method drafts to its end."""
    longest, where = max(
        (prompt_sets[p.prompt_set].longest(p.num_prompts, p.prompt_tokens), p.prompt_set)
        for p in every
    )
    # vLLM's own dflash drafts for nobody in a step in which the longest request, its draft tokens
    # counted, leaves no room for a block.
    room = longest + args.max_tokens.most
    needed = room + 2 * (1 + max(method.num_speculative_tokens for method in methods))
    if positions is not None and room > positions:
        raise UsageError(
            f"the target has {positions} positions, and a prompt of {longest} tokens ({where}) with"
            f" {args.max_tokens.most} more needs {room}: give a smaller --prompt-tokens or"
            " --max-tokens, or rotary scaling by hf_overrides in --engine-args"
        )
    if args.max_model_len is not None and args.max_model_len < room:
        raise UsageError(
            f"--max-model-len {args.max_model_len} has no room for a prompt of {longest} tokens and"
            f" {args.max_tokens.most} more: give {needed}, or a smaller --prompt-tokens or"
            " --max-tokens"
        )
    return needed if positions is None else min(needed, positions)


def _embedded(name: str) -> Path:
    path = EMBEDDED / name
    if not path.exists():
        raise UsageError(
            "no --target: give its folder or hub id (only a checkout has the embedded pair)"
        )
    # As short as it can be, for the report.
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


_DRAFTER = "dflash"
"""The folder of the embedded pair's first drafter."""


def _drafters(args: argparse.Namespace) -> dict[str, Drafter]:
    """By name, as ``--draft`` has them; the embedded one beside the embedded target."""
    given = args.draft or ([] if args.target else [str(_embedded(_DRAFTER))])
    found: dict[str, Drafter] = {}
    for text in given:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else (Path(text).name, text)
        if name in found:
            raise UsageError(f"--draft names {name} twice: give each a name of its own, NAME=PATH")
        found[name] = _drafter(path)
    return found


def _drafter(path: str) -> Drafter:
    try:
        folder = drafter_folder(path, None)
        if folder is None:
            raise UsageError(f"--draft {no_drafter_at(path)}")
        return Drafter(str(folder), DrafterConfig.from_pretrained(folder).max_speculative_tokens)
    except DrafterConfigError as error:
        raise UsageError(f"--draft {path}: {error}") from None


def _prompt_sets(args: argparse.Namespace, target: str, tokenizer: Any) -> dict[str, PromptSet]:
    vocab_size = _text_config(args, target).vocab_size
    sets = [file_prompts(path, tokenizer, vocab_size) for path in args.prompts or []]
    for text in args.dataset or []:
        name, _, path = text.partition("=")
        if name == RANDOM and not path:
            sets.append(random_prompts(vocab_size))
        elif name.lower() == humaneval.NAME and not path:
            sets.append(humaneval_prompts(tokenizer, vocab_size))
        elif name.lower() in DATASETS and path:
            sets.append(dataset_prompts(name.lower(), path, tokenizer, vocab_size))
        else:
            raise UsageError(
                f"--dataset {text}: give {RANDOM}, {humaneval.NAME}, or NAME=PATH with a NAME of"
                f" {', '.join(DATASETS)}"
            )
    if not sets:
        if Path(target).resolve() != (EMBEDDED / "target").resolve():
            raise UsageError(
                f"no prompts: give --prompts FILE, --dataset NAME=PATH or --dataset {RANDOM}"
            )
        sets = [file_prompts(str(EMBEDDED / "prompts.jsonl"), tokenizer, vocab_size)]
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise UsageError(f"two prompt sets have the same name ({', '.join(names)}): rename a file")
    return dict(zip(names, sets, strict=True))


def _num_prompts(given: list[int] | None, concurrency: Sequence[int]) -> list[int] | None:
    """Requests with each concurrency; None: as the workload has them."""
    if given is None:
        return None
    counts = given * len(concurrency) if len(given) == 1 else given
    if len(counts) != len(concurrency):
        raise UsageError(
            f"--num-prompts gives {len(counts)} numbers for {len(concurrency)} of --concurrency:"
            " give one, or one for each"
        )
    for count, load in zip(counts, concurrency, strict=True):
        if count < load:
            raise UsageError(
                f"--num-prompts {count} never has {load} requests in flight: give at least as many"
            )
    return counts


def _positions(args: argparse.Namespace, target: str) -> int | None:
    """Those of the target; None where a server or the user's overrides decide."""
    return None if _is_overridden(args) else positions_of(_text_config(args, target))


def _is_overridden(args: argparse.Namespace) -> bool:
    return bool(args.server) or "hf_overrides" in args.engine_args


def _text_config(args: argparse.Namespace, target: str) -> Any:
    try:
        return load_config(target, needs_positions=not _is_overridden(args)).get_text_config()
    except TargetError as error:
        raise UsageError(f"--target {error}") from None


def _json_object(
    option: str, text: str, example: str, set_by_others: frozenset[str]
) -> dict[str, Any]:
    try:
        found = object_of(text)
    except ValueError as error:
        raise UsageError(
            f"{option} is no JSON object ({error}): give one such as '{example}'"
        ) from None
    taken = sorted(set_by_others & found.keys())
    if taken:
        raise UsageError(
            f"{option} holds {', '.join(taken)}, which other options set: leave them out"
        )
    return found
