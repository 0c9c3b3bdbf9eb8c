"""Links in the documents lead to what is there, and on the site those that leave docs/ are text.

pytest tests/unit/test_links.py
"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOOK = runpy.run_path(str(ROOT / "mkdocs_links.py"))
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def documents() -> list[Path]:
    """Those of the checkout, without what tools unpack into it."""
    folders = (ROOT / name for name in ("docs", "examples", "monitoring", "patches", "tests"))
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return sorted(path for path in found if not {"node_modules", "run"} & set(path.parts))


def without_code(text: str) -> str:
    """A document's text without what stands in it as code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """What a link may name behind ``#``, as a site and a code host make it of each heading."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for path, anchor in _LINK.findall(without_code(document.read_text())):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_on_the_site_a_link_to_code_is_text_with_its_path() -> None:
    """The site had 44 dead links: nearly all of the page that says where what is."""
    assert HOOK["as_text"](
        "[`Verifier`](../vllm_dflash/cpu/verification.py), [`patches/README.md`]"
        "(../patches/README.md), [here](../CONTRIBUTING.md#a-patch), [log](log.md#a), [b](#b)"
    ) == (
        "`Verifier` (`vllm_dflash/cpu/verification.py`), `patches/README.md`,"
        " here (`CONTRIBUTING.md`), [log](log.md#a), [b](#b)"
    )


def test_no_document_of_the_site_links_out_of_it() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        left = _LINK.findall(without_code(HOOK["as_text"](document.read_text())))
        assert [path for path, _ in left if path and not re.fullmatch(r"[\w.-]+", path)] == []


def test_the_site_is_built_strictly() -> None:
    """A dead link was a line of information that ``make docs`` does not show."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "\nhooks: [mkdocs_links.py]" in settings
    assert "\nstrict: true\n" in settings
