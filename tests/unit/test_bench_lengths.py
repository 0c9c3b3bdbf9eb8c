"""Figures over prompt lengths, and the tau at which drafting breaks even: tables and plots."""

from itertools import product
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from vllm_dflash.evaluation.html import page
from vllm_dflash.evaluation.lengths import length_tables, positions_of
from vllm_dflash.evaluation.methods import Drafter, parse_methods
from vllm_dflash.evaluation.report import as_markdown, short_lines
from vllm_dflash.evaluation.summary import rows
from vllm_dflash.evaluation.sweep import Record

LENGTHS, LOADS = (128, 2048), (1, 8)
TAU = "tau at which drafting breaks even"


def results(
    names: str, lengths: Any = LENGTHS, tau: float = 1.0, **settings: Any
) -> dict[str, Any]:
    """Two repeats, the second on a machine half as fast; a step that drafts costs 1 + load / 8 +
    length / 2048 plain ones."""
    methods, record = parse_methods(names, {"one": Drafter("/one", 7)}), Record()
    points = [
        {
            "prompt_set": "p",
            "prompt_tokens": length,
            "temperature": 0,
            "concurrency": load,
            "num_prompts": 8,
        }
        for length, load in product(lengths, LOADS)
    ]
    for repeat, (index, point), method in product((1, 2), enumerate(points), methods):
        cost = 1 + point["concurrency"] / 8 + (point["prompt_tokens"] or 0) / 2048
        drafts = 0 if method.kind == "plain" else 100
        step_ms = 5.0 * repeat * (cost if drafts else 1)
        record.runs.append(
            {
                "repeat": repeat,
                "point": index,
                "method": method.name,
                "step_ms": step_ms,
                "tokens_per_second": 1000 / step_ms,
                "requests": 8,
                "drafts": drafts,
                "accepted": round((tau - 1) * drafts),
                "reached": [],
                "accepted_at": [],
            }
        )
    return {
        "complete": True,
        "repeats_done": 2,
        "began": "now",
        "seconds": 1.0,
        "command": ["bench"],
        "versions": {},
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0},
        "settings": {"repeats": 2, **settings},
        "methods": [
            {"name": m.name, "what": "w", "state": "ran", "reason": None, "engine": None}
            for m in methods
        ],
        "points": points,
        "rows": rows(record, len(points), methods),
        "runs": record.runs,
    }


def test_a_length_a_column() -> None:
    (table,) = length_tables(results("plain,dflash", tau=2.5))
    assert table.header == ["requests at a time", "method", "128 tokens", "2048 tokens"]
    assert [row[:2] for row in table.rows] == [
        ["1", "plain"],
        ["1", "dflash"],
        ["8", "plain"],
        ["8", "dflash"],
    ]
    assert table.rows[3][2:] == ["0.48; tau 2.50; 15.47 ms", "0.33; tau 2.50; 22.50 ms"]
    assert table.rows[0][2] == "150.0 tokens/s; 7.50 ms"


def test_one_length_has_no_table_of_its_own() -> None:
    assert length_tables(results("plain,dflash", lengths=[None])) == []
    assert length_tables(results("plain,dflash", lengths=[128])) == []


def test_the_tau_that_drafting_needs() -> None:
    """Steps are compared within a repeat, so that a machine half as fast makes no spread."""
    found = results("plain,dflash,dflash:3", break_even=True)
    (table,) = length_tables(found)
    assert table.title == f"{TAU}: p, temperature 0"
    assert [row[1] for row in table.rows] == ["dflash", "dflash:3", "dflash", "dflash:3"]
    assert table.rows[0][2:] == ["1.19", "2.12"]
    assert table.rows[2][2:] == ["2.06", "3.00"]
    assert len(table.notes) == 1
    assert any("breaks even at tau 2.06" in line for line in short_lines(found))


def test_drafts_that_were_accepted_are_said() -> None:
    (table,) = length_tables(results("plain,dflash", tau=1.5, break_even=True))
    assert "dflash at 1, 128 tokens: tau was 1.50, so not all drafts were rejected." in table.notes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "settings"),
    [(LENGTHS, {}), (LENGTHS, {"break_even": True}), ([None], {"break_even": True})],
)
@pytest.mark.parametrize("names", ["plain,dflash", "dflash", "plain,dflash,dflash:3"])
def test_both_reports_have_them(names: str, lengths: Any, settings: Any) -> None:
    """Also without a baseline."""
    pytest.importorskip("matplotlib")
    found = results(names, lengths=lengths, **settings)
    html, markdown = page(found), as_markdown(found)
    (table,) = length_tables(found)
    assert f"## {table.title}" in markdown
    assert f"<h2>{table.title}</h2>" in html
    svgs = [part.partition("</svg>")[0] + "</svg>" for part in html.split("<svg")[1:]]
    assert len(svgs) == 1 + len(lengths)
    for svg in svgs:
        ElementTree.fromstring("<svg" + svg)
    wanted = "drafting pays above this tau" if settings else "prompt tokens"
    assert wanted in svgs[0]


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default"}}, 1024),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 4}}, 400),
        (
            {"max_position_embeddings": 100, "rope_parameters": {"rope_type": "yarn", "factor": 4}},
            100,
        ),
        ({}, None),
    ],
)
def test_positions_are_as_vllm_derives_them(config: dict[str, Any], positions: int | None) -> None:
    assert positions_of(SimpleNamespace(**config)) == positions
