"""Another plug-in of vLLM's replaces what our code repeats or extends: it is not passed by.

pytest tests/engine/test_other_plug_ins.py
"""

import re
import textwrap
from pathlib import Path

import pytest

from engine.harness import DRAFTER, TARGET
from engine.other_vllm import EndedError, before_the_installed, run, tokens

pytestmark = pytest.mark.engine


def with_plug_in(folder: Path, body: str) -> dict[str, str]:
    """An environment with another plug-in of vLLM's, which runs ``body`` when it is loaded."""
    (folder / "other_plugin.py").write_text(f"def register():\n{textwrap.indent(body, '    ')}")
    info = folder / "other_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nother = other_plugin:register\n"
    )
    return before_the_installed(folder)


QUIETER = """
from vllm.model_executor.{module} import {owner}
original = {owner}.{name}
def quieter(self, *args):
    out = original(self, *args)
    return (out[0] * 0.8, *out[1:]) if isinstance(out, tuple) else out * 0.8
{owner}.{name} = quieter
"""


@pytest.mark.parametrize(
    ("module", "owner", "name", "said"),
    [
        ("models.qwen2", "Qwen2MLP", "forward", "Qwen2MLP, but it is other_plugin:register."),
        ("layers.layernorm", "RMSNorm", "__call__", "RMSNorm has a __call__ of its own"),
    ],
)
def test_a_method_that_another_plug_in_sets_on_a_class_is_not_passed_by(
    tmp_path: Path, module: str, owner: str, name: str, said: str
) -> None:
    """The source is as it was: the fast layers, which repeat it, wrote the text of a model without
    the plug-in."""
    env = with_plug_in(tmp_path, QUIETER.format(module=module, owner=owner, name=name))
    plain, drafted = run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    assert tokens(drafted) == tokens(plain)
    assert said in drafted["log"]
    assert "leaves a part out" in drafted["log"]


SUBCLASS = """
from vllm.model_executor.models import qwen3
class Quieter(qwen3.RowParallelLinear):
    def forward(self, x):
        out, bias = super().forward(x)
        return out * 0.8, bias
qwen3.RowParallelLinear = Quieter
"""


def test_a_class_of_another_plug_in_is_named(tmp_path: Path) -> None:
    """The fast layers stayed out, and nothing said why."""
    env = with_plug_in(tmp_path, SUBCLASS)
    plain, drafted = run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    assert tokens(drafted) == tokens(plain)
    assert re.search(
        r"leaves a part out.*layers\.0\.self_attn\.o_proj runs other_plugin\.register.*Quieter",
        drafted["log"],
    )


def test_a_body_that_another_plug_in_replaces_is_refused_where_ours_needs_it(
    tmp_path: Path,
) -> None:
    """Our proposer extends vLLM's, whose method the plug-in has set."""
    env = with_plug_in(
        tmp_path,
        "from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer as Base\n"
        "original = Base.prepare_inputs_padded\n"
        "Base.prepare_inputs_padded = lambda self, *args: original(self, *args)\n",
    )
    words = r"prepare_inputs_padded, but it is other_plugin:.*one"
    with pytest.raises(EndedError, match=words) as ended:
        run(env, tmp_path, (TARGET, None), (TARGET, DRAFTER))
    (plain,) = ended.value.reports
    assert len(tokens(plain)) == 3
