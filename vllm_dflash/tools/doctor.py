r"""Checks a target and a drafter before they are served, and says what acceptance to expect and
what to change.

    vllm-dflash doctor --target examples/embedded_pair/target \
        --draft examples/embedded_pair/dflash --dtype float32

Limits: greedy, one device, whole models in memory twice over (plain PyTorch, then vLLM). Tests:
``pytest tests/engine/test_doctor.py``.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import read_raw
from vllm_dflash.hub import (
    TargetError,
    count_tokens,
    eos_token_id,
    load_config,
    load_tokenizer,
    resolved_dtype,
)
from vllm_dflash.prompts import PromptError, load_prompts
from vllm_dflash.regular import check_input
from vllm_dflash.tools.break_even import pays_check, table
from vllm_dflash.tools.inspect import Inspection, inspect_checkpoint
from vllm_dflash.tools.pair_checks import (
    Check,
    Settings,
    checkpoint_checks,
    plugin_check,
    shape_checks,
    tokenizer_checks,
    training_checks,
)
from vllm_dflash.tools.pair_runs import (
    CostSettings,
    EngineError,
    EngineRun,
    Pair,
    ReferenceRun,
    run_engine,
    run_reference,
)
from vllm_dflash.tools.rotary_readings import ask, is_of_factor, readings_check, without_factor
from vllm_dflash.tools.run_checks import advise, compare, layer_check, tau_check

_NAME_WIDTH = 16
"""Of the longest check's name: each is printed before the others are known."""


def _nothing(check: Check) -> None:
    pass


@dataclass
class Diagnosis:
    """All that was found."""

    show: Callable[[Check], None] = _nothing
    """Told of each check once it is done."""
    checks: list[Check] = field(default_factory=list)
    reference: ReferenceRun | None = None
    engine: EngineRun | None = None
    advice: list[str] = field(default_factory=list)

    def add(self, checks: Iterable[Check]) -> None:
        """Checks that are done."""
        for check in checks:
            self.checks.append(check)
            self.show(check)

    @property
    def exit_status(self) -> int:
        return int(any(check.state == "error" for check in self.checks))


def diagnose(
    args: argparse.Namespace, *, progress: bool, show: Callable[[Check], None] = _nothing
) -> Diagnosis:
    """Looks, then runs; where looking finds errors nothing is run. ``show`` is told of each check
    once it is done.

    Raises:
        PromptError: the prompts cannot be used.
    """
    diagnosis = Diagnosis(show)
    diagnosis.add([plugin_check()])
    try:
        target = load_config(args.target)
    except TargetError as error:
        diagnosis.add(checkpoint_checks(inspect_checkpoint(args.draft, progress=progress)))
        diagnosis.add([Check("target", "error", error.problem, error.remedy)])
        return diagnosis
    served = resolved_dtype(target.get_text_config(), args.dtype)
    found = inspect_checkpoint(args.draft, dtype=served, progress=progress)
    diagnosis.add(checkpoint_checks(found))
    if found.config is None:
        diagnosis.add(_ask_both(found, target, args, progress))
        return diagnosis
    tokenizer = load_tokenizer(args.target)
    settings = Settings(args.num_speculative_tokens, args.max_model_len, args.dtype)
    diagnosis.add(shape_checks(found.config, target, settings, count_tokens(tokenizer)))
    diagnosis.add(tokenizer_checks(found.config, found.folder, tokenizer))
    diagnosis.add(training_checks(found.folder, args.target))
    if diagnosis.exit_status:
        diagnosis.advice.append("Nothing was run: set right what is wrong first.")
        return diagnosis
    pair = _pair(found.folder, found.config, target.get_text_config(), tokenizer, args)
    _run(diagnosis, pair, found.config, args, progress)
    return diagnosis


def _pair(
    folder: Path, drafter: DrafterConfig, text: Any, tokenizer: Any, args: argparse.Namespace
) -> Pair:
    prompts = load_prompts(args.prompts, args.num_prompts, tokenizer, drafter.vocab_size)
    k = args.num_speculative_tokens or drafter.max_speculative_tokens
    positions = args.max_model_len or min(
        drafter.max_position_embeddings, text.max_position_embeddings
    )
    room = positions - args.max_tokens - k - 1
    if room < 1:
        raise PromptError(
            f"--max-tokens {args.max_tokens} leaves no room for a prompt: give"
            f" {args.max_tokens + room - 1} or less"
        )
    return Pair(
        args.target,
        folder,
        [prompt[-room:] for prompt in prompts],
        k,
        args.max_tokens,
        resolved_dtype(text, args.dtype),
        eos_token_id(text),
        CostSettings(positions, _position_bytes(text), args.max_model_len),
    )


def _position_bytes(text: Any) -> int:
    """Of a position's keys and values, by a text config, in float32; what caches them in another
    way takes less."""
    of = getattr(text, "num_attention_heads", None) or 1
    heads = getattr(text, "num_key_value_heads", None) or of
    size = getattr(text, "head_dim", None) or text.hidden_size // of
    return int(2 * 4 * text.num_hidden_layers * heads * size)


def _ask_both(
    found: Inspection, target: Any, args: argparse.Namespace, progress: bool
) -> list[Check]:
    """Of a drafter that is refused for a rotary factor, and for nothing else, which reading of its
    file is accepted."""
    if not all(map(is_of_factor, found.errors)) or not found.is_there:
        return []
    unread = without_factor(read_raw(found.folder))
    if unread is None:
        return []
    tokenizer, config = load_tokenizer(args.target), unread.config
    settings = Settings(args.num_speculative_tokens, args.max_model_len, args.dtype)
    checks = shape_checks(config, target, settings, count_tokens(tokenizer))
    if any(check.state == "error" for check in checks):
        return checks
    pair = _pair(found.folder, config, target.get_text_config(), tokenizer, args)
    try:
        readings = ask(pair, config, unread.size, progress)
    except DrafterConfigError as error:
        return [Check("rotary readings", "warning", f"not tried: {error}")]
    return [readings_check(readings, unread.size, config.head_dim)]


def _run(
    diagnosis: Diagnosis,
    pair: Pair,
    drafter: DrafterConfig,
    args: argparse.Namespace,
    progress: bool,
) -> None:
    try:
        diagnosis.reference = run_reference(pair, progress)
    except DrafterConfigError as error:
        diagnosis.add([Check("plain PyTorch", "warning", f"not run: {error}")])
    else:
        diagnosis.add(
            [tau_check(diagnosis.reference.acceptance), layer_check(diagnosis.reference, drafter)]
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not args.skip_vllm:
        try:
            diagnosis.engine = run_engine(pair, progress)
        except EngineError as error:
            lines = str(error).splitlines()
            said = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            diagnosis.add(
                [Check("vLLM", "error", f"the engine ended early: {said}", "see the lines below")]
            )
            diagnosis.advice.append(f"The end of the engine's output:\n{error}")
    if diagnosis.reference is not None and diagnosis.engine is not None:
        diagnosis.add(compare(diagnosis.reference, diagnosis.engine, pair.dtype))
    elif diagnosis.engine is not None:
        diagnosis.add([tau_check(diagnosis.engine.acceptance)])
    if diagnosis.engine is not None:
        engine = diagnosis.engine
        diagnosis.add([pays_check(engine.break_even, engine.acceptance.tau)])
    measured = diagnosis.engine or diagnosis.reference
    if measured is not None:
        diagnosis.advice += advise(measured.acceptance, drafter)


def check_text(check: Check) -> str:
    """A check's line, and its remedy below."""
    lines = [f"{check.state:<8} {check.name:<{_NAME_WIDTH}}  {check.found}"]
    if check.remedy:
        indent = 11 + _NAME_WIDTH
        lines += textwrap.wrap(
            check.remedy,
            110,
            initial_indent=" " * indent + "-> ",
            subsequent_indent=" " * (indent + 3),
        )
    return "\n".join(lines)


def summary(diagnosis: Diagnosis) -> str:
    """What follows the checks: acceptance per position, where drafting breaks even, advice and the
    verdict."""
    lines = []
    runs = [
        (name, run.acceptance)
        for name, run in (("plain PyTorch", diagnosis.reference), ("vLLM", diagnosis.engine))
        if run is not None
    ]
    if runs:
        lines += [
            "",
            f"{'share of drafts accepted at position':<36}"
            + "".join(f"{i:>6}" for i in range(1, len(runs[0][1].rates) + 1)),
        ]
        lines += [
            f"  {name:<34}" + "".join(f"{rate:6.2f}" for rate in acceptance.rates)
            for name, acceptance in runs
        ]
    if (engine := diagnosis.engine) is not None and engine.break_even is not None:
        lines += ["", *table(engine.break_even, engine.acceptance.tau)]
    errors, warnings = (
        sum(check.state == state for check in diagnosis.checks) for state in ("error", "warning")
    )
    verdict = (
        f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        if errors or warnings
        else "all is well"
    )
    return "\n".join([*lines, "", *diagnosis.advice, f"Verdict: {verdict}."])


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The same for scripts."""
    runs = {"reference": diagnosis.reference, "vllm": diagnosis.engine}
    return {
        "ok": diagnosis.exit_status == 0,
        "checks": [asdict(check) for check in diagnosis.checks],
        **{
            name: (
                None
                if run is None
                else {
                    "tau": run.acceptance.tau,
                    "drafts": run.acceptance.drafts,
                    "acceptance": run.acceptance.rates,
                }
            )
            for name, run in runs.items()
        },
        "break_even": (
            asdict(diagnosis.engine.break_even)
            if diagnosis.engine is not None and diagnosis.engine.break_even is not None
            else None
        ),
        "advice": diagnosis.advice,
    }


def run(args: argparse.Namespace) -> int:
    """``vllm-dflash doctor``: 0 all good, 1 something would hurt serving, 2 wrong usage."""
    try:
        if args.prompts is not None:
            check_input(args.prompts)
    except OSError as error:
        return _usage(
            f"--prompts {args.prompts} cannot be read ({error}): give a file of JSON lines"
        )
    try:
        diagnosis = diagnose(args, progress=True, show=_nothing if args.json else _print)
    except PromptError as error:
        return _usage(str(error))
    print(json.dumps(as_dict(diagnosis), indent=2) if args.json else summary(diagnosis))
    return diagnosis.exit_status


def _print(check: Check) -> None:
    print(check_text(check), flush=True)


def _usage(message: str) -> int:
    print(f"vllm-dflash doctor: {message}", file=sys.stderr)
    return 2
