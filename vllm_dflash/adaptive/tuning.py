"""The controller's constants. What each is worth stands in docs/adaptive.md, and
``tests/unit/test_adaptive_ablation.py`` holds the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """All that is set beforehand; nothing of it is a machine's or a model's."""

    every: int = 32
    """Steps between two choices, and between two trials at the least."""
    exploration: float = 0.0075
    """Share of the time that trials of what does not look best may lose."""
    window: int = 9
    """Measurements whose median counts."""
    trust: int = 2
    """Measurements of a drafter's time that the profile's stands for."""
    usual: float = 0.7
    """Confidence in a token of which the drafter says nothing."""
    prior: float = 4.0
    """Expected accepted tokens that stand for what is believed beforehand: that a drafter's
    confidence is right."""
    memory: float = 500.0
    """Expected accepted tokens that count; older ones fade. So many stand for a position, and for a
    request, that are like the others."""
    recent: int = 64
    """Drafts that stand for those to come."""


TUNING = Tuning()
