"""What our architecture stands for on a vLLM that we do not support: a refusal, and only where a
drafter is asked for."""

from typing import NoReturn

from vllm_dflash.supported import installed_vllm, refusal


def __getattr__(name: str) -> NoReturn:
    # vLLM looks the class up in order to inspect it, while the front end makes its configuration.
    # Refusing here is earlier than a class could: its constructor runs in a worker, after the
    # target has been loaded.
    if name == "UnsupportedVLLM":
        raise RuntimeError(refusal(installed_vllm()))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
