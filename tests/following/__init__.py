"""The parts of ``prove_follow.py``."""
