"""Where profiles of steps are kept: a file for each pair of models, device and version, in vLLM's
cache folder. A second start reads what the first has measured, and an engine's scheduler what its
worker has, in whichever process each runs. Pure.

    pytest tests/unit/test_cost_profile.py
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_dflash import __version__
from vllm_dflash.cost_profile import Profile
from vllm_dflash.files import RunError, write_record
from vllm_dflash.log import logger
from vllm_dflash.records import AtLeast, RecordError, read

_FOLDER = "dflash_profiles"
_NUMBER = AtLeast(float, 0)
_SHAPE = {
    "key": str,
    "profile": {
        **{name: [_NUMBER] for name in ("rows", "target", "draft")},
        **dict.fromkeys(("read", "attend", "draft_attend"), _NUMBER),
        "is_steady": bool,
    },
}
THREADS = "_VLLM_DFLASH_THREADS"
"""How an engine's first process says what threads it was given. vLLM gives its worker on a CPU
another OMP_NUM_THREADS and ties it to cores, and the profile that the worker measures has to be
found by the scheduler, in a process that has neither."""
_kept: dict[str, Profile] = {}
"""Of this process, for where no file can be written."""


def leave_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has the processes that this one starts describe the processor as this one does."""
    environment.setdefault(THREADS, _threads(environment))


def _threads(environment: Mapping[str, str]) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} {environment.get('OMP_NUM_THREADS', '')}"


def key_of(vllm_config: Any, vllm_version: str, device: str) -> str:
    """What a profile holds for, of an engine's ``VllmConfig``; the same in all its processes."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    draft, cache, parallel = (
        speculative.draft_model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    return json.dumps(
        {
            "target": _model(model),
            "drafter": _model(draft),
            "k": speculative.num_speculative_tokens,
            "kv_cache": [str(cache.cache_dtype), cache.block_size],
            "limits": [
                model.max_model_len,
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.scheduler_config.max_num_batched_tokens,
            ],
            "tensor_parallel": parallel.tensor_parallel_size,
            "eager": bool(model.enforce_eager),
            "runner": "v2" if vllm_config.use_v2_model_runner else "v1",
            "device": device,
            "versions": [vllm_version, __version__],
        },
        sort_keys=True,
    )


def _model(config: Any) -> list[Any]:
    """A model's name, of a folder its whole path, and the numbers of its config, which are its
    sizes: a folder may hold another model than it did."""
    name = str(config.model)
    sizes = {
        field: value
        for field, value in vars(config.hf_text_config).items()
        if isinstance(value, int) and not field.startswith("_")
    }
    return [
        os.path.realpath(name) if os.path.isdir(name) else name,
        *map(str, (config.revision, config.dtype, config.quantization)),
        sizes,
    ]


def this_cpu(environment: Mapping[str, str] = os.environ) -> str:
    """The processor's name, its cores and those that an engine was given; the same in all of its
    processes, from ``leave_threads`` on."""
    name = platform.processor() or platform.machine()
    try:
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                name = row.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    bound = environment.get("VLLM_CPU_OMP_THREADS_BIND", "")
    threads = environment.get(THREADS) or _threads(environment)
    return " ".join([name, str(os.cpu_count()), bound, threads])


def keep(folder: Path, key: str, profile: Profile) -> None:
    """Keeps a profile in vLLM's cache ``folder``; where that cannot be written, for this process
    alone."""
    _kept[key] = profile
    try:
        write_record(_path(folder, key), {"key": key, "profile": asdict(profile)})
    except RunError:
        logger.warning(
            "the cost profile cannot be kept in %s, so it is measured at each start, and a"
            " scheduler in a process of its own goes by a guess: have VLLM_CACHE_ROOT name a folder"
            " that can be written",
            _path(folder, key).parent,
        )


def find(folder: Path, key: str) -> Profile | None:
    """The profile that was kept; None where there is none. A file that is damaged, or another's, is
    none."""
    if key in _kept:
        return _kept[key]
    path = _path(folder, key)
    try:
        found = read(path, _SHAPE)
    except RecordError as error:
        logger.info("%s: it is measured anew", error)
        return None
    if found is None or found["key"] != key:
        return None
    fields = found["profile"]
    rows, target, draft = (tuple(fields[name]) for name in ("rows", "target", "draft"))
    is_sound = (
        len(rows) == len(target) == len(draft) > 1
        and list(rows) == sorted(set(rows))
        # More rows cost no less, as in ``cost_profile.fit``.
        and all(min(side) > 0 and list(side) == sorted(side) for side in (target, draft))
        and min(rows[0], fields["read"], fields["attend"], fields["draft_attend"]) >= 0
    )
    if not is_sound:
        logger.info("%s is no profile: it is measured anew", path)
        return None
    _kept[key] = Profile(
        rows,
        target,
        draft,
        *(fields[name] for name in ("read", "attend", "draft_attend", "is_steady")),
    )
    return _kept[key]


def _path(folder: Path, key: str) -> Path:
    return folder / _FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
