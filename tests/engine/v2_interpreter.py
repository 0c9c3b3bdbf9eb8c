"""Makes a process run vLLM's V2 model runner, which needs Triton, on a CPU: its kernels go through
Triton's interpreter.

The interpreter is chosen when Triton is imported and the runner when vLLM is, so whatever uses it
has a process of its own.
"""

import os
import sys
from importlib import import_module


def use_interpreter() -> None:
    """Readies this process for the V2 runner on a CPU; must come before the first import of
    vLLM. Again, as in a fork of one that did, it only sets the environment."""
    used = "triton" in sys.modules and "cpu" in sys.modules["triton"].backends.backends
    if not used and "vllm" in sys.modules:
        raise RuntimeError(
            "vLLM is already imported: it has chosen its runner. Start a process of its own"
        )
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    # One thread, pinned to no core: a toy gains nothing by more, and beside other work pinned
    # threads wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if used:
        return
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class InterpretedDriver(DriverBase):
        """vLLM takes Triton for absent unless a driver is active; the interpreter itself asks the
        driver for nothing."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        @staticmethod
        def map_python_to_cpp_type(ty: str) -> str:
            return ty

        def get_current_target(self) -> None:
            return None

        def get_active_torch_device(self) -> str:
            return "cpu"

        def get_benchmarker(self) -> None:
            return None

    backends["cpu"] = Backend(BaseBackend, InterpretedDriver)
    here = f"{__package__}." if __package__ else ""  # this file may be run as a script
    import_module(f"{here}quick_interpreter").install()
