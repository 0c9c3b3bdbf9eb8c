"""What every stage of training refuses with."""

from vllm_dflash.files import RunError


class TrainingError(RunError):
    """A stage cannot go on; the message says why and what to do."""


class SettingsError(TrainingError):
    """A setting is unusable; the message names it and the remedy."""
