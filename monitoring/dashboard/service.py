"""The rows on the service around the drafts: Time, Requests, Load. What the figures mean:
docs/dashboard.md.

pytest tests/engine/test_monitoring.py        (runs every query against a real server)
"""

from monitoring.dashboard.panel import TOKENS, TOKENS_A_SECOND, Panel, per_second
from monitoring.dashboard.promql import BY_ENGINE, EACH, mean, quantile, rate, ratio, selector
from monitoring.dashboard.speculation import DRAFTER_SECONDS, STEP_SECONDS, drafter_share

_REQUEST_ACCEPTED = "vllm_dflash_request_accepted_length"
# clamp_min, below: the first bucket ends at 1, where many requests may be, and a quantile is drawn
# from 0 to its end.


def _quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(q, histogram), f"p{q * 100:.0f}") for q in (0.5, 0.95))


TIME = (
    Panel(
        "series",
        "Step, by kind",
        "Mean seconds of an engine's step by its kind: with a prompt in it (prefill), drafting and"
        " verifying (speculative), one of the two (partial), neither (plain). Speculation pays"
        " where tau is above speculative over plain, at one load.",
        ((mean(STEP_SECONDS, "kind"), "{{kind}}"),),
        "s",
        "time",
    ),
    Panel(
        "series",
        "Drafter",
        "Mean seconds of the drafter in a step in which it ran: its context and its forward. On a"
        " GPU by device events.",
        ((mean(DRAFTER_SECONDS, BY_ENGINE), EACH),),
        "s",
        "time",
    ),
    Panel(
        "series",
        "Drafter's share of a step, by engine",
        "Seconds of the drafter of all seconds of steps. The alert is at the dashed line.",
        ((drafter_share(BY_ENGINE), EACH),),
        "percentunit",
        "time",
        maximum=1,
        thresholds=((None, "transparent"), (0.4, "red")),
    ),
    Panel(
        "series",
        "Time a generated token",
        "What a client waits for a token on average over a request. vLLM's inter-token latency is"
        " not shown: under speculation it is per step.",
        _quantiles("vllm:request_time_per_output_token_seconds"),
        "s",
        "time",
        12,
    ),
    Panel(
        "heat",
        "Step, all kinds",
        "How often a step took so long, per second.",
        ((rate(f"{STEP_SECONDS}_bucket", "le"), "{{le}}"),),
        per_second("steps"),
        "time",
        12,
        bucket_unit="s",
    ),
)

REQUESTS = (
    Panel(
        "heat",
        "Tokens a verification, per request",
        "How many finished requests a second had such a mean of tokens a verification.",
        ((rate(f"{_REQUEST_ACCEPTED}_bucket", "le"), "{{le}}"),),
        "reqps",
        "requests",
        12,
    ),
    Panel(
        "series",
        "Tokens a verification, per request, quantiles",
        "Half of the requests lie above p50. p10 near 1: some of the traffic gains nothing; find"
        " out which.",
        tuple(
            (f"clamp_min({quantile(q, _REQUEST_ACCEPTED)}, 1)", f"p{q * 100:.0f}")
            for q in (0.1, 0.5, 0.9)
        ),
        TOKENS,
        "requests",
        12,
        minimum=1,
    ),
    Panel(
        "series",
        "Time to first token",
        "From the request's arrival to its first token. Speculation does not shorten it.",
        _quantiles("vllm:time_to_first_token_seconds"),
        "s",
        "requests",
    ),
    Panel(
        "series",
        "Whole request",
        "From arrival to the last token.",
        _quantiles("vllm:e2e_request_latency_seconds"),
        "s",
        "requests",
    ),
    Panel(
        "series",
        "Finished",
        "Requests a second, by how they ended.",
        ((rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),),
        "reqps",
        "requests",
        stacked=True,
    ),
)

LOAD = (
    Panel(
        "series",
        "Requests",
        "Running in the engines and waiting for them. Speculation pays most with few running.",
        (
            (f"sum({selector('vllm:num_requests_running')})", "running"),
            (f"sum({selector('vllm:num_requests_waiting')})", "waiting"),
        ),
        "suffix: requests",
        "load",
        6,
        decimals=0,
    ),
    Panel(
        "series",
        "Tokens",
        "Tokens a second: generated, and of prompts.",
        (
            (rate("vllm:generation_tokens_total"), "generated"),
            (rate("vllm:prompt_tokens_total"), "prompt"),
        ),
        TOKENS_A_SECOND,
        "load",
        6,
    ),
    Panel(
        "series",
        "KV cache",
        "Of the blocks of the KV cache, those in use. The drafter's keys and values live there"
        " too.",
        ((f"max by ({BY_ENGINE}) ({selector('vllm:kv_cache_usage_perc')})", EACH),),
        "percentunit",
        "load",
        6,
        maximum=1,
    ),
    Panel(
        "series",
        "Prefix cache",
        "Of the prompt tokens looked up, those found in the prefix cache.",
        (
            (
                ratio(
                    rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total")
                ),
                "prefix-cache hits",
            ),
        ),
        "percentunit",
        "load",
        6,
        maximum=1,
    ),
)
