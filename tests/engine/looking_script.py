"""Says what it finds, for ``test_forks.py``: a line of JSON, and one of errors; ends with 7."""

import json
import os
import sys

print(
    json.dumps(
        {
            "arguments": sys.argv[1:],
            "name": __name__,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "group": os.getpgid(0),
            "folder": os.getcwd(),
            "said": os.environ.get("SAID"),
            "input": sys.stdin.read(),
            "vllm": "vllm.v1.worker.cpu_worker" in sys.modules,
            "plug-ins": getattr(sys.modules.get("vllm.plugins"), "plugins_loaded", False),
        }
    )
)
print("an error", file=sys.stderr)
sys.exit(7)
