"""``python -m vllm_dflash.cli``."""

import sys

from vllm_dflash.cli import main

if __name__ == "__main__":
    sys.exit(main())
