"""What a panel of the dashboard says: the rows are lists of these, and ``build.py`` turns them into
Grafana's JSON.

pytest tests/unit/test_monitoring.py
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["series", "number", "bars", "heat"]
Threshold = tuple[float | None, str]
"""From this value up, this colour; ``None`` is the lowest."""

# Grafana's units of one's own.
TIMES, TOKENS, TOKENS_A_SECOND = "suffix: x", "suffix: tokens", "suffix: tokens/s"


def per_second(what: str) -> str:
    """The unit of so many things a second."""
    return f"suffix: {what}/s"


@dataclass(frozen=True)
class Panel:
    """One panel. ``targets`` are (PromQL, legend); ``unit`` is Grafana's id of a unit; ``width`` is
    of 24 columns."""

    kind: Kind
    title: str
    description: str
    targets: tuple[tuple[str, str], ...]
    unit: str
    anchor: str
    """The guide's section."""
    width: int = 8
    height: int = 8
    minimum: float | None = 0
    maximum: float | None = None
    decimals: int | None = None
    thresholds: tuple[Threshold, ...] = ()
    stacked: bool = False
    trend: bool = False
    """A number with its history behind it."""
    names: bool = False
    """A number panel that shows its series' names, not its value."""
    bucket_unit: str = "none"
    """A heat map's vertical axis."""
    no_value: str = ""
    may_be_empty: str = ""
    """Why a sound server may have no sample for it."""


@dataclass(frozen=True)
class Note:
    """A sentence of Markdown across the dashboard, under the panels before it."""

    text: str
