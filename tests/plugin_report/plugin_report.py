"""Test only: a vLLM plug-in that leaves a file for each process that loads plug-ins, named by its
pid, with what ours has done there.

Put this folder on PYTHONPATH (its dist-info makes it a distribution) and name a folder in
VLLM_DFLASH_REPORT.
"""

import json
import os
import threading
import time
from pathlib import Path

SWITCH = "VLLM_DFLASH_REPORT"


def report() -> None:
    """The entry point. It looks for a minute, for plug-ins load in no certain order, and ours may
    take a while."""
    if SWITCH in os.environ:
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    from vllm.model_executor.models import ModelRegistry

    path, said = Path(os.environ[SWITCH], f"{os.getpid()}.json"), None
    for _ in range(120):
        registered = getattr(ModelRegistry.models.get("DFlashDraftModel"), "module_name", "")
        if registered != said:
            path.write_text(json.dumps({"drafter": registered}))
            said = registered
        time.sleep(0.5)
