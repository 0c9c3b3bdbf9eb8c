"""Takes mends of the GPU path out, one by one, and shows which tests find it: a list of mutations,
each with the tests that have to fail.

Each is made in a copy of the checkout, so that nothing of the checkout changes. First all tests are
run without a mutation, and have to pass. Some two minutes a mutation on two cores.

    python tests/mutants.py
    python tests/mutants.py k-0-drafts lm-head-rows
    python tests/mutants.py --list
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRAPHS, PROFILE = "tests/engine/test_v2_graphs.py", "tests/engine/test_v2_profile.py"
COPIED = ("vllm_dflash", "patches", "tests")
"""Of the checkout; the rest is linked to."""


@dataclass(frozen=True)
class Mutant:
    """A mend that is taken out."""

    name: str
    what: str
    """What a user would have without it."""
    file: str
    changes: tuple[tuple[str, str], ...]
    """Text of the file, which stands there once, and what stands there in its place."""
    found_by: tuple[str, ...]
    """Tests that have to fail, as pytest names them, without their parameters."""

    def apply(self, root: Path) -> None:
        path = root / self.file
        text = path.read_text()
        for old, new in self.changes:
            if text.count(old) != 1:
                raise SystemExit(f"{self.name}: {self.file} has {text.count(old)} times: {old!r}")
            text = text.replace(old, new)
        path.write_text(text)


SPECULATOR = "vllm_dflash/drafting/v2.py"
MUTANTS = (
    Mutant(
        "k-0-drafts",
        "a step with K = 0 drafts the block, which is dropped",
        SPECULATOR,
        (('off = kwargs.get("num_speculative_tokens") == 0 and', "off = False and"),),
        (f"{GRAPHS}::test_a_step_with_k_0_runs_no_query",),
    ),
    Mutant(
        "k-0-replays",
        "a step with K = 0 replays a CUDA graph, which drafts",
        SPECULATOR,
        (('            kwargs["is_profile"] = True\n', "            pass\n"),),
        (f"{GRAPHS}::test_a_step_with_k_0_runs_no_query",),
    ),
    Mutant(
        "cut-by-request",
        "under asynchronous scheduling steps of the controller's are off or cut by request, without"
        " a CUDA graph of the target",
        "patches/v2_target_graphs.py",
        (("    if not is_adaptive(vllm_config):", "    if True:"),),
        (f"{PROFILE}::test_each_decoding_step_has_a_graph_of_the_target",),
    ),
    Mutant(
        "guessed-profile",
        "under the V2 runner the controller begins with a guess of what steps take",
        "patches/v2_cost_profile.py",
        (("    if not (worker.use_v2_model_runner and", "    if True or not (worker.rank and"),),
        (
            f"{PROFILE}::test_a_profile_is_measured_at_the_first_start",
            f"{PROFILE}::test_a_second_start_reads_it",
        ),
    ),
    Mutant(
        "lm-head-rows",
        "all rows of a block go through lm_head, K of them are used",
        SPECULATOR,
        (
            (
                "num_speculative_steps=self.num_draft_tokens,\n",
                "num_speculative_steps=self._num_rows,\n"
                "                draft_tokens=(wide := self.draft_tokens.new_zeros("
                "self.max_num_reqs, self._num_rows)),\n",
            ),
            ("num_reqs, self.num_draft_tokens)\n", "num_reqs, self._num_rows)\n"),
            (
                "            return\n        hidden =",
                "            first = wide[:num_reqs, : self.num_draft_tokens]\n"
                "            self.draft_tokens[:num_reqs] = first\n"
                "            return\n        hidden =",
            ),
        ),
        (f"{GRAPHS}::test_lm_head_has_k_rows_a_request",),
    ),
    Mutant(
        "graphs-by-tokens",
        "the draft's CUDA graphs end at vLLM's largest size in tokens",
        SPECULATOR,
        (
            (
                "compilation.cudagraph_capture_sizes = self._graph_tokens()",
                "compilation.cudagraph_capture_sizes = compilation.cudagraph_capture_sizes",
            ),
        ),
        (f"{GRAPHS}::test_every_drafting_step_has_a_graph",),
    ),
    Mutant(
        "graphs-by-schedule",
        "with a schedule by batch size the draft has graphs for its lengths, none for the block",
        SPECULATOR,
        (("        block.num_speculative_tokens_per_batch_size = None\n", ""),),
        (f"{GRAPHS}::test_every_drafting_step_has_a_graph",),
    ),
    Mutant(
        "early-max-model-len",
        "blocks near an end that vLLM fitted to the KV cache are not moved",
        SPECULATOR,
        (
            ("return int(self.vllm_config.model_config.max_model_len)", "return self._early"),
            ('        """vLLM 0.32 keeps what', '        self._early = value\n        """'),
        ),
        (f"{GRAPHS}::test_a_length_that_was_fitted_to_the_cache",),
    ),
)


def copy_checkout(folder: Path) -> None:
    """The checkout, whose package is found before the installed one."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / path.name, symlinks=True, ignore=ignored)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "vllm_dflash" / "patches").symlink_to("../patches")


def failures(root: Path, tests: Iterable[str]) -> tuple[dict[str, str], str]:
    """Of the tests that failed their names, without parameters, and the line that did; and the
    end of pytest's output."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [*command, *dict.fromkeys(tests)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    failed = re.findall(r"^FAILED ([^\[\s]+)\S*(?: - (.*))?$", ended.stdout, re.M)
    # An engine that does not start finds nothing.
    if ended.returncode not in (0, 1) or re.search("^ERROR ", ended.stdout, re.M):
        raise SystemExit(f"pytest ended with {ended.returncode}:\n{ended.stdout[-3000:]}")
    return dict(failed), ended.stdout[-1500:]


def try_one(mutant: Mutant | None, tests: Iterable[str]) -> tuple[dict[str, str], str]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_checkout(root)
        if mutant:
            mutant.apply(root)
        return failures(root, tests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of mutations; left out: all")
    parser.add_argument("--list", action="store_true", help="what there is, and run nothing")
    asked = parser.parse_args()
    if unknown := set(asked.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"there is no {sorted(unknown)[0]}: see --list")
    chosen = [m for m in MUTANTS if not asked.names or m.name in asked.names]
    if asked.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.what}")
        return
    tests = [test.partition("::")[0] for mutant in chosen for test in mutant.found_by]
    failed, output = try_one(None, tests)
    if failed:
        raise SystemExit(f"without a mutation:\n{output}")
    print("without a mutation: all pass", flush=True)
    missed = []
    for mutant in chosen:
        began = time.monotonic()
        failed, output = try_one(mutant, (test.partition("::")[0] for test in mutant.found_by))
        lost = [test for test in mutant.found_by if test not in failed]
        missed += [mutant.name] * bool(lost)
        print(f"\n{mutant.name} ({mutant.what}), {time.monotonic() - began:.0f} s", flush=True)
        for test, line in failed.items():
            print(f"    {'found' if test in mutant.found_by else 'also'}: {test}: {line}")
        for test in lost:
            print(f"    NOT FOUND by {test}\n{output}")
        sys.stdout.flush()
    print(f"\n{len(chosen) - len(missed)} of {len(chosen)} found")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
