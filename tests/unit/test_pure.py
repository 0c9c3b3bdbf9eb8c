"""What needs neither vLLM nor torch does without them: the lists below are all that may.

Whatever is not listed is pure. A new module that imports one of the two belongs here, or better
gets it from its caller.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_dflash"
NEEDS_VLLM = {
    "adaptive.scheduler",
    "cluster.replica",
    "cpu.backend",
    "cpu.dispatch",
    "cpu.draft_layers",
    "cpu.draft_metadata",
    "cpu.layers",
    "cpu.rows",
    "cpu.sampler_choice",
    "cpu.target_layers",
    "cpu.verification",
    "drafting.backend",
    "drafting.context_store",
    "drafting.measure",
    "drafting.measure_v2",
    "engine_profiles",
    "drafting.metadata",
    "drafting.v1",
    "drafting.v2",
    "drafting.varlen",
    "drafting.watch",
    "models.context",
    "models.convolution",
    "models.drafter",
    "models.kernels",
    "models.layers",
    "models.loading",
    "models.norm",
    "models.own",
    "training.hidden_states",
}
"""Cannot be imported without vLLM."""
ASKS_VLLM = {
    "checks",
    "cluster.completer",
    "cluster.connection",
    "cluster.rows",
    "cluster.serve",
    "engines.child",
    "evaluation.engine_child",
    "evaluation.rejection",
    "kinds.dflash.context",
    "models.fused",
    "models.parameters",
    "patches.environment",
    "patches.request_params",
    "patches.server_metrics",
    "plugin",
    "swap.worker",
    "tools.engine_run",
    "training.extract_engine",
    "training.generate_engine",
    "weights.quantization",
}
"""Import vLLM when they are called: inside of functions."""
NEEDS_TORCH = {
    "cpu.sampling",
    "drafting.coverage",
    "drafting.layout",
    "drafting.pending",
    "follow.measure",
    "heads.argmax",
    "heads.candidates.modules",
    "heads.correction.modules",
    "heads.lattice.network",
    "heads.lattice.modules",
    "heads.markov.modules",
    "heads.reference",
    "heads.walk",
    "kinds.dflare.context",
    "kinds.dflash.context",
    "kinds.dfly.context",
    "models.fused",
    "models.parameters",
    "models.swapping",
    "reference.checkpoint",
    "reference.convolution",
    "reference.decoding",
    "reference.drafter",
    "reference.loss",
    "reference.masks",
    "reference.rotary",
    "tools.break_even",
    "tools.convert",
    "tools.doctor",
    "tools.engine_run",
    "tools.inspect",
    "tools.pair_checks",
    "tools.pair_runs",
    "tools.rotary_readings",
    "tools.run_checks",
    "training.budget",
    "training.checkpoints",
    "training.draft_vocab",
    "training.drafter",
    "training.export",
    "training.extract_engine",
    "training.features",
    "training.flex",
    "training.loop",
    "training.objective",
    "training.optimizer",
    "training.prove",
    "training.sharding",
    "training.target",
    "training.walk",
    "training.workers",
    "weights",
    "weights.headers",
    "weights.identity",
    "weights.mask_embedding",
    "weights.messages",
    "weights.quantization",
    "weights.reading",
    "weights.values",
}
"""Cannot be imported without torch."""
NEEDS_RAY = {"metrics.on_ray", "swap.on_ray"}
WITHOUT = """
import importlib, sys
absent, modules = (text.split(",") for text in sys.argv[1:])
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"{name} is not here")
sys.meta_path.insert(0, Absent())
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError:
        print(module)
"""


def files() -> dict[str, Path]:
    """Every module of the package, by its name without the package's own."""
    folders = {"": ROOT / PACKAGE, "patches.": ROOT / "patches"}
    found = {}
    for prefix, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[f"{prefix}{'.'.join(parts)}".removesuffix("__init__").rstrip(".")] = path
    return {name: path for name, path in found.items() if name}


def cannot_do_without(absent: str, names: set[str]) -> set[str]:
    """Which of the modules cannot be imported where the packages ``absent`` are not installed."""
    modules = ",".join(sorted(f"{PACKAGE}.{name}" for name in names))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, absent, modules],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.removeprefix(f"{PACKAGE}.") for line in done.stdout.split()}


@pytest.mark.slow
def test_only_the_listed_modules_need_vllm() -> None:
    assert cannot_do_without("vllm", set(files()) - NEEDS_RAY) == NEEDS_VLLM


@pytest.mark.slow
def test_only_the_listed_modules_need_torch() -> None:
    assert (
        cannot_do_without("vllm,torch,transformers", set(files()) - NEEDS_VLLM - NEEDS_RAY)
        == NEEDS_TORCH
    )


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_only_the_listed_modules_name_vllm() -> None:
    naming = {name for name, path in files().items() if "vllm" in imports(path)}
    assert naming - NEEDS_VLLM == ASKS_VLLM


def test_make_unit_fails_a_test_that_imports_vllm_and_no_later_one(tmp_path: Path) -> None:
    """Once it was found out after the test, and every test after it in that process failed as
    well."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_imports():\n    import vllm\n"
        "def test_goes_on_without():\n    with pytest.raises(AssertionError): import vllm\n"
        "def test_later():\n    import importlib.util; assert importlib.util.find_spec('vllm')\n"
        "@pytest.mark.vllm\ndef test_left_out():\n    import vllm\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        ROOT / "pyproject.toml",
        "-p",
        "unit.conftest",
        "--pure",
        tmp_path,
    ]
    done = subprocess.run(
        command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=120, check=False
    )
    assert "1 failed, 2 passed, 1 deselected, 2 errors" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
    assert "FAILED" in done.stdout
    assert "mark the test `@pytest.mark.vllm`" in done.stdout


@pytest.mark.parametrize("name", sorted(NEEDS_VLLM | ASKS_VLLM | NEEDS_TORCH | NEEDS_RAY))
def test_what_is_listed_exists(name: str) -> None:
    assert name in files()
