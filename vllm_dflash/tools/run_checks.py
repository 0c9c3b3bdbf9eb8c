"""What a pair's runs in plain PyTorch and in vLLM say of it: checks and advice.

pytest tests/engine/test_doctor.py
"""

from vllm_dflash.acceptance import Acceptance
from vllm_dflash.config import DrafterConfig
from vllm_dflash.tools.pair_checks import Check
from vllm_dflash.tools.pair_runs import EngineRun, ReferenceRun

_NOTHING_ACCEPTED = 1.1
_LITTLE_ACCEPTED = 1.5
_TAU_TOLERANCE = 0.02
_ROUNDING = {"float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""The target's lead, relative to its best logit, below which plain PyTorch and vLLM may well choose
differently."""


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
