"""The controller's constants. What each is worth stands in docs/adaptive.md, and
``tests/unit/test_adaptive_ablation.py`` holds the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """All that is set beforehand; nothing of it is a machine's or a model's."""

    every: int = 16
    """Steps between two choices; what was seen is learned from then, in one piece. Two such times
    lie between trials."""
    exploration: float = 0.0075
    """Share of the time that trials of what does not look best may lose."""
    margin: float = 1.02
    """What drafting has to promise over none before it begins; to go on it may not promise less
    than none."""
    window: int = 7
    """Steps whose median is the pace."""
    samples: int = 25
    """Measurements of a kind of step that count."""
    prior: float = 2.0
    """How fast a curve of acceptance is believed to be another: the information, in tokens times
    p (1 - p), that stands for what is believed beforehand."""
    memory: float = 500.0
    """Tokens that count for acceptance; older ones fade."""
    recent: int = 64
    """Drafts that stand for those to come."""


TUNING = Tuning()
