"""The patches against the installed vLLM, and the gate in front of them.

Each case that changes vLLM runs in a process of its own, as vLLM's processes do.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from vllm_dflash.patches import ALL

from pairs import make_random_drafter, make_random_target
from vllm_dflash.patching import PatchSet
from vllm_dflash.supported import SUPPORTED_VLLM, installed_vllm

ROOT = Path(__file__).resolve().parents[2]
STATES = """
import sys
from vllm_dflash.plugin import patch_set
def states(): return {row.target.partition(":")[2]: row.state for row in patch_set().report()}
def model(): return (lambda m: m.module_name + ":" + m.class_name)(ModelRegistry.models["DFlashDraftModel"])
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process whose environment has none of our or vLLM's plug-in variables but these."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("VLLM_DFLASH", "VLLM_DFLASH_WARNED", "VLLM_PLUGINS")}
    command = [sys.executable, "-c", STATES + code]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target)
def test_the_patch_fits_the_installed_vllm(patch):
    assert PatchSet([patch]).check(installed_vllm()) == []
    assert patch.versions == SUPPORTED_VLLM
    assert patch.why
    assert patch.until


def test_every_patch_file_is_in_the_list_and_in_the_table():
    files = {path.stem for path in (ROOT / "patches").glob("*.py")} - {"__init__"}
    assert {patch.replace.__module__.rpartition(".")[2] for patch in ALL} == files
    table = (ROOT / "patches" / "README.md").read_text()
    for patch in ALL:
        assert f"`{patch.target}`" in table


def test_the_supported_range_is_the_one_that_the_wheel_and_the_documents_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "vllm==0.32.*" in project["optional-dependencies"]["cuda"]
    assert SUPPORTED_VLLM == ">=0.32,<0.33"
    assert "0.32" in (ROOT / "CHANGELOG.md").read_text()


def test_the_entry_point_registers_without_importing_a_runner_then_patches_and_reverts():
    run("""
load_general_plugins()
assert not [m for m in sys.modules if m.startswith(("vllm.v1.worker", "vllm_dflash.drafting", "vllm_dflash.models"))], sys.modules
import torch; assert not torch.cuda.is_initialized()
assert model() == "vllm_dflash.models.drafter:DrafterForCausalLM", model()
pending = {
    "DFlashProposer", "GPUModelRunner._input_fits_in_drafter", "GPUModelRunner.sample_tokens", "apply_sampling_constraints",
    "expand_batch_to_tokens", "init_speculator", "Scheduler.__init__", "Scheduler._handle_stopped_request",
    "InputProcessor._validate_params", "attach_router",
}
assert {name for name, state in states().items() if state == "pending"} == pending, states()

from vllm_dflash.plugin import register
register()
import vllm.v1.worker.gpu_model_runner as runner
from vllm.v1.spec_decode.dflash import DFlashProposer as native
assert runner.DFlashProposer is not native and issubclass(runner.DFlashProposer, native)
assert states()["GPUModelRunner._input_fits_in_drafter"] == "applied", states()
register()
assert patch_set().revert() == []
assert runner.DFlashProposer is native
assert set(states().values()) == {"off"}, states()
""")


def test_switched_off_nothing_of_vllm_is_changed():
    """One process for all the switches: importing vLLM is what takes the time."""
    run("""
import os
import vllm.plugins
for variable, value in [("VLLM_DFLASH", "0"), ("VLLM_DFLASH", "off"), ("VLLM_PLUGINS", ""), ("VLLM_PLUGINS", "another")]:
    os.environ[variable] = value
    vllm.plugins.plugins_loaded = False
    load_general_plugins()
    assert set(states().values()) == {"off"}, (variable, value, states())
    assert model() == "vllm.model_executor.models.qwen3_dflash:DFlashQwen3ForCausalLM", model()
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("vllm_dflash")]
    del os.environ[variable]

os.environ["VLLM_PLUGINS"] = "another,dflash"
vllm.plugins.plugins_loaded = False
load_general_plugins()
assert "off" not in states().values(), states()
""")


def test_an_unsupported_vllm_is_left_alone_with_one_warning_and_only_our_method_is_refused(tmp_path):
    """Two kinds of unsupported: a version out of range, and a supported one whose source is not what we know.

    vLLM inspects a lazily registered class in a child process and passes on what the child wrote.
    """
    make_random_target(tmp_path / "target")
    make_random_drafter(tmp_path / "dflash")
    done = run(f"""
import os
import vllm_dflash.plugin, vllm_dflash.upstream
from vllm.engine.arg_utils import EngineArgs
fingerprint = vllm_dflash.upstream.Definition.fingerprint
for version, prints in (("0.33.1", fingerprint), ("0.32.0+cpu", property(lambda self: "f" * 16))):
    vllm_dflash.plugin.installed_vllm = lambda version=version: version
    vllm_dflash.upstream.Definition.fingerprint = prints
    vllm_dflash.plugin.register()
    vllm_dflash.plugin.register()
    assert set(states().values()) == {{"off"}}, states()
    assert model() == "vllm_dflash.models.unsupported:UnsupportedVLLM", model()
    del os.environ["VLLM_DFLASH_WARNED"]

os.environ["VLLM_DFLASH_WARNED"] = "1"
plain = dict(model={str(tmp_path / "target")!r}, skip_tokenizer_init=True, max_model_len=256)
EngineArgs(**plain).create_engine_config()
print("PLAIN SERVING IS CONFIGURED", flush=True)
drafter = dict(method="dflash", model={str(tmp_path / "dflash")!r}, num_speculative_tokens=7)
try:
    EngineArgs(**plain, speculative_config=drafter).create_engine_config()
except ValueError as error:
    print("REFUSED", error, flush=True)
""")
    output = done.stdout + done.stderr
    assert output.count("supports vLLM >=0.32,<0.33, and found 0.33.1") == 1
    assert output.count("cannot patch vLLM") == 1
    assert "vllm.v1.spec_decode.dflash:DFlashProposer, whose source has changed" in output
    assert "PLAIN SERVING IS CONFIGURED" in done.stdout
    assert "REFUSED" in done.stdout
    assert re.search(r"RuntimeError: vllm-dflash supports vLLM >=0\.32,<0\.33, and found 0\.32.*VLLM_DFLASH=0", output)


def test_what_other_devices_import_looks_up_no_kernel_that_only_a_cpu_has():
    run("""
import importlib, pkgutil, torch, vllm._custom_ops
import vllm_dflash.drafting, vllm_dflash.models
built = torch.ops._C
class OtherBuild:
    def __getattr__(self, name):
        if name.startswith(("cpu_", "onednn_", "greedy_argmax")):
            raise AttributeError(name)
        return getattr(built, name)
torch.ops._C = OtherBuild()
for package in (vllm_dflash.drafting, vllm_dflash.models):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not module.name.startswith("vllm_dflash.models.eager_"):
            importlib.import_module(module.name)
assert not [name for name in sys.modules if name.startswith("vllm_dflash.models.eager_")]
""")
