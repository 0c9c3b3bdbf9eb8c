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
from typing import Any

import torch

from vllm_dflash.acceptance import Acceptance
from vllm_dflash.config import DrafterConfig, DrafterConfigError
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
from vllm_dflash.tools.inspect import inspect_checkpoint
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
    EngineError,
    EngineRun,
    Pair,
    ReferenceRun,
    run_engine,
    run_reference,
)

_NAME_WIDTH = 16
"""Of the longest check's name: each is printed before the others are known."""
_NOTHING_ACCEPTED = 1.1
_LITTLE_ACCEPTED = 1.5
_TAU_TOLERANCE = 0.02
_ROUNDING = {"float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""The target's lead, relative to its best logit, below which plain PyTorch and vLLM may well choose
differently."""


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
        return diagnosis
    tokenizer = load_tokenizer(args.target)
    settings = Settings(args.num_speculative_tokens, args.max_model_len, args.dtype)
    diagnosis.add(shape_checks(found.config, target, settings, count_tokens(tokenizer)))
    diagnosis.add(tokenizer_checks(found.config, found.folder, tokenizer))
    diagnosis.add(training_checks(found.folder, args.target))
    if diagnosis.exit_status:
        diagnosis.advice.append("Nothing was run: set right what is wrong first.")
        return diagnosis
    prompts = load_prompts(args.prompts, args.num_prompts, tokenizer, found.config.vocab_size)
    text = target.get_text_config()
    k = args.num_speculative_tokens or found.config.max_speculative_tokens
    room = (
        min(found.config.max_position_embeddings, text.max_position_embeddings)
        - args.max_tokens
        - k
        - 1
    )
    if room < 1:
        raise PromptError(
            f"--max-tokens {args.max_tokens} leaves no room for a prompt: give"
            f" {args.max_tokens + room - 1} or less"
        )
    prompts = [prompt[-room:] for prompt in prompts]
    _run(
        diagnosis,
        Pair(
            args.target,
            found.folder,
            prompts,
            k,
            args.max_tokens,
            resolved_dtype(text, args.dtype),
            eos_token_id(text),
        ),
        found.config,
        args,
        progress,
    )
    return diagnosis


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
    measured = diagnosis.engine or diagnosis.reference
    if measured is not None:
        diagnosis.advice += advise(measured.acceptance, drafter)


def tau_check(acceptance: Acceptance) -> Check:
    """Whether the drafter is of use at all."""
    tau = f"{acceptance.tau:.2f} tokens a step over {acceptance.drafts} drafts"
    if acceptance.drafts == 0:
        return Check("tau", "warning", "nothing was drafted", "give more --max-tokens")
    if acceptance.tau < _NOTHING_ACCEPTED:
        return Check(
            "tau",
            "error",
            f"{tau}: next to nothing is accepted",
            "likely causes: another revision of the target than it was trained with (chat or base,"
            " fine-tuned), target layer ids off by one, another mask token, another rope_theta, or"
            " weights of an unfinished training; compare each with the drafter's model card",
        )
    if acceptance.tau < _LITTLE_ACCEPTED:
        return Check(
            "tau",
            "warning",
            f"{tau}: speculation may not pay",
            "try prompts of your own (--prompts); a drafter suits some texts only",
        )
    return Check("tau", "ok", tau)


def layer_check(reference: ReferenceRun, drafter: DrafterConfig) -> Check:
    """Whether other target layers would be accepted clearly more."""
    clear = {shift: found for shift, found in reference.shifts.items() if found.clear}
    if not clear:
        tried = " and ".join(
            f"{shift:+d} ({found.gain:+.2f} tokens a draft)"
            for shift, found in reference.shifts.items()
        )
        return Check(
            "layer ids",
            "ok",
            f"no better when shifted by {tried}" if tried else "cannot be shifted",
        )
    shift = max(clear, key=lambda s: clear[s].gain)
    better = ", ".join(str(i + shift) for i in drafter.target_layer_ids)
    look = (
        "the ids look one-based" if shift < 0 else "the ids look as if one had been taken off twice"
    )
    return Check(
        "layer ids",
        "error",
        f"shifted by {shift:+d}, {clear[shift].gain:.2f} tokens a draft more are accepted (standard"
        f" error {clear[shift].error:.2f}): {look}",
        f"set target_layer_ids to {better}, counted from 0"
        + (
            " (aux_hidden_state_layer_ids:"
            f" {', '.join(str(i + shift + 1) for i in drafter.target_layer_ids)})"
            if drafter.format == "speculators"
            else ""
        ),
    )


def compare(reference: ReferenceRun, engine: EngineRun, dtype: str) -> list[Check]:
    """Outputs and tau of plain PyTorch and of vLLM."""
    exact, differing, unexplained = dtype == "float32", 0, 0
    for ours, theirs, leads in zip(reference.tokens, engine.tokens, reference.leads, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is not None or len(ours) != len(theirs):
            differing += 1
            unexplained += at is None or leads[at] > _ROUNDING[dtype]
    total = len(reference.tokens)
    if not differing:
        outputs = Check(
            "outputs", "ok", f"equal in plain PyTorch and vLLM, {total} of {total} prompts"
        )
    elif not unexplained:
        remedy = "" if exact else "--dtype float32 compares exactly"
        outputs = Check(
            "outputs",
            "ok",
            f"{total - differing} of {total} equal, the others part where the two best tokens are a"
            " rounding apart",
            remedy,
        )
    else:
        outputs = Check(
            "outputs",
            "error" if exact else "warning",
            f"{unexplained} of {total} prompts end differently in vLLM and in plain PyTorch",
            "run again with --dtype float32; if they differ there too, the target itself is"
            " computed differently: report it",
        )
    one, other = reference.acceptance.tau, engine.acceptance.tau
    apart = abs(one - other) / one
    found = f"{other:.2f} in vLLM, {one:.2f} in plain PyTorch"
    if apart <= _TAU_TOLERANCE:
        return [outputs, Check("tau in vLLM", "ok", found)]
    # Outputs that part by rounding are other texts, with a tau of their own.
    state = "error" if exact or apart > 5 * _TAU_TOLERANCE else "warning"
    return [
        outputs,
        Check(
            "tau in vLLM",
            state,
            f"{found}: {apart:.0%} apart",
            "run again with --dtype float32 and more prompts; if it stays, report it",
        ),
    ]


def advise(acceptance: Acceptance, drafter: DrafterConfig) -> list[str]:
    """What to expect, and what to change."""
    rates, k = acceptance.rates, len(acceptance.rates)
    if acceptance.tau < _NOTHING_ACCEPTED or not rates:
        return []
    lines = [
        f"Expect tau {acceptance.tau:.2f} on text like these prompts: each target step yields that"
        " many tokens."
    ]
    useful = sum(rate >= 0.05 for rate in rates)
    if useful < k:
        lines.append(
            f"Tokens after the {useful}. are accepted in fewer than 1 of 20 drafts:"
            f" num_speculative_tokens {useful} loses next to nothing."
        )
    elif k < drafter.max_speculative_tokens and rates[-1] >= 0.3:
        lines.append(
            "Whole drafts are often accepted: a larger num_speculative_tokens, up to"
            f" {drafter.max_speculative_tokens}, would yield more."
        )
    return lines


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
    """What follows the checks: acceptance per position, advice and the verdict."""
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
