"""The one logger of this package. Its name is below "vllm", so that vLLM's own handlers and format
apply."""

import logging

logger = logging.getLogger("vllm.plugins.dflash")
