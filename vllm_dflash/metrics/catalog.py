"""Every metric of ours: name, kind, labels, unit, buckets and what it answers. Pure: the one list
that code, docs and tests share.

All names begin with ``vllm_dflash_`` and all metrics have the labels ``model_name`` and ``engine``,
as vLLM's own have. A counter's name ends in ``_total``; a histogram has the series ``_bucket``,
``_sum`` and ``_count``.

    python -m vllm_dflash.metrics.catalog      # the table of docs/monitoring.md
    pytest tests/unit/test_metrics.py
"""

import itertools
from dataclasses import dataclass

COMMON_LABELS = ("model_name", "engine")
CONTEXT_STARTS = (0, 256, 1024, 4096, 16384, 65536)
"""First context length of each bucket of the label ``context_length``, in tokens."""
CONFIDENCE_BUCKETS = 10
"""Equal parts of 0 to 1 of the label ``confidence``."""

MOST_CLASSES, OTHER_CLASSES = 32, "other"
"""Values of the label ``prompt_class`` that an engine shows, and the one for those after them."""

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
_LENGTHS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 16.0)
_SECONDS = (
    0.0005,
    0.001,
    0.002,
    0.004,
    0.006,
    0.008,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
)


@dataclass(frozen=True)
class Metric:
    """One metric. ``labels`` are those beside ``COMMON_LABELS``, each with its values in words."""

    name: str
    kind: str
    unit: str
    help: str
    answers: str
    """The operator's question."""
    labels: tuple[tuple[str, str], ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without infinity."""
    only: str = ""
    """When the metric is there, unless always."""

    @property
    def label_names(self) -> tuple[str, ...]:
        return COMMON_LABELS + tuple(name for name, _ in self.labels)


def context_bucket(num_tokens: int) -> str:
    """The value of the label ``context_length`` for a context of so many tokens."""
    for start, following in itertools.pairwise(CONTEXT_STARTS):
        if num_tokens < following:
            return f"{start}-{following - 1}"
    return f"{CONTEXT_STARTS[-1]}+"


def confidence_bucket(index: int) -> str:
    """The value of the label ``confidence`` for part ``index`` of ``CONFIDENCE_BUCKETS``."""
    return f"{index / CONFIDENCE_BUCKETS:.1f}-{(index + 1) / CONFIDENCE_BUCKETS:.1f}"


_POSITION = (("position", "1 for the first draft token of a block, and so on"),)
_CONTEXT = (
    (
        "context_length",
        "the request's context in tokens: "
        + ", ".join(context_bucket(start) for start in CONTEXT_STARTS),
    ),
    ("prefix_cached", "true where part of the prompt came from the prefix cache, else false"),
)
_CLASS = (
    (
        "prompt_class",
        f"as requests name it (docs/adaptive.md): the first {MOST_CLASSES} names of an engine, and"
        f" {OTHER_CLASSES}",
    ),
)
_CONFIDENCE = (("confidence", "probability that the drafter gave the token: 0.0-0.1 to 0.9-1.0"),)
_ADAPTIVE = "with adaptive drafting"
_SAID = "with adaptive drafting under synchronous scheduling (a CPU)"
_BASELINE = (
    "once the engine has measured plain decoding of about as many requests itself: with adaptive"
    " drafting by its trials, else where `num_speculative_tokens_per_batch_size` has steps without"
    " drafts"
)

ALL = (
    Metric(
        "vllm_dflash_accepted_length",
        HISTOGRAM,
        "tokens",
        "Tokens that one verification of a draft commits: accepted draft tokens and the target's"
        " own one.",
        "How many tokens is a speculative step worth? The mean is tau.",
        buckets=_LENGTHS,
    ),
    Metric(
        "vllm_dflash_draft_length",
        HISTOGRAM,
        "tokens",
        "Draft tokens that were verified for a request in one decoding step; 0 for a step without a"
        " draft.",
        "How much is drafted, and how often nothing?",
        buckets=(0.0, *_LENGTHS),
    ),
    Metric(
        "vllm_dflash_drafted_tokens_total",
        COUNTER,
        "tokens",
        "Draft tokens that the drafter made.",
        "How much drafting is thrown away before it is verified?",
        _POSITION,
    ),
    Metric(
        "vllm_dflash_verified_tokens_total",
        COUNTER,
        "tokens",
        "Draft tokens that the target verified.",
        "Which share of what is verified at a position is accepted?",
        _POSITION,
    ),
    Metric(
        "vllm_dflash_reached_tokens_total",
        COUNTER,
        "tokens",
        "Verified draft tokens whose predecessors in the draft were all accepted: the denominator"
        " of conditional acceptance.",
        "How good is the drafter at a position, given that all before it was right?",
        _POSITION,
    ),
    Metric(
        "vllm_dflash_accepted_tokens_total",
        COUNTER,
        "tokens",
        "Draft tokens that the target accepted.",
        "Where in the block does the drafter fail?",
        _POSITION,
    ),
    Metric(
        "vllm_dflash_output_tokens_total",
        COUNTER,
        "tokens",
        "Tokens that requests were given, after stop conditions have cut them; all steps together"
        " are the clients' count.",
        "Where do the tokens come from?",
        (
            (
                "step",
                (
                    "prefill: the step that ends a prompt; speculative: a verification; plain: a"
                    " decoding step without a draft"
                ),
            ),
        ),
    ),
    Metric(
        "vllm_dflash_step_seconds",
        HISTOGRAM,
        "seconds",
        "Time from the end of an engine's step to the end of the next while there is work.",
        "Where does the time go?",
        (
            (
                "kind",
                (
                    "prefill: a prompt is in it; speculative: drafts and verifies; partial: one of"
                    " the two; plain: neither"
                ),
            ),
        ),
        _SECONDS,
    ),
    Metric(
        "vllm_dflash_drafter_seconds",
        HISTOGRAM,
        "seconds",
        "Time of the drafter in one step: its context and its forward. On a GPU measured by device"
        " events.",
        "Which share of a step is the drafter's?",
        buckets=_SECONDS,
    ),
    Metric(
        "vllm_dflash_confidence_tokens_total",
        COUNTER,
        "tokens",
        "Reached draft tokens by the probability that the drafter gave them.",
        "Is the drafter as sure as it is right?",
        _CONFIDENCE,
        only=_SAID,
    ),
    Metric(
        "vllm_dflash_confidence_accepted_tokens_total",
        COUNTER,
        "tokens",
        "Accepted draft tokens by the probability that the drafter gave them.",
        "Is the drafter as sure as it is right?",
        _CONFIDENCE,
        only=_SAID,
    ),
    Metric(
        "vllm_dflash_request_accepted_length",
        HISTOGRAM,
        "tokens",
        "Mean accepted length of each finished request that had a draft verified.",
        "Do all requests gain, or a few?",
        buckets=(1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0),
    ),
    Metric(
        "vllm_dflash_context_verifications_total",
        COUNTER,
        "verifications",
        "Verifications of a draft, by the request's context.",
        "Does acceptance fall with long contexts or after a prefix-cache hit?",
        _CONTEXT,
    ),
    Metric(
        "vllm_dflash_context_committed_tokens_total",
        COUNTER,
        "tokens",
        "Tokens that verifications committed, by the request's context; over the verifications it"
        " is tau.",
        "Does acceptance fall with long contexts or after a prefix-cache hit?",
        _CONTEXT,
    ),
    Metric(
        "vllm_dflash_prompt_class_verifications_total",
        COUNTER,
        "verifications",
        "Verifications of a draft, by the class that the request says its prompt is of.",
        "Which kind of prompts has lost acceptance?",
        _CLASS,
        only="of requests that name one",
    ),
    Metric(
        "vllm_dflash_prompt_class_committed_tokens_total",
        COUNTER,
        "tokens",
        "Tokens that these verifications committed; over the verifications it is tau.",
        "Which kind of prompts has lost acceptance?",
        _CLASS,
        only="of requests that name one",
    ),
    Metric(
        "vllm_dflash_draft_context_positions_total",
        COUNTER,
        "positions",
        "Context positions of the drafter, summed over requests.",
        "Does the drafter see the whole context?",
        (
            (
                "state",
                (
                    "computed from the target's features; reused from the prefix cache; missing:"
                    " filled with zeros and masked"
                ),
            ),
        ),
    ),
    Metric(
        "vllm_dflash_controller_steps_total",
        COUNTER,
        "steps",
        "Decoding steps that the controller planned.",
        "What does adaptive drafting choose, and why?",
        (
            ("choice", "draft or plain"),
            ("why", "best by what is known; trial of what does not look best"),
        ),
        only=_ADAPTIVE,
    ),
    Metric(
        "vllm_dflash_drafting",
        GAUGE,
        "none",
        "1 where the controller drafts at the load at hand, 0 where it does not.",
        "Is drafting on or off now, and why?",
        (
            (
                "why",
                (
                    "pays; first: nothing was chosen yet; slow: it would not pay if every draft"
                    " token was accepted; rejected: too few are accepted for what it costs"
                ),
            ),
        ),
        only=_ADAPTIVE,
    ),
    Metric(
        "vllm_dflash_draft_measured_age_seconds",
        GAUGE,
        "seconds",
        "Time since a step that drafts was last measured with about as many requests; as of the"
        " last step.",
        "How old is what drafting is judged by?",
        only=_ADAPTIVE,
    ),
    Metric(
        "vllm_dflash_next_trial_seconds",
        GAUGE,
        "seconds",
        "Decoding time until drafting is tried again, if the load stays as it is; as of the last"
        " step.",
        "When is drafting tried again?",
        only=_ADAPTIVE + " and while it is off",
    ),
    Metric(
        "vllm_dflash_speculation_refused_total",
        COUNTER,
        "steps",
        "Decoding steps of a request without a draft although speculation is configured.",
        "Why is nothing drafted?",
        (
            (
                "reason",
                (
                    "controller: it chose so; batch_size: num_speculative_tokens_per_batch_size"
                    " does; request: its user does; max_model_len: no room for a block; grammar: it"
                    " forbids the draft; other"
                ),
            ),
        ),
    ),
    Metric(
        "vllm_dflash_baseline_seconds_total",
        COUNTER,
        "seconds",
        "Time in which plain decoding would have committed the tokens of the steps in"
        " measured_seconds.",
        "What is the speed-up over any window? rate(baseline_seconds_total) /"
        " rate(measured_seconds_total).",
        only=_BASELINE,
    ),
    Metric(
        "vllm_dflash_measured_seconds_total",
        COUNTER,
        "seconds",
        "Time of the decoding steps, plain ones included, for whose number of requests there is a"
        " baseline. A step of more than four times the median of its like was held up from outside"
        " and is left out.",
        "What is the speed-up over any window? rate(baseline_seconds_total) /"
        " rate(measured_seconds_total).",
        only=_BASELINE,
    ),
    Metric(
        "vllm_dflash_estimated_speedup",
        GAUGE,
        "ratio",
        "Committed tokens a second over those of plain decoding of about as many requests by this"
        " engine; the last thousand steps or so.",
        "Does it pay?",
        (
            (
                "baseline",
                (
                    "plain_steps: the median of the last plain steps; cost_model: adaptive"
                    " drafting's line through the steps that it measured"
                ),
            ),
        ),
        only=_BASELINE,
    ),
    Metric(
        "vllm_dflash_drafter_serving_since_seconds",
        GAUGE,
        "seconds",
        "Unix time since which these weights serve.",
        "Which drafter serves, and how old is it?",
        (
            ("drafter", "the folder or hub id that the weights came from"),
            ("drafter_id", "of the weights themselves: twelve hexadecimal digits"),
        ),
    ),
    Metric(
        "vllm_dflash_drafter_proved_accepted_length",
        GAUGE,
        "tokens",
        "tau that the drafter was proved at: on the traffic that it was refreshed for, or on its"
        " training's held-out prompts.",
        "Is acceptance what it was when the drafter was made?",
        only="where the drafter's folder says it (refresh.json, training.json)",
    ),
    Metric(
        "vllm_dflash_drafter_swaps_total",
        COUNTER,
        "swaps",
        "Drafters that were to take the place of the one that serves, without a restart.",
        "When did the drafter change?",
        (("result", "swapped, or refused: the old one serves on"),),
    ),
    Metric(
        "vllm_dflash_drafter_info",
        GAUGE,
        "none",
        "What drafts; the value is 1.",
        "What runs here?",
        (
            ("drafter", "the checkpoint that the engine was started with"),
            ("architecture", "of the checkpoint"),
            ("block_size", "tokens of a block, the anchor included"),
            ("num_speculative_tokens", "the most that is drafted a step"),
            ("adaptive", "true or false"),
            ("version", "of vllm-dflash"),
        ),
    ),
)


def table() -> str:
    """All metrics as a Markdown table, for docs/monitoring.md."""
    lines = [
        "| metric | kind | unit | labels | what it is | what it answers |",
        "|---|---|---|---|---|---|",
    ]
    for metric in ALL:
        labels = "; ".join(f"`{name}` ({text})" for name, text in metric.labels) or "none"
        what = metric.help + (f" Only {metric.only}." if metric.only else "")
        lines.append(
            f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {what} |"
            f" {metric.answers} |"
        )
    return "\n".join(lines) + "\n"


BY_NAME = {
    metric.name.removeprefix("vllm_dflash_").removesuffix("_total"): metric for metric in ALL
}
"""By the name without prefix and ``_total``: what recorders write."""


if __name__ == "__main__":
    print(table(), end="")
