"""Block-diffusion speculative decoding (DFlash) for stock vLLM, as a plug-in.

Importing this package has no effects; vLLM loads the plug-in through the entry point
``vllm_dflash.plugin:register``.
"""

__version__ = "0.1.0"
