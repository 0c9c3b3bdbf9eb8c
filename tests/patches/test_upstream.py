"""The patches against the installed vLLM, and the gate in front of them.

Each case that changes vLLM runs in a process of its own, as vLLM's processes do.
"""

import importlib
import os
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest
from vllm_dflash.patches import ALL

from engine.other_vllm import completed
from pairs import make_random_drafter, make_random_target
from releases import OLDEST, TOO_NEW
from vllm_dflash.patching import PatchSet
from vllm_dflash.supported import SUPPORTED_VLLM, installed_vllm

ROOT = Path(__file__).resolve().parents[2]
OURS = (
    "VLLM_DFLASH",
    "_VLLM_DFLASH_PROBLEM",
    "_VLLM_DFLASH_LEFT_OUT",
    "VLLM_DFLASH_CPU_FIXES",
    "VLLM_PLUGINS",
)
STATES = """
import sys
from vllm_dflash.plugin import patch_set
def states(): return {row.target.partition(":")[2]: row.state for row in patch_set().report()}
def model(): return (lambda m: m.module_name + ":" + m.class_name)(ModelRegistry.models["DFlashDraftModel"])
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
"""


PLAIN_GOES_ON = """
from vllm.engine.arg_utils import EngineArgs
plain = dict(model={target!r}, skip_tokenizer_init=True, max_model_len=256)
EngineArgs(**plain).create_engine_config()
print("PLAIN SERVING IS CONFIGURED", flush=True)
drafter = dict(method="dflash", model={drafter!r}, num_speculative_tokens=7)
try:
    EngineArgs(**plain, speculative_config=drafter).create_engine_config()
except ValueError as error:
    print("REFUSED", error, flush=True)
"""


def run_and_serve_plain(code: str, folder: Path) -> str:
    """Runs the code, then configures a target without a drafter, which must go on, and with one,
    which must be refused: all it says."""
    target = make_random_target(folder / "target")
    drafter = make_random_drafter(folder / "dflash")
    done = run(code + PLAIN_GOES_ON.format(target=str(target), drafter=str(drafter)))
    assert "PLAIN SERVING IS CONFIGURED" in done.stdout
    assert "REFUSED" in done.stdout
    return done.stdout + done.stderr


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process whose environment has none of our or vLLM's plug-in variables
    but these."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(STATES + code)
        done = completed([str(script)], inherited | environment, timeout_s=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target)
def test_the_patch_fits_the_installed_vllm(patch):
    assert PatchSet([patch]).check(installed_vllm()) == []
    assert patch.why
    assert patch.until


def test_every_patch_file_is_in_the_list_and_in_the_table():
    files = {path.stem for path in (ROOT / "patches").glob("*.py")} - {
        "__init__",
        "guard",
        "place",
        "on_import",
        "scheduler",
    }
    modules = {stem: importlib.import_module(f"vllm_dflash.patches.{stem}") for stem in files}
    records = {
        stem: getattr(module, "PATCHES", None) or (module.PATCH,)
        for stem, module in modules.items()
    }
    assert {record for known in records.values() for record in known} == set(ALL)
    table = (ROOT / "patches" / "README.md").read_text()
    for stem, known in records.items():
        assert f"`{stem}.py`" in table
        assert all(f"`{record.target}`" in table for record in known)


def test_the_supported_range_is_the_one_that_the_wheel_and_the_documents_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"vllm{SUPPORTED_VLLM}" in project["optional-dependencies"]["cuda"]
    oldest, too_new = (int(end.partition(".")[2]) for end in (OLDEST, TOO_NEW))
    assert too_new - oldest == 2, "two minor versions at once, never three"
    for document in ("CHANGELOG.md", "README.md", "docs/versions.md"):
        text = (ROOT / document).read_text()
        assert all(f"0.{minor}" in text for minor in range(oldest, too_new))


def test_the_entry_point_registers_without_importing_a_runner_then_patches_and_reverts():
    run("""
load_general_plugins()
assert not [m for m in sys.modules if m.startswith(("vllm.v1.worker", "vllm_dflash.drafting", "vllm_dflash.models"))], sys.modules
import torch; assert not torch.cuda.is_initialized()
assert model() == "vllm_dflash.models.drafter:DrafterForCausalLM", model()
from vllm_dflash.patches import ALL
# What vLLM has imported by now.
at_once = {"vllm.config.speculative", "vllm.config.vllm", "vllm.platforms.interface"}
pending = {
    patch.qualname for patch in ALL
    if patch.scope == "instance" or (patch.scope == "class" and patch.module not in at_once)
}
assert len(pending) > 10
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
assert set(states().values()) - {"not needed"} == {"off"}, states()
""")


def test_every_record_is_applied_and_taken_back():
    """Classes by the objects that stand in their places, single objects by stand-ins of vLLM's own
    classes."""
    run("""
import functools, importlib
from types import SimpleNamespace
import numpy, torch
from vllm_dflash.patches import ALL, cpu_target, request_drafts, scheduler_steps, v1_cost_profile, v1_draft_metadata, v1_steps_without_drafts, v1_verifier
from vllm_dflash.supported import installed_vllm

def in_place(record):
    value = importlib.import_module(record.module)
    for part in record.qualname.split("."):
        value = vars(value)[part]
    return value

classes = [record for record in ALL if record.scope == "class"]
before = {record: in_place(record) for record in classes}
patches = patch_set()
patches.apply(installed_vllm())
applied = [row.target for row in patches.report() if row.scope == "class" and row.state == "applied"]
unneeded = [row.target for row in patches.report() if row.state == "not needed"]
assert sorted(applied + unneeded) == sorted(record.target for record in classes), patches.report()
for record in classes:
    assert (in_place(record) is before[record]) == (record.target in unneeded), record.target

from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
import vllm_dflash.cpu.target_layers as cpu_layers
cpu_layers.EagerTarget = lambda model: lambda *args: "fast"
runner, scheduler, *models = (cls.__new__(cls) for cls in (CPUModelRunner, Scheduler, Qwen3Model, LlamaModel))
for model in models:
    torch.nn.Module.__init__(model)
runner.sampler, runner.speculative_config, runner.device = Sampler(), None, torch.device("cpu")
runner.rejection_sampler = sampler = RejectionSampler(runner.sampler)
runner.input_ids = SimpleNamespace(np=numpy.zeros(8, dtype=numpy.int32))
def around(original, *others):
    return functools.wraps(original)(lambda *args: "around")
steps = SimpleNamespace(around_schedule=around, around_update=around, around_shutdown=around)
jobs = [
    (runner, [v1_verifier.PATCH], (runner,)), (runner, [v1_draft_metadata.PATCH], (runner, 4)),
    (runner, [v1_steps_without_drafts.PATCH], (SimpleNamespace(unless_off=around),)),
    (runner, [v1_cost_profile.PATCH], (lambda: None,)),
    *((model, [record], (model,)) for model, record in zip(models, cpu_target.PATCHES, strict=True)),
    (scheduler, scheduler_steps.PATCHES, (steps,)),
    (scheduler, request_drafts.PATCHES, (SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1)), None)),
]
attached = [record for _, records, _ in jobs for record in records]
assert {record for record in ALL if record.scope == "instance"} == set(attached)
own = {record: getattr(owner, record.name) for owner, records, _ in reversed(jobs) for record in records}
for owner, records, context in jobs:
    assert patches.attach(owner, records, *context)
for owner, records, _ in jobs:
    assert all(getattr(owner, record.name) != own[record] for record in records)
assert all(model.forward() == "fast" for model in models)
assert {row.state for row in patches.report() if row.scope == "instance"} == {"applied"}

assert patches.revert() == []
for record in classes:
    assert in_place(record) is before[record], record.target
for owner, records, _ in jobs:
    for record in records:
        assert getattr(owner, record.name) == own[record], record.target
        assert record.name not in vars(owner) or record.name == "rejection_sampler", record.target
assert runner.rejection_sampler is sampler
assert set(states().values()) == {"off"} | ({"not needed"} if unneeded else set()), states()
""")


def test_a_scheduler_is_watched_once_by_all_who_ask():
    """Also again after the records were taken back; where another plug-in has replaced the method,
    nobody watches it."""
    run("""
from types import SimpleNamespace
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_dflash.patches.place import kept_with
from vllm_dflash.patches.scheduler_steps import watch
from vllm_dflash.supported import installed_vllm
patch_set().apply(installed_vllm())
Scheduler.update_from_output = lambda self, scheduled, ran: {}
Scheduler.update_from_output.__module__ = Scheduler.__module__
seen, closed = [], []
def observer(name): return SimpleNamespace(what=name, observe=lambda step: seen.append(name), close=lambda: closed.append(name))
def update(scheduler):
    scheduler.update_from_output(SimpleNamespace(
        num_scheduled_tokens={}, scheduled_spec_decode_tokens={}, num_invalid_spec_tokens=None, num_spec_tokens_to_schedule=7,
        scheduled_new_reqs=[], scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
    ), SimpleNamespace(sampled_token_ids=[], req_id_to_index={}))
scheduler, other = Scheduler.__new__(Scheduler), Scheduler.__new__(Scheduler)
scheduler.requests, scheduler.running, scheduler.waiting = {}, [], []
assert watch(scheduler, observer("controller"))
inner = scheduler.update_from_output
assert watch(scheduler, observer("metrics")) and scheduler.update_from_output is inner
update(scheduler)
assert seen == ["controller", "metrics"] and len(kept_with(scheduler)) == 3
assert patch_set().revert() == []
update(scheduler)
assert len(seen) == 2
assert watch(scheduler, observer("again"))
update(scheduler)
assert seen[2:] == ["again"], seen

def foreign(scheduled, ran): pass
foreign.__module__ = "other_plugin"
other.update_from_output = foreign
assert not watch(other, observer("nobody"))
assert other.update_from_output is foreign and "schedule" not in vars(other)
""")


def test_another_plug_ins_replacement_is_named_and_plain_serving_goes_on(tmp_path):
    """One that is there before ours, one that comes with a module's late import, and one in an
    object."""
    for when in ("before", "late"):
        output = run_and_serve_plain(
            f"""
import vllm.config.speculative as speculative
class Other:
    def fits(self, cad): return True
def replace(): importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner._input_fits_in_drafter = Other.fits
import importlib, os
if {when!r} == "before":
    replace()
    load_general_plugins()
else:
    load_general_plugins()
    # Its own hook runs before ours.
    import vllm_dflash.patching as patching
    after = patch_set()._after_import
    def both(module):
        if module == "vllm.v1.worker.gpu_model_runner": sys.modules[module].GPUModelRunner._input_fits_in_drafter = Other.fits
        after(module)
    patch_set()._hook._then = both
    import vllm.v1.worker.gpu_model_runner
import vllm.v1.worker.gpu_model_runner
assert vllm.v1.worker.gpu_model_runner.GPUModelRunner._input_fits_in_drafter is Other.fits
assert set(states().values()) <= {{"off", "not needed", "left out"}}, states()
assert model() == "vllm_dflash.models.unsupported:UnsupportedVLLM", model()
""",
            tmp_path / when,
        )
        assert "__main__:Other.fits: another plug-in replaced it" in output


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

os.environ["VLLM_PLUGINS"], os.environ["VLLM_DFLASH_CPU_FIXES"] = "another,dflash", "0"
vllm.plugins.plugins_loaded = False
load_general_plugins()
assert "off" not in states().values(), states()
fixes = ["apply_sampling_constraints", "expand_batch_to_tokens"]
assert sorted(name for name, state in states().items() if state == "switched off") == fixes, states()
""")


def test_an_unsupported_vllm_is_left_alone_with_one_warning_and_only_our_method_is_refused(
    tmp_path,
):
    """Two kinds of unsupported: a version out of range, and a supported one whose source is not
    what we know.

    vLLM inspects a lazily registered class in a child process and passes on what the child wrote.
    """
    too_new = f"{TOO_NEW}.1"
    output = run_and_serve_plain(
        f"too_new, fits = {too_new!r}, {installed_vllm()!r}"
        + """
import os
import vllm_dflash.plugin, vllm_dflash.upstream
from vllm.engine.arg_utils import EngineArgs
fingerprint = vllm_dflash.upstream.Definition.fingerprint
vllm_dflash.plugin.patch_set().cache = None  # the source is another for this process alone
for version, prints in ((too_new, fingerprint), (fits, property(lambda self: "f" * 16))):
    vllm_dflash.plugin.installed_vllm = lambda version=version: version
    vllm_dflash.upstream.Definition.fingerprint = prints
    vllm_dflash.plugin.register()
    vllm_dflash.plugin.register()
    assert not {"applied", "pending"} & set(states().values()), states()
    assert model() == "vllm_dflash.models.unsupported:UnsupportedVLLM", model()
    del os.environ["_VLLM_DFLASH_PROBLEM"]

os.environ["_VLLM_DFLASH_PROBLEM"] = "1"
""",
        tmp_path,
    )
    assert output.count(f"supports vLLM {SUPPORTED_VLLM}, and found {too_new}") == 1
    assert output.count("cannot patch vLLM") == 1
    assert "vllm.v1.spec_decode.dflash:DFlashProposer, whose source has changed" in output
    assert re.search(
        rf"RuntimeError: vllm-dflash supports vLLM {SUPPORTED_VLLM}, and found"
        rf" {installed_vllm().partition('+')[0]}.*VLLM_DFLASH=0",
        output,
    )


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
        if not module.name.startswith("vllm_dflash.cpu."):
            importlib.import_module(module.name)
assert not [name for name in sys.modules if name.startswith("vllm_dflash.cpu.")]
""")


def test_a_type_of_speculators_that_vllm_reads_stays_vllms():
    """It may be served by a method of vLLM's own; and the kinds say which these are."""
    run("""
from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES as types
own = dict(types)
load_general_plugins()
from vllm_dflash import kinds
assert {name: types[name] for name in own} == own
assert {name for name, kind in kinds.every().items() if kind.is_known_to_vllm} <= set(own)
assert set(kinds.names()) <= set(types)
""")
