"""The vLLM releases at the ends of the supported range: with another range no test is edited."""

from packaging.specifiers import SpecifierSet

from vllm_dflash.supported import SUPPORTED_VLLM

_ENDS = {each.operator: each.version for each in SpecifierSet(SUPPORTED_VLLM)}
OLDEST = _ENDS[">="]
"""The oldest minor version that is supported, such as ``0.32``."""
TOO_NEW = _ENDS["<"]
"""The first that is not, such as ``0.34``."""
