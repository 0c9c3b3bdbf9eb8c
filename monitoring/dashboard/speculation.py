"""The rows on drafts and what becomes of them: Paying?, Acceptance, Draft length. What the figures mean: docs/dashboard.md.

pytest tests/engine/test_monitoring.py        (runs every query against a real server)
"""

from monitoring.dashboard.panel import Panel
from monitoring.dashboard.promql import BY_ENGINE, EACH, mean, rate, ratio, selector, share

ACCEPTED, DRAFT_LENGTH = "vllm_dflash_accepted_length", "vllm_dflash_draft_length"
DRAFTED, VERIFIED, TAKEN = (f"vllm_dflash_{kind}_tokens_total" for kind in ("drafted", "verified", "accepted"))
DRAFTER_SECONDS, STEP_SECONDS = "vllm_dflash_drafter_seconds", "vllm_dflash_step_seconds"


def drafter_share(by: str) -> str:
    """Seconds of drafting of all seconds of steps."""
    return ratio(rate(f"{DRAFTER_SECONDS}_sum", by), rate(f"{STEP_SECONDS}_sum", by))


PAYING = (
    Panel(
        "number", "Estimated speed-up",
        "Tokens a second against the same server without speculation. Below 1 it costs more than it brings. Absent where no baseline was "
        "measured: it is never guessed.",
        ((f"avg({selector('vllm_dflash_estimated_speedup')})", "speed-up"),), "x", "paying", 4, 5,
        decimals=2, thresholds=((None, "red"), (1, "yellow"), (1.1, "green")), trend=True, no_value="no baseline",
        may_be_empty="no baseline was measured",
    ),
    Panel(
        "number", "Tokens a verification",
        "Tokens that the target commits for each draft it verifies, its own included (tau). 1 is what plain decoding gives.",
        ((mean(ACCEPTED), "tau"),), "none", "paying", 4, 5,
        minimum=1, decimals=2, thresholds=((None, "red"), (1.3, "yellow"), (2, "green")), trend=True, no_value="idle",
    ),
    Panel(
        "number", "Drafter's share of a step",
        "Seconds spent drafting of all seconds of steps. Above 40 % the drafter is too large for its target, or drafts for too few tokens.",
        ((drafter_share(""), "share"),), "percentunit", "paying", 4, 5,
        maximum=1, decimals=1, thresholds=((None, "green"), (0.3, "yellow"), (0.4, "red")), trend=True, no_value="idle",
    ),
    Panel(
        "number", "Steps that draft", "Of all decoding steps, those in which the drafter ran. The rest were left out by the controller.",
        ((ratio(rate(f"{STEP_SECONDS}_count", where='kind="draft"'), rate(f"{STEP_SECONDS}_count", where='kind=~"draft|plain"')), "share"),),
        "percentunit", "paying", 4, 5, maximum=1, decimals=0, trend=True, no_value="idle",
    ),
    Panel(
        "number", "Generated tokens", "Tokens a second that requests received, of the engines selected.",
        ((rate("vllm:generation_tokens_total"), "tokens/s"),), "ops", "paying", 4, 5, decimals=0, trend=True,
    ),
    Panel(
        "number", "Drafter", "What drafts: kind, block size and the most tokens that a draft may have.",
        ((selector("vllm_dflash_drafter_info"), "{{kind}} · block {{block_size}} · K {{num_speculative_tokens}}"),), "none", "paying", 4, 5,
        names=True,
    ),
    Panel(
        "series", "Estimated speed-up, by engine", "The same over time. The line at 1 is where speculation stops paying.",
        ((selector("vllm_dflash_estimated_speedup"), EACH),), "x", "paying", 12,
        thresholds=((None, "transparent"), (1, "red")), no_value="no baseline", may_be_empty="no baseline was measured",
    ),
    Panel(
        "series", "Tokens a verification, by engine",
        "tau of each engine. Engines of one model serve alike: one that lies well below its peers has a fault, not harder text.",
        ((mean(ACCEPTED, BY_ENGINE), EACH),), "none", "paying", 12, minimum=1, thresholds=((None, "transparent"), (1.3, "red")),
    ),
)  # fmt: skip

ACCEPTANCE = (
    Panel(
        "heat", "Tokens a verification", "How often a verification committed so many tokens, per second. Two bands, at one and at a whole block: easy "
        "and hard text in turn. One band near one: the drafter does not fit.",
        ((rate(f"{ACCEPTED}_bucket", "le"), "{{le}}"),), "ops", "acceptance", 12,
    ),
    Panel(
        "series", "Acceptance by position",
        "Of the drafts verified at a position, those accepted: a position counts only where all before it were accepted, so this is honest "
        "when the length changes. It falls slowly with a drafter that fits; a cliff at one position is a fault.",
        ((ratio(rate(TAKEN, "position"), rate(VERIFIED, "position")), "position {{position}}"),), "percentunit", "acceptance", 12, maximum=1,
    ),
    Panel(
        "series", "Acceptance by context length", "Accepted tokens a verification by the length of the request's context, in tokens. A fall with "
        "length: the drafter was trained on shorter texts.",
        ((mean("vllm_dflash_accepted_length_by_context", "context"), "up to {{context}}"),), "none", "acceptance", 8, minimum=1,
    ),
    Panel(
        "series", "Acceptance by prefix-cache hit", "Requests whose prompt was found in the prefix cache against those that were computed. The two should lie "
        "together: a cached prompt drafts as well as a new one.",
        ((mean("vllm_dflash_accepted_length_by_prefix", "prefix_cache"), "{{prefix_cache}}"),), "none", "acceptance", 8, minimum=1,
    ),
    Panel(
        "series", "Draft context", "Positions of requests' contexts that a draft attends to (valid), that were filled in later, and that are masked because the "
        "drafter never saw them. Masked should be nothing.",
        ((share("vllm_dflash_context_positions_total", "state"), "{{state}}"),), "percentunit", "acceptance", 8, maximum=1, stacked=True,
    ),
    Panel(
        "bars", "Calibration", "Of the drafted tokens to which the drafter gave a probability in this range, those accepted. Far from the range: "
        "its confidence misleads the controller, which corrects for it.",
        ((ratio(rate("vllm_dflash_confidence_accepted_total", "confidence"), rate("vllm_dflash_confidence_verified_total", "confidence")), "{{confidence}}"),),
        "percentunit", "acceptance", 24, 6, maximum=1,
    ),
)  # fmt: skip

DRAFT_LENGTHS = (
    Panel(
        "heat", "Draft length", "How often so many tokens of a draft were verified, per second. Without the controller it is one band, at K.",
        ((rate(f"{DRAFT_LENGTH}_bucket", "le"), "{{le}}"),), "ops", "draft-length", 8,
    ),
    Panel(
        "series", "Drafted, verified, accepted", "Tokens a second. Drafted but not verified: cut by the controller. Verified but not accepted: wasted work of the "
        "target.",
        ((rate(DRAFTED), "drafted"), (rate(VERIFIED), "verified"), (rate(TAKEN), "accepted")), "ops", "draft-length", 8,
    ),
    Panel(
        "series", "Controller", "What the controller chose for how many steps a second, and why it drafted nothing.",
        ((rate("vllm_dflash_controller_steps_total", "state, reason"), "{{state}} {{reason}}"),), "ops", "draft-length", 8, stacked=True,
    ),
    Panel(
        "series", "Refused or switched off", "Requests or steps that went without speculation, per second, by reason.",
        ((rate("vllm_dflash_disabled_total", "reason"), "{{reason}}"),), "ops", "draft-length", 24, 6,
        may_be_empty="nothing was refused",
    ),
)  # fmt: skip
