"""The row on the drafter in force: which, since when, against what it was proved at, and swaps.
What the figures mean: docs/dashboard.md.

pytest tests/engine/test_monitoring.py        (runs every query against a real server)
"""

from monitoring.dashboard.panel import TOKENS, Panel
from monitoring.dashboard.promql import BY_ENGINE, EACH, last_of_path, mean, rate, ratio, selector
from monitoring.dashboard.speculation import ACCEPTED

SINCE = selector("vllm_dflash_drafter_serving_since_seconds")
SWAPS = "vllm_dflash_drafter_swaps_total"
_PROVED = f"max by ({BY_ENGINE}) ({selector('vllm_dflash_drafter_proved_accepted_length')})"
_IN = 'result="swapped"'
SWAPPED = f"changes({selector(SWAPS, _IN)}[1m]) > 0"
"""Where a swap was: the annotations of all panels."""
NO_CLASS = "no request names one"

DRAFTER = (
    Panel(
        "number",
        "Drafter in force",
        "The last part of the folder or name that the weights came from, and their id: it is of the"
        " weights themselves, so two servers with one id have the same drafter.",
        ((last_of_path(SINCE, "drafter"), "{{drafter}}: {{drafter_id}}"),),
        "none",
        "drafter",
        16,
        4,
        names=True,
    ),
    Panel(
        "number",
        "In force for",
        "Time since these weights serve: since the server's start, or since the last swap.",
        ((f"time() - {SINCE}", EACH),),
        "s",
        "drafter",
        8,
        4,
        decimals=0,
    ),
    Panel(
        "series",
        "Tokens a verification, and proved",
        "tau of each engine, and what its drafter was proved at when it was made. Lines that part"
        " are a target or a traffic that the drafter does not know: refresh it.",
        ((mean(ACCEPTED, BY_ENGINE), EACH), (_PROVED, EACH + ": proved")),
        TOKENS,
        "drafter",
        12,
        minimum=1,
        decimals=2,
    ),
    Panel(
        "series",
        "By prompt class",
        "tau by the class that requests say their prompts are of. One that falls alone: that text"
        " has changed, and a refresh on it is due.",
        (
            (
                ratio(
                    rate("vllm_dflash_prompt_class_committed_tokens_total", "prompt_class"),
                    rate("vllm_dflash_prompt_class_verifications_total", "prompt_class"),
                ),
                "{{prompt_class}}",
            ),
        ),
        TOKENS,
        "drafter",
        6,
        minimum=1,
        decimals=2,
        no_value=NO_CLASS,
        may_be_empty=NO_CLASS,
    ),
    Panel(
        "series",
        "Swaps",
        "Drafters that were swapped in since the server's start, and those that were refused.",
        ((f"sum by (result) ({selector(SWAPS)})", "{{result}}"),),
        "suffix: swaps",
        "drafter",
        6,
        decimals=0,
    ),
)
