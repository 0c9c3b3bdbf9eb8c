"""A process's memory in huge pages: which addresses are asked for, and that what was there
stays."""

import subprocess
import sys

import pytest

from vllm_dflash.cpu import huge_pages

MAPS = """\
00400000-00a00000 rw-p 00000000 00:00 0                                  [heap]
10000000-10200000 rw-p 00000000 00:00 0
20100000-20700000 rw-p 00000000 00:00 0
30000000-30400000 r--p 00000000 00:00 0
40000000-40400000 rw-p 00000000 08:01 1234                               /lib/with a space.so
50000000-50400000 rw-s 00000000 00:00 0
60000000-60400000 rw-p 00000000 00:00 0                                  [stack]
"""


def test_whole_pages_of_private_memory_are_asked_for() -> None:
    found = list(huge_pages._candidates(MAPS.splitlines()))
    assert found == [0x400000, 0x600000, 0x800000, 0x10000000, 0x20200000, 0x20400000]


def test_a_system_that_forbids_it_is_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    assert huge_pages.use_huge_pages() == 0
    setting.unlink()
    assert huge_pages.use_huge_pages() == 0


@pytest.mark.slow
def test_what_is_moved_stays_as_it_was() -> None:
    """In a process of its own, as it is done to a whole process; where the kernel cannot, nothing
    happens."""
    code = (
        "import torch; from vllm_dflash.cpu.huge_pages import use_huge_pages\n"
        "kept = torch.arange(16 << 20, dtype=torch.int32); before = kept.clone()\n"
        "moved = use_huge_pages()\n"
        "assert torch.equal(kept, before) and moved % (2 << 20) == 0\n"
        "assert use_huge_pages(longest=-1.0) == 0\n"
        "print(moved)"
    )
    assert (
        int(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
        )
        >= 0
    )
