"""vLLM warns of unknown environment variables, and not of ours."""

import re
from pathlib import Path

import pytest
from vllm_dflash.patches import environment

from engine.other_vllm import completed

ROOT = Path(__file__).resolve().parents[2]
CONFIGURED = """
import os, sys
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
args = dict(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=256)
before = list(envs.environment_variables)
EngineArgs(**args, fail_on_environ_validation=True).create_engine_config()
os.environ["VLLM_DFLASH_RECORDS"] = ""
EngineArgs(**args).create_engine_config()
assert list(envs.environment_variables) == before
"""


@pytest.mark.vllm
def test_ours_are_known_and_a_misspelt_one_is_not(tmp_path: Path, random_target: Path) -> None:
    """Under the strict setting each of them once ended the start, with no way out but to do
    without."""
    script = tmp_path / "script.py"
    script.write_text(CONFIGURED)
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)} | dict.fromkeys(
        environment.NAMES, ""
    )
    done = completed([str(script), str(random_target)], environ, timeout_s=180)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert re.findall("environment variable detected: (.*)", said) == ["VLLM_DFLASH_RECORDS"]


def test_every_variable_that_the_code_names_is_listed() -> None:
    """What one of our processes leaves for those that it starts is not vLLM's to look at, so it
    does not begin as vLLM's own do."""
    named = {
        name
        for folder in ("vllm_dflash", "patches")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"(?<!_)\bVLLM_DFLASH(?:_[A-Z]+)*\b", path.read_text())
    }
    assert named == set(environment.NAMES)
