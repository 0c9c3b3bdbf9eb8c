"""Test only: a vLLM plug-in that leaves a file for each process that loads plug-ins, named by its pid, with what ours has done there.

Put this folder on PYTHONPATH (its dist-info makes it a distribution) and name a folder in VLLM_DFLASH_REPORT.
"""

import json
import os
import threading
from pathlib import Path

SWITCH = "VLLM_DFLASH_REPORT"


def report() -> None:
    """The entry point. It waits a moment, for plug-ins load in no certain order."""
    if SWITCH in os.environ:
        threading.Timer(1, _write).start()


def _write() -> None:
    from vllm.model_executor.models import ModelRegistry

    registered = getattr(ModelRegistry.models.get("DFlashDraftModel"), "module_name", "")
    Path(os.environ[SWITCH], f"{os.getpid()}.json").write_text(json.dumps({"drafter": registered}))
