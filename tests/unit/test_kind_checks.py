"""A kind of another package that is not as its record has to be, or that has a name of another's,
is left out with its reason; plain serving and the other kinds go on.

    pytest tests/unit/test_kind_checks.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinds_of_users import on_path, write_package
from vllm_dflash import kinds
from vllm_dflash.cli import status
from vllm_dflash.kind_checks import namesake
from vllm_dflash.kinds import Head, Setting
from vllm_dflash.kinds.dflash import KIND as DFLASH

TOY = """
from dataclasses import replace
from vllm_dflash.kinds.dflash import DFLASH2, KIND as DFLASH

KIND = replace(
    DFLASH, **{"name": "toy", "architecture": "ToyDraftModel", "format": "toy", **dict(%s)}
)
"""
NAMES = {
    "name='dflash'": "dflash of another kind",
    "architecture='DFlashDraftModel'": "DFlashDraftModel of dflash",
    # What vLLM looks up has DFlash before it.
    "architecture='DraftModel'": "DFlashDraftModel of dflash",
    "served_as=DFLASH2.served_as": "DFlashCandidatesDraftModel of dflash2",
}
IN_VLLM = {
    "architecture='LlamaForCausalLM'": "LlamaForCausalLM of a model of vLLM's",
    "name='eagle3'": "eagle3 of a kind that vLLM reads in speculators' format itself",
}


def left_out(folder: Path, caplog: pytest.LogCaptureFixture, fields: str) -> str:
    """What is said of a kind of another package with these fields, which is not among the others;
    these are found by their names."""
    write_package(folder, "toy", TOY % fields)
    own, served = kinds.own(), kinds.architectures()["DFlashDraftModel"]
    with on_path(folder), caplog.at_level("WARNING"):
        assert kinds.every() == own
        assert kinds.architectures()["DFlashDraftModel"] == served
    (said,) = caplog.messages
    return said


@pytest.mark.parametrize("fields", NAMES)
def test_a_kind_that_would_be_found_in_anothers_place_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: str
) -> None:
    """By what vLLM looks up for its architecture a kind took the place of DFlash: drafters of that
    were read and served as the other's, without a word."""
    said = left_out(tmp_path, caplog, fields)
    assert said == (
        f"the kind of drafter toy:KIND is left out: it has the name {NAMES[fields]}. Rename it"
    )


@pytest.mark.vllm
@pytest.mark.parametrize("fields", IN_VLLM)
def test_a_kind_with_a_name_of_a_model_of_vllms_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: str
) -> None:
    """Plain serving of that model got our drafter's class, and EAGLE-3 was taken for the kind."""
    assert IN_VLLM[fields] in left_out(tmp_path, caplog, fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("context=None", "context is None, and has to be vllm_dflash.kinds.Context"),
        ("head=None", "head is None, and has to be vllm_dflash.kinds.Head"),
        ("name=None", "name is None, and has to be str"),
        ("architecture=''", "architecture must not be empty"),
        ("first_row=2", "first_row is 2, and has to be Literal[0, 1]"),
        ("layers=3", "layers is 3, and has to be a function of 1 argument"),
        ("features=lambda layers: 3", "and has to be a function of 2 arguments"),
        ("context=replace(DFLASH.context, own_tensors={})", "own_tensors is {}"),
        ("context=replace(DFLASH.context, over_context='k_proj')", "has to be tuple[str, ...]"),
        ("head=replace(DFLASH.head, settings={'rank': 4})", "settings is {'rank': 4}"),
    ],
)
def test_a_record_with_a_wrong_field_is_left_out_with_what_it_has_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: str, words: str
) -> None:
    """One without a context ended the start of every engine, with a drafter or without; a dict in
    place of a function ended `inspect` in its own words."""
    said = left_out(tmp_path, caplog, fields)
    assert words in said
    assert said.endswith("Mend or uninstall its package")


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "KIND = 1"])
def test_a_package_that_ends_its_import_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    write_package(tmp_path, "toy", code)
    with on_path(tmp_path), caplog.at_level("WARNING"):
        assert kinds.every() == kinds.own()
    assert "toy:KIND is left out" in caplog.text


def test_a_setting_is_judged_too() -> None:
    with pytest.raises(TypeError, match="Setting: default is 'many', and has to be"):
        Setting("many")  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_kinds_of_this_package_by_one_name_are_refused_and_status_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was dropped in took the place of the kind whose name it had."""

    def again(module: Any) -> tuple[kinds.Kind, ...]:
        return replace(DFLASH, name="copy"), *module.KINDS

    monkeypatch.setattr(kinds, "_kinds_in", again)
    kinds.own.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"has the name .* rename one of the two"):
            kinds.every.__wrapped__()
        monkeypatch.setattr(status, "installed_vllm", lambda: "0.32.0")
        assert status._status() == 1
        assert "rename one of the two" in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        kinds.own.cache_clear()


def test_two_heads_by_one_name() -> None:
    """`train --help` would describe one of them, and `--head` train the other; kinds that share a
    head share its name."""
    same = replace(DFLASH, name="other", architecture="OtherModel", is_known_to_vllm=False)
    assert namesake(same, [DFLASH]) is None
    other = replace(same, head=replace(DFLASH.head, modules="of_another_package"))
    assert namesake(other, [DFLASH]) == "argmax of the head of dflash"


def test_a_setting_without_a_name() -> None:
    with pytest.raises(TypeError, match="a setting has an empty name"):
        Head("of_another_package", settings={"": Setting(1)})
