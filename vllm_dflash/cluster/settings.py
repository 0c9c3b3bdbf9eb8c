"""A target, a drafter and a device become the arguments of vLLM's engine, and what Ray must reserve
for it. The only home of both.

Pure: neither Ray nor vLLM is imported.

    pytest tests/unit/test_cluster_settings.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.files import RunError
from vllm_dflash.formats import METHOD
from vllm_dflash.records import object_of
from vllm_dflash.regular import expanded, is_folder

DEVICES = ("cuda", "cpu")
_CPU_CACHE_BYTES = 1 << 30
"""vLLM's own default on a CPU is a share of the machine's memory, of which other replicas need
theirs."""


class ClusterError(RunError):
    """What was asked for cannot run on this cluster; the message says why and what to do."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine, of which a cluster runs one a replica."""

    target: str
    """A folder that all nodes have under the same path, or a hub id."""
    draft: str | None = None
    """The same; None decodes plainly."""
    device: str = "cuda"
    """One of ``DEVICES``."""
    num_speculative_tokens: int | None = None
    """Drafted tokens a step that are verified; None: the drafter's whole block."""
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine; they win."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ClusterError(f"device is {self.device!r}: one of {', '.join(DEVICES)}")
        if self.tensor_parallel_size < 1:
            raise ClusterError(
                f"tensor_parallel_size is {self.tensor_parallel_size}: give 1 or more"
            )
        if self.draft is None and self.num_speculative_tokens is not None:
            raise ClusterError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, but there is no drafter:"
                " give draft, or leave it out"
            )
        for name in ("target", "draft"):
            path = getattr(self, name)
            if (
                path is not None
                and not _is_folder(path)
                and path.startswith(("/", "./", "../", "~"))
            ):
                raise ClusterError(
                    f"{name} is {path}, where there is no folder: give the checkpoint's folder or"
                    " its hub id"
                )

    @property
    def local_paths(self) -> dict[str, str]:
        """The folders among target and drafter, absolute, by name: every node has to have them."""
        given = {"target": self.target, "draft": self.draft}
        return {
            name: _absolute(path)
            for name, path in given.items()
            if path is not None and _is_folder(path)
        }

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What Ray reserves for one engine, a bundle a rank: the engine's own process sits in the
        first."""
        if self.device == "cpu":
            return [{"CPU": 1.0}] * self.tensor_parallel_size
        return [{"GPU": 1.0, "CPU": 1.0}] + [{"GPU": 1.0}] * (self.tensor_parallel_size - 1)


def parse_engine_args(text: str) -> dict[str, Any]:
    """The JSON object of a flag ``--engine-args``.

    Raises:
        ClusterError: it is none.
    """
    try:
        return object_of(text)
    except ValueError:
        raise ClusterError(
            f"--engine-args is {text!r}: give a JSON object of arguments of vLLM's engine"
        ) from None


def engine_args(settings: EngineSettings) -> dict[str, Any]:
    """The arguments of vLLM's ``EngineArgs``; with a drafter, finished requests carry what was
    accepted of theirs."""
    args: dict[str, Any] = {
        "model": _absolute(settings.target),
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel_size,
    }
    if settings.max_model_len is not None:
        args["max_model_len"] = settings.max_model_len
    if settings.draft is not None:
        speculative: dict[str, Any] = {"method": METHOD, "model": _absolute(settings.draft)}
        if settings.num_speculative_tokens is not None:
            speculative["num_speculative_tokens"] = settings.num_speculative_tokens
        args |= {"speculative_config": speculative, "per_request_spec_decode_metrics": "summary"}
    if settings.tensor_parallel_size > 1:
        # Ray places the ranks, on several nodes where need be; on a CPU vLLM knows processes of one
        # machine alone.
        args["distributed_executor_backend"] = "ray" if settings.device == "cuda" else "mp"
    if settings.device == "cpu":
        args |= {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True}
    return args | dict(settings.engine_args)


def environment(settings: EngineSettings) -> dict[str, str]:
    """Variables for every process of an engine; the user's own win."""
    # Engines that bind their threads all take the same cores; Ray gives each a share.
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if settings.device == "cpu" else {}


def _is_folder(path: str) -> bool:
    try:
        return is_folder(path)
    except DrafterConfigError as error:
        raise ClusterError(str(error)) from None


def _absolute(path: str) -> str:
    """A folder's path as it is on every node; a hub id as it is."""
    return str(expanded(path).resolve()) if _is_folder(path) else path


def uses_ray(settings: EngineSettings) -> bool:
    """Whether vLLM places the engine's ranks through Ray."""
    return engine_args(settings).get("distributed_executor_backend") == "ray"
