"""``vllm-dflash top``: the figures of a server's metrics, and what is said of them."""

import http.server
import threading
from pathlib import Path

import pytest
from rich.console import Console

from vllm_dflash.cli import main
from vllm_dflash.metrics import snapshots
from vllm_dflash.metrics.drafting import Status, drafting_samples
from vllm_dflash.metrics.figures import Scrape, drafting_line, figures, verdict
from vllm_dflash.metrics.read import read
from vllm_dflash.metrics.top import address, screen

TEXT = """\
# TYPE vllm_dflash_drafter_info gauge
vllm_dflash_drafter_info{model_name="m",engine="0",drafter="d"} 1
# TYPE vllm_dflash_accepted_length histogram
vllm_dflash_accepted_length_bucket{model_name="m",engine="0",le="+Inf"} 4
vllm_dflash_accepted_length_count{model_name="m",engine="0"} 4
vllm_dflash_accepted_length_sum{model_name="m",engine="0"} 10
# TYPE vllm_dflash_reached_tokens counter
vllm_dflash_reached_tokens_total{model_name="m",engine="0",position="1"} 4
# TYPE vllm_dflash_accepted_tokens counter
vllm_dflash_accepted_tokens_total{model_name="m",engine="0",position="1"} 3
"""
MANY = """\
# TYPE vllm_dflash_drafter_info gauge
vllm_dflash_drafter_info{model_name="m",engine="0",drafter="d",block_size="8"} 1
# TYPE vllm_dflash_accepted_length histogram
vllm_dflash_accepted_length_count{model_name="m",engine="0"} 400
vllm_dflash_accepted_length_sum{model_name="m",engine="0"} 1000
# TYPE vllm_dflash_step_seconds histogram
vllm_dflash_step_seconds_count{model_name="m",engine="0",kind="speculative"} 400
vllm_dflash_step_seconds_sum{model_name="m",engine="0",kind="speculative"} 2
"""
BASELINE = """\
# TYPE vllm_dflash_baseline_seconds counter
vllm_dflash_baseline_seconds_total{model_name="m",engine="0"} 3
# TYPE vllm_dflash_measured_seconds counter
vllm_dflash_measured_seconds_total{model_name="m",engine="0"} 2
# TYPE vllm_dflash_estimated_speedup gauge
vllm_dflash_estimated_speedup{model_name="m",engine="0",baseline="plain_steps"} 1.5
"""


class Cut(http.server.BaseHTTPRequestHandler):
    """Answers with less than it promises."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "9999")
        self.end_headers()
        self.wfile.write(TEXT[: self.server.sent].encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("sent", [0, 80, 200, 400])
def test_top_of_an_answer_that_is_cut_short(capsys: pytest.CaptureFixture[str], sent: int):
    """It was a traceback (IncompleteRead)."""
    with http.server.HTTPServer(("127.0.0.1", 0), Cut) as server:
        server.sent = sent
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert main(["top", f"http://127.0.0.1:{server.server_port}", "--once"]) == 2
    assert "is cut short" in capsys.readouterr().err


def test_figures_and_what_they_say():
    [found] = figures(Scrape.parse(TEXT, 0.0))
    assert (found["tau"], found["acceptance"], found["speedup"]) == (2.5, {"1": 0.75}, None)
    assert "cannot be said" in verdict(found)
    [paying] = figures(Scrape.parse(MANY + BASELINE, 0.0))
    said = (
        "pays: 1.50 x plain decoding (plain_steps; 1.29 to 1.74 by 400 verifications in 400 steps),"
        " tau 2.50"
    )
    assert verdict(paying) == said
    [since] = figures(Scrape.parse(TEXT, 5.0), Scrape.parse(TEXT, 3.0))
    assert since["tau"] is None
    assert verdict(since) == "no draft was verified in this time"


def test_no_verdict_by_a_few_verifications():
    """``top`` said "does not pay: 0.50 x" after 16 verifications on a machine that was busy for a
    moment."""
    few = {
        "speedup": 0.5,
        "tau": 2.5,
        "verifications": 16.0,
        "steps": 16.0,
        "block_size": 8.0,
        "baseline": "cost_model",
    }
    assert (
        verdict(few)
        == "no verdict yet: between 0.24 and 1.05 x plain decoding by 16 verifications in 16 steps"
    )
    assert verdict(few | {"verifications": 64.0, "steps": 16.0}).startswith("no verdict yet"), (
        "one step's time is common to its requests"
    )
    assert verdict(few | {"verifications": 64.0, "steps": 64.0}).startswith("does not pay: 0.50 x")
    many = few | {"verifications": 9000.0, "steps": 9000.0}
    assert verdict(many | {"speedup": 1.0}).startswith("makes no difference: 1.00 x")
    assert verdict(many | {"speedup": 1.0, "steps": 900.0}).startswith("no verdict yet")
    assert verdict(few | {"steps": 0.0}) == "no verdict yet: 16 verifications in 0 steps"


def test_what_top_says_of_drafting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the controller's own state to the line: in the metrics' text and back."""
    assert (
        drafting_line(figures(Scrape.parse(TEXT, 0.0))[0]) == "always on: without adaptive drafting"
    )
    monkeypatch.setenv(snapshots.USERS, str(tmp_path))
    file = tmp_path / snapshots.file_name("engine", "0")
    info = [(["d", "DFlashDraftModel", "8", "7", "true", "0"], 1)]
    lines = []
    for status in (
        Status(False, "slow", measured=820.0, next_trial=40.0),
        Status(False, "rejected", measured=999.0, next_trial=7200.0),
        Status(True, "pays", measured=998.0),
        Status(True, "first"),
    ):
        samples = {"drafter_info": info, **drafting_samples(status, now=1000.0)}
        snapshots.write(file, {"labels": ["m", "0"], "samples": samples})
        lines.append(drafting_line(figures(Scrape.parse(read(wait=False), 0.0))[0]))
    assert lines == [
        "off: measured slow, 3.0 minutes ago, next trial in 40 seconds of decoding",
        (
            "off: too few draft tokens are accepted, 1 seconds ago, next trial in 2.0 hours of"
            " decoding"
        ),
        "on: measured to pay, 2 seconds ago",
        "on: nothing was chosen yet",
    ]


def test_top_without_a_server(capsys: pytest.CaptureFixture[str]):
    assert main(["top", "127.0.0.1:9", "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert (
        address("host:1")
        == address("http://host:1/")
        == address("http://host:1/metrics")
        == "http://host:1/metrics"
    )


def test_top_says_that_a_server_came_back_without(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print(screen("http://x/metrics", Scrape.parse("vllm:up 1\n", 1.0)))
    assert "has no vllm_dflash metrics" in " ".join(capsys.readouterr().out.split())
