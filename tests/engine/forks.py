"""Runs a test's Python processes as forks of one process that has vLLM imported: the import takes
longer than most of what they do.

``start`` is the harness's side; run as a script, this file is that process: it reads a request a
line and ends with its standard input.
A fork finds what it would find when started by itself: its arguments, environment, input, output
and a process group of its own. What it spawns are forks too (``quick_spawn.py``).
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

_PR_SET_THP_DISABLE = 41
_READ, _WRITE = os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_APPEND
INTERPRETER = "interpreter"
"""Of ``start``: the engines are of vLLM's V2 runner, by Triton's interpreter."""
LIBRARIES = "libraries"
"""Of ``start``: nothing of vLLM is imported, only what it imports itself: whichever vLLM the
environment's path finds first is the process's."""
_IMPORTED_BY_VLLM = (
    "torch._inductor.compile_fx",
    "torch.utils.cpp_extension",
    "transformers.models.auto.modeling_auto",
    "transformers.processing_utils",
    "transformers.quantizers.auto",
    "fastapi",
    "openai",
    "requests",
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "xgrammar",
    "cv2",
)
_IMPORTED_BY_ENGINES = (
    "vllm.compilation.backends",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.transformers_utils.configs.speculators",
    "vllm.utils.cpu_triton_utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.async_scheduler",
    "vllm_dflash.adaptive.scheduler",
    "vllm_dflash.cpu.backend",
    "vllm_dflash.drafting.v1",
    "vllm_dflash.metrics.engine",
    "vllm_dflash.models.drafter",
    "vllm_dflash.patching",
)
"""What vLLM imports when an engine starts, and this package, which changes nothing by that: more
than a second of each process's time."""


class Fork:
    """A process that was started; its process id is also its process group's."""

    def __init__(self, parent: "subprocess.Popen[str]", request: Mapping[str, Any]) -> None:
        self._parent, self._status = parent, None
        self.pid: int = self._ask(request)
        self._descriptor = os.pidfd_open(self.pid)

    def runs(self) -> bool:
        try:
            self.wait(0)
        except TimeoutError:
            return True
        return False

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status, once it has ended; negative: the signal that ended it.

        Raises TimeoutError.
        """
        if self._status is None:
            if not select.select([self._descriptor], [], [], timeout_s)[0]:
                raise TimeoutError(f"still running after {timeout_s:.0f} s")
            self._status = self._ask({"ended": self.pid})
            os.close(self._descriptor)
        return self._status

    def kill(self) -> None:
        """Ends it and all of its group."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def _ask(self, request: Mapping[str, Any]) -> int:
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())


def start(
    command: Sequence[str], env: Mapping[str, str], files: Mapping[int, Path], kind: str = ""
) -> Fork:
    """Runs a Python command beside this process: a script's path, or "-m" and a module, and its
    arguments.

    Args:
        files: what its descriptors open, its standard input and output at least; what it writes
            as errors goes to the output unless they open it too.
        kind: "", ``INTERPRETER`` or ``LIBRARIES``.
    """
    request = {
        "argv": list(command),
        "env": dict(env),
        "files": {number: str(path) for number, path in files.items()},
    }
    multiprocessing = "" if kind == LIBRARIES else env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return Fork(_parent(multiprocessing, kind), request)


class Popen:
    """``subprocess.Popen`` of a Python command, as far as ``EngineProcess`` and the fuzzer ask it,
    by a fork."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: IO[str],
        pass_fds: Sequence[int] = (),
        **_: Any,
    ) -> None:
        """Its standard input is a pipe; Python's own options are left out."""
        what = list(command[command.index("-m") :] if "-m" in command else command[1:])
        reading, writing = os.pipe()
        ours = Path(f"/proc/{os.getpid()}/fd")
        numbers = {0: reading, 1: stdout.fileno()} | {number: number for number in pass_fds}
        self._fork = start(what, env, {there: ours / str(here) for there, here in numbers.items()})
        os.close(reading)
        self.stdin, self.pid = os.fdopen(writing, "w"), self._fork.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if not self._fork.runs():
            self.returncode = self._fork.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        try:
            self.returncode = self._fork.wait(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired("a fork", timeout or 0) from None
        return self.returncode

    def kill(self) -> None:
        self._fork.kill()


@cache
def _parent(multiprocessing: str, kind: str) -> "subprocess.Popen[str]":
    """The process that forks, one for each way of running engines; vLLM reads that variable at its
    import, others when an engine starts."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing,
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )


def _fork(request: dict[str, Any]) -> int:
    """The child's process id; 0 in the child, which has become what was asked for."""
    opened = {
        int(number): os.open(path, _READ if number == "0" else _WRITE)
        for number, path in request["files"].items()
    }
    if pid := os.fork():
        for descriptor in opened.values():
            os.close(descriptor)
        return pid
    os.setsid()
    quick_spawn.place(opened)
    if 2 not in opened:
        os.dup2(1, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    quick_spawn.heed_environment()
    return 0


def _import_vllm() -> None:
    from contextlib import suppress
    from importlib import import_module

    if sys.argv[1] == INTERPRETER:
        from v2_interpreter import use_interpreter

        use_interpreter()
    import vllm.v1.worker.cpu_worker
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1":
        import vllm.entrypoints.cli.serve
        import vllm.entrypoints.openai.api_server  # noqa: F401
    for name in _IMPORTED_BY_ENGINES:
        with suppress(ModuleNotFoundError):  # of another version of vLLM
            import_module(name)
    configure_logging_if_needed(LoggingConfig())
    _replace_kernels()


def _replace_kernels() -> None:
    """What a CPU has in place of Triton's kernels, once for all engines: vLLM looks through every
    module for them when an engine starts."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides()
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)


def _without_huge_pages() -> None:
    """For this process and its children. A drafter moves its process's memory into huge pages, and
    in a fork that copies all of the parent's, for more than a second; what it gains is speed."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def _import_libraries() -> None:
    """One that is not installed would be imported by no child either."""
    from importlib import import_module
    from importlib.util import find_spec

    for name in _IMPORTED_BY_VLLM:
        if find_spec(name.partition(".")[0]):
            import_module(name)
    _parse_beforehand()
    known = {"vllm", "vllm_dflash"} & {name.partition(".")[0] for name in sys.modules}
    if known:
        raise RuntimeError(f"{', '.join(known)} came with a library: leave that one out")


def _parse_beforehand() -> None:
    """Children that parse a text of this package's, or one of the installed vLLM's that this
    package names, are handed its tree: ``vllm-dflash status`` spends a third of its time on those.
    An edited file is another text, and is parsed by who asks."""
    import ast
    import re
    from importlib.util import find_spec

    ours, vllm = Path(__file__).parents[2], find_spec("vllm")
    files = [file for name in ("vllm_dflash", "patches") for file in ours.glob(f"{name}/**/*.py")]
    texts = [file.read_text() for file in files]
    if vllm is not None and vllm.origin is not None:
        named = {name for text in texts for name in re.findall(r"\bvllm(?:\.\w+)+", text)}
        places = [Path(vllm.origin).parents[1].joinpath(*name.split(".")) for name in named]
        either = [f for p in places for f in (p.with_suffix(".py"), p / "__init__.py")]
        texts += [file.read_text() for file in either if file.is_file()]
    parse, trees = ast.parse, {text: ast.parse(text) for text in texts}

    def parse_once(source: Any, *how: Any, **named: Any) -> Any:
        known = None if how or named or not isinstance(source, str) else trees.get(source)
        return parse(source, *how, **named) if known is None else known

    ast.parse = parse_once


def main() -> None:
    import gc

    import setproctitle

    setproctitle.getproctitle()  # finds the place only while the environment is where it began
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what the imports say
    _without_huge_pages()
    gc.disable()
    if sys.argv[1] == LIBRARIES:
        _import_libraries()
    else:
        _import_vllm()
    gc.collect()
    gc.freeze()
    # vLLM does it as an engine ends, and then collects what all of its imports made.
    gc.unfreeze = lambda: None
    gc.enable()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "ended" in request:
            _, status = os.waitpid(request["ended"], 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
        elif pid := _fork(request):
            print(pid, file=answers, flush=True)
        else:
            quick_spawn.run(request["argv"], [n for n in map(int, request["files"]) if n > 2])
            return
    os._exit(0)


if __name__ == "__main__":
    import quick_spawn

    main()
