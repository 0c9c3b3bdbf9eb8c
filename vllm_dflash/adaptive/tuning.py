"""The controller's constants. What each is worth stands in docs/adaptive.md, and
``tests/unit/test_adaptive_ablation.py`` holds the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """All that is set beforehand; nothing of it is a machine's or a model's."""

    every: int = 16
    """Steps between two choices; two such times lie between trials."""
    exploration: float = 0.0075
    """Share of the time that trials of what does not look best may lose."""
    margin: float = 1.02
    """What drafting has to promise over none before it begins; to go on it may not promise less
    than none."""
    window: int = 7
    """Steps whose median is the pace."""
    samples: int = 25
    """Measurements of a kind of step that count."""
    usual: float = 0.7
    """Confidence in a token of which the drafter says nothing."""
    prior: float = 4.0
    """Expected accepted tokens that stand for what is believed beforehand: that a drafter's
    confidence is right, and a request is like the others."""
    memory: float = 500.0
    """Expected accepted tokens that count; older ones fade."""
    recent: int = 64
    """Drafts that stand for those to come."""


TUNING = Tuning()
