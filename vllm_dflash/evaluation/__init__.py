"""The benchmark: methods on the same prompts in one run, taking turns, and the report of it."""
