"""A kind is one file: what it serves is what its plain PyTorch reference computes, and every tool
and the trainer take it.

Tests: ``pytest tests/unit/test_kinds.py``.
"""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinds_of_users import NAMES
from pairs import make_random_drafter, random_drafter_config
from training_runs import answer_held_out, answered_prompts, held_out_file, make_target, settings
from vllm_dflash import kinds
from vllm_dflash.cli import main
from vllm_dflash.config import DrafterConfig
from vllm_dflash.drafting.layout import block_layout
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import format_names, parse, write
from vllm_dflash.formats.speculators import SPECULATORS
from vllm_dflash.heads import Ranking
from vllm_dflash.heads.reference import Block
from vllm_dflash.kinds import kind_of
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.reference.loss import block_labels, position_weights
from vllm_dflash.reference.rotary import rotary_angles
from vllm_dflash.tools.convert import convert
from vllm_dflash.tools.inspect import inspect_checkpoint
from vllm_dflash.training.drafter import plan
from vllm_dflash.training.export import folder_of
from vllm_dflash.training.learned import final_folder, trained_folder
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.target import find_target
from vllm_dflash.weights import check_dtypes, check_shapes, expected_tensors

pytestmark = pytest.mark.usefixtures("kinds_of_users")
OURS = tuple(sorted(kinds.names()))
"""Every kind of this package has its comparisons here: it was a list, and one that was not added to
it was compared with nothing."""
CONTEXTS = tuple({kinds.every()[name].context.modules: name for name in reversed(OURS)}.values())
"""One kind of each context."""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers ask which rank they are on."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            1, 0, f"file://{tmp_path_factory.mktemp('rank') / 'store'}", 0, "gloo"
        )
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [*CONTEXTS, "onelayer"])
def test_served_is_the_reference(kind: str, bias: bool) -> None:
    if bias and kind not in CONTEXTS:
        pytest.skip("the example has no biases")
    config = random_drafter_config(kind=kind, attention_bias=bias).with_()
    torch.manual_seed(0)
    reference = new_drafter(config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    features = torch.randn(6, config.num_features * config.hidden_size)
    with torch.inference_mode():
        served = kind_of(config).context_part("Served")(
            config, config.num_key_value_heads, torch.float32, None, "context"
        )
        # In no order, as they may come.
        for name, tensor in sorted(reference.state_dict().items(), key=lambda item: item[0][::-1]):
            served.load(name, tensor)
        for module in served.modules():  # as vLLM's loader does; on a CPU it packs the weights
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        context = served.combine(features)
        assert context.shape == (6, kind_of(config).context.width(config))
        keys, values = served.project(context)
    positions = torch.zeros(6, dtype=torch.long)  # at position 0 rotary changes nothing
    cos, sin = rotary_angles(config, positions)
    c = reference.context(features)
    for i, layer in enumerate(reference.layers):
        key, value = reference.layer_key_value(i, c, cos, sin)
        torch.testing.assert_close(layer.self_attn.k_norm(keys[:, i]), key, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[:, i], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("kind", [*OURS, "norepeat"])
def test_a_served_head_is_the_reference(kind: str, confident: bool) -> None:
    config, batch = random_drafter_config(kind=kind), 5
    head, k = kind_of(config).head, config.max_speculative_tokens
    torch.manual_seed(0)
    lm_head, anchors = (
        torch.randn(config.vocab_size, config.hidden_size),
        torch.randint(config.vocab_size, (batch,), dtype=torch.int32),
    )
    # A request's rows are alike, so that one by itself would repeat tokens.
    hidden = (
        torch.randn(batch, 1, config.hidden_size) + torch.randn(batch, k, config.hidden_size) / 9
    )
    hidden = hidden.flatten(0, 1)
    reference, served = (kind_of(config).head_part(part) for part in ("Reference", "Served"))
    ours, theirs = served(config, torch.float32), reference(config)
    own = {
        name: torch.randn(shape) if max(shape) > 1 else 20 + torch.rand(shape)
        for name, shape in head.own_tensors(config).items()
    }
    is_network = any(name.endswith("_proj.weight") for name in own)
    if is_network:  # as large as in one of many layers
        own = {
            name: tensor / tensor.shape[-1] ** 0.5 if tensor.dim() == 2 else tensor
            for name, tensor in own.items()
        }
    with torch.inference_mode():
        for name, tensor in own.items():
            ours.load(name, tensor)
        theirs.load_state_dict({name.removeprefix("head."): own[name] for name in own})
        table = torch.randn(config.vocab_size, config.hidden_size)

        def embed(ids: torch.Tensor) -> torch.Tensor:
            return table[ids]

        before_anchors = torch.randn(batch, kind_of(config).context.width(config))
        block = Block(
            hidden.view(batch, k, -1),
            (hidden @ lm_head.T).view(batch, k, -1),
            embed,
            lambda h: h @ lm_head.T,
            before_anchors,
        )
        ranking = Ranking(
            lambda h: h @ lm_head.T,
            lambda x: x.argmax(-1),
            lambda h: (h @ lm_head.T).argmax(-1),
            confident,
            embed,
            before_anchors,
        )
        tokens, confidences = ours.draft(hidden, anchors, k, ranking)
        expected, scores = theirs.draft(block, anchors)
        # What training ranks is what drafting ranks, where the drafted tokens are the ones before.
        before = torch.cat([anchors[:, None].long(), expected[:, :-1]], dim=1)
        assert torch.equal(theirs.lesson(block, before, expected).tokens, expected)
        if is_network:  # it computes in float32
            torch.testing.assert_close(theirs.scores(block, before), scores, rtol=1e-4, atol=1e-4)
        else:
            # In float64: a processor may sum a batch of rows in another order than a row.
            exact = copy.deepcopy(theirs).double()
            precise = Block(block.hidden.double(), block.logits.double())
            drafted, ranked = exact.draft(precise, anchors)
            torch.testing.assert_close(exact.scores(precise, before), ranked)
            assert torch.equal(drafted, expected)
    assert torch.equal(tokens, expected)
    assert torch.equal(tokens, block.logits.argmax(-1)) == head.is_argmax
    if confidences is not None and not config.head.get("enable_confidence_head"):
        torch.testing.assert_close(confidences, scores.softmax(-1).amax(-1))


@pytest.mark.parametrize("name", [*OURS, *NAMES])
def test_the_tools_take_a_kind(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inspect; convert to speculators and back.

    A third kind was written as DFlareSpeculator, and inspect, the trainer's defaults and the card
    ended in a KeyError.
    """
    config = random_drafter_config(kind=name)
    kind, source = kind_of(config), make_random_drafter(tmp_path / "source", config=config)
    assert kind.format in format_names()
    assert main(["inspect", str(source)]) == 0
    said = capsys.readouterr().out
    assert f"context           {kind.label}: {kind.sentence}" in said
    assert all(f"{name} {value}" in said for name, value in config.head.items())
    assert main(["inspect", "--json", str(source)]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == name
    convert(source, tmp_path / "theirs", SPECULATORS, verifier="target")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (raw["architectures"], raw["speculators_model_type"]) == (
        [kind.speculators_architecture],
        name,
    )
    convert(tmp_path / "theirs", tmp_path / "back", kind.format)
    assert DrafterConfig.from_pretrained(tmp_path / "back") == config
    ours, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert ours.keys() == back.keys()
    assert all(torch.equal(tensor, back[n]) for n, tensor in ours.items())


@pytest.mark.parametrize("name", [*OURS, *NAMES])
def test_each_of_a_kinds_own_tensors_is_missed(name: str, tmp_path: Path) -> None:
    """Missing, of another shape, of another dtype, or not finite: refused by its name."""
    config = random_drafter_config(kind=name).with_()
    shapes, own = expected_tensors(config), kinds.own_tensors(config)
    check_shapes(config, shapes)
    assert own.keys() <= shapes.keys()
    for tensor, shape in own.items():
        with pytest.raises(DrafterConfigError, match=re.escape(f"missing: {tensor};")):
            check_shapes(
                config, {n: s for n, s in shapes.items() if n != tensor} | {f"{tensor}.old": shape}
            )
        with pytest.raises(DrafterConfigError, match=re.escape(f"{tensor} is [7, 7, 7]")):
            check_shapes(config, shapes | {tensor: (7, 7, 7)})
        with pytest.raises(DrafterConfigError, match=re.escape(f"{tensor} is I64")):
            check_dtypes(config, dict.fromkeys(shapes, "F32") | {tensor: "I64"})
    poisoned = list(own)[-1]
    folder = make_random_drafter(tmp_path / "drafter", config=config)
    tensors = load_file(folder / "model.safetensors")
    tensors[poisoned].view(-1)[-1] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    [problem] = inspect_checkpoint(folder).errors
    assert poisoned in str(problem)
    assert "NaN or infinity" in str(problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in [*OURS, *NAMES]), *((name, "bfloat16") for name in NAMES)],
)
def test_a_kind_is_trained_and_exported(
    name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budget, one training step that changes its own tensors, proof, export and card."""
    target = make_target(tmp_path / "target")
    held_out, ids = held_out_file(tmp_path / "held-out.jsonl", 2)
    chosen = settings(
        target,
        answered_prompts(target, tmp_path / "prompts.jsonl", 8),
        tmp_path / "run",
        kind=name,
        dtype=dtype,
        layers=None,
        steps=1,
        warmup=0.0,
        held_out_prompts=str(held_out),
        prove_prompts=2,
        eval_prompts=1,
        skip_vllm=True,
    )
    config = plan(chosen, find_target(chosen))[0]
    assert config.kind == name
    assert main(["train", "--dry-run", *_flags(chosen)]) == 0
    assert "drafter " in capsys.readouterr().out
    answer_held_out(chosen, ids)
    assert run_stages(chosen, ("generate", "features", "train", "prove", "export"))
    torch.manual_seed(chosen.run.seed)
    trained, first = (
        load_file(trained_folder(chosen) / "model.safetensors"),
        new_drafter(config).state_dict(),
    )
    own = kinds.own_tensors(config)
    assert own
    assert all(not torch.equal(trained[n].float(), first[n]) for n in own)
    card = (folder_of(chosen) / "README.md").read_text()
    assert f"# {kind_of(config).label} drafter for" in card
    assert f"tags: [speculative-decoding, {name}]" in card
    assert final_folder(chosen).exists()


def _flags(chosen: object) -> list[str]:
    """A run's settings as flags, those that differ from the defaults."""
    flags = []
    for table in dataclasses.fields(chosen):  # type: ignore[arg-type]
        for item in dataclasses.fields(getattr(chosen, table.name)):
            value = getattr(getattr(chosen, table.name), item.name)
            if value != item.default:
                words = (
                    [str(v) for v in value]
                    if isinstance(value, tuple)
                    else []
                    if value is True
                    else [str(value)]
                )
                flags += [f"--{item.name.replace('_', '-')}", *words]
    return flags


def test_the_anchors_row_may_predict() -> None:
    """A block of b holds b drafted tokens then, and a checkpoint says so in speculators' format."""
    config = random_drafter_config(kind="fromanchor").with_()
    assert config.max_speculative_tokens == config.block_size
    raw = write(config, SPECULATORS)
    assert raw["sample_from_anchor"] is True
    assert parse(raw) == config
    with pytest.raises(DrafterConfigError, match="sample_from_anchor"):
        parse(raw | {"sample_from_anchor": False})
    labels, valid = block_labels(
        torch.arange(12)[None], torch.tensor([[2, 9]]), 4, config.first_row
    )
    assert labels[0, 0].tolist() == [3, 4, 5, 6]
    assert valid[0].sum(-1).tolist() == [4, 2]
    assert len(position_weights(8, first_row=config.first_row)) == 8
    layout = block_layout(
        next_token_ids=torch.tensor([7, 9], dtype=torch.int32),
        anchors=torch.tensor([3, 5], dtype=torch.int32),
        block_table=torch.arange(8, dtype=torch.int32).view(2, 4),
        page_size=4,
        mask_token_id=1,
        block_size=4,
        num_speculative_tokens=4,
        max_model_len=16,
        first_row=config.first_row,
    )
    assert layout.sample_indices.tolist() == list(range(8))
