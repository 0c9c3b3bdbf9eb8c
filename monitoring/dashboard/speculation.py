"""The rows on drafts and what becomes of them: Paying?, Acceptance, Draft length. What the figures
mean: docs/dashboard.md.

pytest tests/engine/test_monitoring.py        (runs every query against a real server)
"""

from monitoring.dashboard.panel import TIMES, TOKENS, TOKENS_A_SECOND, Note, Panel, per_second
from monitoring.dashboard.promql import (
    BY_ENGINE,
    EACH,
    last_of_path,
    mean,
    rate,
    ratio,
    selector,
    share,
)

OUTPUT = "vllm_dflash_output_tokens_total"
ACCEPTED, DRAFT_LENGTH = "vllm_dflash_accepted_length", "vllm_dflash_draft_length"
DRAFTED, VERIFIED, REACHED, TAKEN = (
    f"vllm_dflash_{kind}_tokens_total" for kind in ("drafted", "verified", "reached", "accepted")
)
DRAFTER_SECONDS, STEP_SECONDS = "vllm_dflash_drafter_seconds", "vllm_dflash_step_seconds"


NO_BASELINE = (
    "this engine has measured no plain steps of so many requests: adaptive drafting does, now and"
    " then"
)


def speedup(by: str = "") -> str:
    """Time that plain decoding would have taken for the same tokens, over the time taken; of the
    steps for which there is a baseline."""
    return ratio(
        rate("vllm_dflash_baseline_seconds_total", by),
        rate("vllm_dflash_measured_seconds_total", by),
    )


def drafter_share(by: str) -> str:
    """Seconds of drafting of all seconds of steps."""
    return ratio(rate(f"{DRAFTER_SECONDS}_sum", by), rate(f"{STEP_SECONDS}_sum", by))


def _by_context(label: str) -> str:
    return ratio(
        rate("vllm_dflash_context_committed_tokens_total", label),
        rate("vllm_dflash_context_verifications_total", label),
    )


PAYING = (
    Panel(
        "number",
        "Estimated speed-up",
        "Tokens a second against this engine's own plain steps of as many requests. Below 1,"
        " speculation costs more than it brings. Absent where no baseline was measured: it is never"
        " guessed. Adaptive drafting measures one; without it, compare with vllm-dflash bench.",
        ((speedup(), "speed-up"),),
        TIMES,
        "paying",
        5,
        5,
        decimals=2,
        thresholds=((None, "red"), (1, "yellow"), (1.1, "green")),
        trend=True,
        no_value="no baseline",
        may_be_empty=NO_BASELINE,
    ),
    Panel(
        "number",
        "Tokens a verification",
        "Tokens that the target commits for each draft it verifies, its own included. 1 is what"
        " plain decoding gives. It pays where this is above the price of a speculative step in"
        " plain steps.",
        ((mean(ACCEPTED), "tau"),),
        TOKENS,
        "paying",
        5,
        5,
        minimum=1,
        decimals=2,
        thresholds=((None, "red"), (1.3, "yellow"), (2, "green")),
        trend=True,
        no_value="idle",
    ),
    Panel(
        "number",
        "Drafter's share",
        "Seconds of the drafter of all seconds of steps. Above 40 % the drafter is too large for"
        " its target, or too little of what it drafts is accepted to be worth it.",
        ((drafter_share(""), "share"),),
        "percentunit",
        "paying",
        4,
        5,
        maximum=1,
        decimals=1,
        thresholds=((None, "green"), (0.3, "yellow"), (0.4, "red")),
        trend=True,
        no_value="idle",
    ),
    Panel(
        "number",
        "Tokens from drafts",
        "Of the generated tokens, those that a verification committed. The rest came from prompts'"
        " last steps and from steps without a draft.",
        ((ratio(rate(OUTPUT, where='step="speculative"'), rate(OUTPUT)), "share"),),
        "percentunit",
        "paying",
        5,
        5,
        maximum=1,
        decimals=0,
        trend=True,
        no_value="idle",
    ),
    Panel(
        "number",
        "Generated tokens",
        "Tokens a second that requests received, of all engines selected.",
        ((rate("vllm:generation_tokens_total"), "tokens/s"),),
        TOKENS_A_SECOND,
        "paying",
        5,
        5,
        decimals=0,
        trend=True,
    ),
    Panel(
        "number",
        "Drafter",
        "What drafts: the last part of the checkpoint's path or name, the block's tokens, the most"
        " that is drafted a step (K), and whether the controller is on.",
        (
            (
                last_of_path(selector("vllm_dflash_drafter_info"), "drafter"),
                (
                    "{{drafter}}: block {{block_size}}, K {{num_speculative_tokens}}, adaptive:"
                    " {{adaptive}}"
                ),
            ),
        ),
        "none",
        "paying",
        24,
        3,
        names=True,
    ),
    Panel(
        "series",
        "Estimated speed-up, by engine",
        "The same over time. At the dashed line speculation stops paying.",
        ((speedup(BY_ENGINE), EACH),),
        TIMES,
        "paying",
        12,
        decimals=2,
        thresholds=((None, "transparent"), (1, "red")),
        no_value="no baseline",
        may_be_empty=NO_BASELINE,
    ),
    Panel(
        "series",
        "Tokens a verification, by engine",
        "tau of each engine. Engines that share a model's traffic should lie together: one well"
        " below its peers has a fault, not harder text.",
        ((mean(ACCEPTED, BY_ENGINE), EACH),),
        TOKENS,
        "paying",
        12,
        minimum=1,
        decimals=2,
        thresholds=((None, "transparent"), (1.3, "red")),
    ),
)

ACCEPTANCE = (
    Panel(
        "heat",
        "Accepted length",
        "How many verifications a second committed so many tokens. Much at one and much at a whole"
        " block: easy and hard text in turn. All near one: the drafter does not fit the target or"
        " the text.",
        ((rate(f"{ACCEPTED}_bucket", "le"), "{{le}}"),),
        per_second("verifications"),
        "acceptance",
        12,
    ),
    Panel(
        "series",
        "Acceptance by position",
        "Of the drafts that reached a position (all before it accepted), those accepted there:"
        " honest when drafts differ in length. With a drafter that fits it falls slowly or not at"
        " all; a cliff at one position is a fault.",
        ((ratio(rate(TAKEN, "position"), rate(REACHED, "position")), "position {{position}}"),),
        "percentunit",
        "acceptance",
        12,
        maximum=1,
    ),
    Panel(
        "series",
        "By context length",
        "tau by the length of the request's context, in tokens. A fall with length: the drafter was"
        " trained on shorter texts.",
        ((_by_context("context_length"), "{{context_length}}"),),
        TOKENS,
        "acceptance",
        6,
        minimum=1,
        decimals=2,
    ),
    Panel(
        "series",
        "By prefix-cache hit",
        "tau of requests whose prompt came in part from the prefix cache (true) against the rest"
        " (false). With like text the two lie together.",
        ((_by_context("prefix_cached"), "cached: {{prefix_cached}}"),),
        TOKENS,
        "acceptance",
        6,
        minimum=1,
        decimals=2,
    ),
    Panel(
        "series",
        "Drafter's context",
        "Positions of the drafter's context: computed, reused from the prefix cache, and missing"
        " (filled with zeros and masked). Missing should be nothing: acceptance falls with it.",
        ((share("vllm_dflash_draft_context_positions_total", "state"), "{{state}}"),),
        "percentunit",
        "acceptance",
        6,
        maximum=1,
        stacked=True,
    ),
    Panel(
        "bars",
        "Calibration",
        "Of the draft tokens to which the drafter gave a probability in this range, those accepted."
        " On the diagonal it is as sure as it is right. Only with adaptive drafting.",
        (
            (
                ratio(
                    rate("vllm_dflash_confidence_accepted_tokens_total", "confidence"),
                    rate("vllm_dflash_confidence_tokens_total", "confidence"),
                ),
                "{{confidence}}",
            ),
        ),
        "percentunit",
        "acceptance",
        6,
        maximum=1,
        no_value="adaptive drafting is off",
        may_be_empty="adaptive drafting is off",
    ),
    Note(
        "**Drafter's context** is all that the drafter sees of a request: computed in a step, or"
        " reused with the prefix cache's pages. *missing* should be nothing; where it is not,"
        " acceptance falls and no output changes."
    ),
)


DRAFT_LENGTHS = (
    Panel(
        "heat",
        "Verified draft length",
        "How many decoding steps of a request a second had so many draft tokens verified; 0 is a"
        " step without a draft. Without the controller nearly all are at K.",
        ((rate(f"{DRAFT_LENGTH}_bucket", "le"), "{{le}}"),),
        per_second("steps"),
        "draft-length",
        12,
    ),
    Panel(
        "series",
        "Drafted, verified, accepted",
        "Draft tokens a second. Drafted and not verified: cut by the controller or by a limit."
        " Verified and not accepted: wasted work of the target.",
        ((rate(DRAFTED), "drafted"), (rate(VERIFIED), "verified"), (rate(TAKEN), "accepted")),
        TOKENS_A_SECOND,
        "draft-length",
        12,
    ),
    Panel(
        "series",
        "Controller",
        "Decoding steps a second by what the controller chose and why: best by what it knows, or"
        " a trial. Only with adaptive drafting.",
        ((rate("vllm_dflash_controller_steps_total", "choice, why"), "{{choice}}: {{why}}"),),
        per_second("steps"),
        "draft-length",
        12,
        stacked=True,
        no_value="adaptive drafting is off",
        may_be_empty="adaptive drafting is off",
    ),
    Panel(
        "series",
        "Is drafting on, and why",
        "1 where the controller drafts, 0 where it does not: slow would not pay if every draft"
        " token was accepted, rejected would if more were. Only with adaptive drafting.",
        ((f"max by ({BY_ENGINE}, why) ({selector('vllm_dflash_drafting')})", EACH + ": {{why}}"),),
        "none",
        "draft-length",
        12,
        maximum=1,
        may_be_empty="adaptive drafting is off",
        no_value="adaptive drafting is off",
    ),
    Panel(
        "series",
        "Age of what is known, next trial",
        "How long ago a step that drafts was measured, and the decoding time until drafting is"
        " tried again where it is off.",
        (
            (selector("vllm_dflash_draft_measured_age_seconds"), EACH + ": measured"),
            (selector("vllm_dflash_next_trial_seconds"), EACH + ": next trial"),
        ),
        "s",
        "draft-length",
        12,
        may_be_empty="adaptive drafting is off, or drafts all the time",
        no_value="adaptive drafting is off",
    ),
    Panel(
        "series",
        "Steps without a draft",
        "Decoding steps of a request a second that had no draft although speculation is configured,"
        " by reason.",
        ((rate("vllm_dflash_speculation_refused_total", "reason"), "{{reason}}"),),
        per_second("steps"),
        "draft-length",
        12,
        stacked=True,
        may_be_empty="every step drafted",
    ),
)
