"""vLLM warns of unknown environment variables, and not of ours."""

import re
from pathlib import Path

import pytest
from vllm_dflash.patches import environment

from engine.other_vllm import completed

ROOT = Path(__file__).resolve().parents[2]
CONFIGURED = """
import sys
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
before = list(envs.environment_variables)
args = dict(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=256)
EngineArgs(**args, fail_on_environ_validation=sys.argv[2] == "strict").create_engine_config()
assert list(envs.environment_variables) == before
"""


def configured(folder: Path, target: Path, how: str, **environ: str) -> tuple[int, str]:
    """Configures an engine with these variables: the status, and all that was said."""
    script = folder / "script.py"
    script.write_text(CONFIGURED)
    inherited = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = completed([str(script), str(target), how], inherited | environ, timeout_s=180)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.vllm
def test_ours_are_known_and_a_misspelt_one_is_not(tmp_path: Path, random_target: Path) -> None:
    """Under the strict setting each of them once ended the start, with no way out but to do
    without."""
    ours = dict.fromkeys(environment.NAMES, "")
    status, said = configured(tmp_path, random_target, "strict", **ours)
    assert status == 0, said[-2000:]
    assert "Unknown vLLM environment variable" not in said
    status, said = configured(tmp_path, random_target, "", VLLM_DFLASH_RECORDS="", **ours)
    assert status == 0, said[-2000:]
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
