"""What a record of a kind may be, what is left out by name, and that nothing else names a kind.

pytest tests/unit/test_kind_records.py
"""

import ast
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from kinds_of_users import NAMES, on_path, write_package
from pairs import make_random_drafter, random_drafter_config
from vllm_dflash import kinds
from vllm_dflash.checks import check_sampling
from vllm_dflash.cli import main
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.kinds import Setting, kind_of

pytestmark = pytest.mark.usefixtures("kinds_of_users")

ROOT = Path(__file__).parents[2]
OURS = tuple(kinds.names())
METHOD = {
    ("formats/__init__", "METHOD"),
    ("adaptive/settings", "SECTION"),
    ("plugin", "_NAME"),
    ("evaluation/methods", "FIXED"),
    ("evaluation/plan", "_DRAFTER"),
    ("heads/lattice/__init__", "PART"),
    ("formats/angelspec", "MODEL_TYPE"),
}
"""Where a string that is a kind's name is something else: vLLM's method, a section, the plug-in, a
benchmark's method, a folder, what tensors' names begin with, a model_type."""


def test_what_vllm_would_draft_in_its_own_way_is_refused() -> None:
    """vLLM's own ways of sampling know one head; with another only tau would be low."""
    for name in ("dflash", "fromanchor", "dflash2", "dspark", "norepeat"):
        config = random_drafter_config(kind=name)
        for asked, setting in (
            (("probabilistic",), "draft_sample_method"),
            (("greedy", True), "enable_adaptive_verification"),
            (("greedy", False, True), "use_local_argmax_reduction"),
        ):
            with (
                nullcontext()
                if kind_of(config).head.is_argmax
                else pytest.raises(DrafterConfigError, match=f"leave {setting} out")
            ):
                check_sampling(config, *asked)
        check_sampling(config, "greedy")


def test_what_is_no_kind_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another package's mistake does not end plain serving, for which the plug-in is loaded too."""
    broken = {
        "absent": "import no_such_module",
        "plain": "KIND = 1",
        "twice": "from vllm_dflash.kinds.dflash import KIND",
    }
    for name, code in broken.items():
        write_package(tmp_path, name, code)
    with on_path(tmp_path), caplog.at_level("WARNING"):
        assert set(kinds.names()) == {*OURS, *NAMES}
    for name in broken:
        assert f"{name}:KIND is left out" in caplog.text


HEADLESS = """
from dataclasses import replace
from vllm_dflash.kinds import Head
from vllm_dflash.kinds.dflash import KIND as DFLASH

KIND = replace(
    DFLASH, name=NAME, architecture=f"{NAME}Model", is_known_to_vllm=False, head=Head(modules=WHERE)
)
"""


def test_a_record_whose_parts_do_not_exist_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head without `Served` was sound to inspect, and ended vLLM's start in an AttributeError.

    A part may be bound in any way that Python knows.
    """
    bodies = {
        "half": "class Reference: ...",
        "gone": None,
        "bad": "import no_such_module",
        "late": "globals().update(Reference=1, Served=2)",
        "whole": "import torch\nclass Reference: ...\nServed = Reference",
    }
    for name, body in bodies.items():
        write_package(tmp_path, name, f"NAME, WHERE = {name!r}, '{name}_head'\n{HEADLESS}")
        if body is not None:
            (tmp_path / f"{name}_head.py").write_text(body)
    with on_path(tmp_path), caplog.at_level("WARNING"):
        assert set(kinds.names()) == {*OURS, *NAMES, "late", "whole"}
        assert "whole_head" not in sys.modules
        source = make_random_drafter(tmp_path / "d", config=random_drafter_config(kind="dflash"))
        raw = json.loads((source / "config.json").read_text()) | {"architectures": ["halfModel"]}
        (source / "config.json").write_text(json.dumps(raw))
        assert main(["inspect", str(source)]) == 1
    assert "halfModel" in capsys.readouterr().out
    for said in (
        "half:KIND is left out: its head has no Served in half_head. Mend its record",
        "gone:KIND is left out: its head's Reference cannot be imported from gone_head",
        "bad:KIND is left out: its head's Reference cannot be imported from bad_head",
    ):
        assert said in caplog.text


def test_a_setting_by_the_name_of_the_drafters_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into the file it took that one's place, without a word."""
    kind = kinds.every()["dflash"]
    head = dataclasses.replace(kind.head, settings={"block_size": Setting(4)})
    mine = dataclasses.replace(kind, head=head)
    monkeypatch.setattr(kinds, "kind_of", lambda config: mine)
    with pytest.raises(DrafterConfigError, match="calls a setting block_size"):
        random_drafter_config(kind="dflash").check()


def test_the_parts_of_our_kinds_exist() -> None:
    assert not [problem for kind in kinds.every().values() for problem in kinds.missing_parts(kind)]


def test_a_context_and_a_head_have_a_module_each() -> None:
    """In one, the head's ``Reference`` would be taken for the context's, or the other way round."""
    kind = next(iter(kinds.every().values()))
    shared = dataclasses.replace(
        kind, head=dataclasses.replace(kind.head, modules=kind.context.modules)
    )
    [problem] = kinds.missing_parts(shared)
    assert "each needs a module of its own" in problem


def test_nothing_else_names_a_kind() -> None:
    """Outside ``kinds/`` no string is a kind's name, but for those constants that are named so for
    something else."""
    found = set()
    for folder in (ROOT / "vllm_dflash", ROOT / "patches"):
        for path in folder.rglob("*.py"):
            where = path.relative_to(folder).with_suffix("").as_posix()
            if not where.startswith("kinds/"):
                found |= {(where, name) for name in _naming(ast.parse(path.read_text()))}
    assert found == METHOD


def _naming(tree: ast.Module) -> set[str]:
    """The names that a module gives to strings that are a kind's name; ``""`` for such a string
    anywhere else."""
    named = {
        id(node.value): target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {
        named.get(id(node), "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in OURS
    }
