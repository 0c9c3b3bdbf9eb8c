"""Imported by each Python process that a test starts, before anything else: fewer collections of
garbage while it imports what makes none.

An eighth of vLLM's import is the collector's. What is imported is taken out of its sight after that
(the plug-in beside this file).
"""

import gc

gc.set_threshold(200_000, 20, 20)
