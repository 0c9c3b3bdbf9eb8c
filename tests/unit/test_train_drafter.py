"""The drafter that is planned for a target: its shape, its mask token, its first weights, and what
is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pairs import make_random_drafter, random_drafter_config
from training_runs import make_target, settings
from vllm_dflash.reference.checkpoint import load_drafter, save_drafter
from vllm_dflash.training.drafter import (
    decide_mask,
    default_features,
    default_layers,
    first_weights,
    mask_token,
    plan,
    with_weights,
)
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.target import find_target, load_target

PAIR = Path(__file__).parents[2] / "examples" / "embedded_pair"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("drafter") / "target", "llama")


def test_defaults_are_the_papers() -> None:
    """36 layers are Qwen3-8B's: DFlash 5 layers and features, DFlare 7 and 9."""
    assert default_layers("dflash", 36) == 5
    assert default_features("dflash", 5, 36) == (1, 9, 17, 25, 33)
    assert default_layers("dflare", 36) == 7
    assert len(default_features("dflare", 7, 36)) == 9
    assert default_features("dflash", 3, 5) == (1, 2)
    assert default_layers("dflash", 8) == 3
    assert default_features("dflare", default_layers("dflare", 8), 8) == (1, 2, 3, 4, 5)


def test_mask_tokens(target: Path) -> None:
    """The tokenizer's own; else a row past it (z-lab's choice for Qwen3); else a reserved token;
    without a tokenizer it must be given."""
    chosen = settings(target, Path("p"), Path("o"))
    bare = find_target(chosen)
    with pytest.raises(TrainingError, match="give --mask-token-id, an id below 512"):
        mask_token(bare, None)
    assert mask_token(bare, 9) == (9, "as set")
    full = find_target(settings(PAIR / "target", Path("p"), Path("o")))
    assert mask_token(full, None)[0] == 1
    without = replace(
        full, tokenizer=find_target(settings(PAIR / "target", Path("p"), Path("o"))).tokenizer
    )
    without.tokenizer.mask_token = None
    with pytest.raises(TrainingError, match="no mask, reserved or padding token"):
        mask_token(replace(without, tokenizer=_renamed(without.tokenizer)), None)
    assert mask_token(without, None) == (1, "the reserved token <|mask|>")
    config = without.config.__class__.from_dict(without.config.to_dict() | {"vocab_size": 4100})
    assert mask_token(replace(without, config=config), None) == (
        4096,
        "the first of the embedding's 4 rows that the tokenizer does not use",
    )


def _renamed(tokenizer):
    class Bare:
        pad_token_id = mask_token_id = None
        eos_token_id = 0

        def __len__(self) -> int:
            return len(tokenizer)

        def get_added_vocab(self) -> dict[str, int]:
            return {"<|endoftext|>": 0}

    return Bare()


def test_wrong_layers_are_refused(target: Path) -> None:
    chosen = settings(target, Path("p"), Path("o"), target_layer_ids="1,9")
    with pytest.raises(
        TrainingError, match=r"target_layer_ids \[9\] are outside the target's 5 layers"
    ):
        plan(chosen, find_target(chosen))


def test_the_first_loss_is_near_ln_v() -> None:
    """With the target's final norm as it is, the mask's embedding asked for the mask's own token:
    on a target with a tied embedding the first loss was 66 where ln V is 10.8."""
    chosen = settings(PAIR / "target", Path("p"), Path("o"))
    config, _ = plan(chosen, find_target(chosen))
    model = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32)
    drafter = first_weights(config, chosen, model)
    ids = torch.full((1, config.block_size), config.mask_token_id)
    with torch.no_grad():
        hidden = model.get_input_embeddings()(ids)
        for layer in drafter.layers:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = model.get_output_embeddings()(drafter.norm(hidden))[0, 0]
    loss = float((logits.logsumexp(-1) - logits).mean())
    assert 0 < loss - math.log(config.vocab_size) < 3


def test_from_target_layers(target: Path) -> None:
    """Copies of the first and the last layer; DFlare's context projections begin as the layer's
    own."""
    chosen = settings(target, Path("p"), Path("o"), init_from_target=True, kind="dflare")
    config, _ = plan(chosen, find_target(chosen))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    drafter = first_weights(config, chosen, model)
    for d, layer in ((0, model.model.layers[0]), (1, model.model.layers[4])):
        assert torch.equal(drafter.layers[d].mlp.up_proj.weight, layer.mlp.up_proj.weight)
        assert torch.equal(
            drafter.layers[d].self_attn.k_proj_target.weight, layer.self_attn.k_proj.weight
        )
    narrow = settings(target, Path("p"), Path("o"), init_from_target=True, intermediate_size=32)
    with pytest.raises(TrainingError, match=r"init_from_target: .*mlp.down_proj"):
        first_weights(plan(narrow, find_target(narrow))[0], narrow, model)


def test_from_a_drafter(tmp_path: Path, target: Path) -> None:
    """The weights are those of the file, the reach is longer; a setting that contradicts it is
    refused."""
    config = random_drafter_config(num_target_layers=5, max_position_embeddings=256)
    source = make_random_drafter(tmp_path / "drafter", config=config)
    flags = dict(
        init=str(source), layers=None, mask_token_id=None, max_position_embeddings=512, block_size=8
    )
    chosen = settings(target, Path("p"), Path("o"), **flags)
    found, why = plan(chosen, find_target(chosen))
    assert (found.max_position_embeddings, found.target_layer_ids, why) == (
        512,
        (1, 2, 4),
        f"that of {source}",
    )
    drafter = first_weights(found, chosen, None)
    tensors = load_file(source / "model.safetensors")
    assert all(torch.equal(p, tensors[name]) for name, p in drafter.state_dict().items())
    for change, words in (
        ({"layers": 5}, "layers is 5, but the drafter of init has 3"),
        ({"kind": "dflare"}, "is a dflash: set kind"),
    ):
        other = settings(target, Path("p"), Path("o"), **flags | change)
        with pytest.raises(TrainingError, match=words):
            plan(other, find_target(other))
    own = make_random_drafter(tmp_path / "own", config=config, tables=("lm_head.weight",))
    with pytest.raises(
        TrainingError, match=r"has an embedding or lm_head of its own, which is not trained here"
    ):
        first_weights(
            found, settings(target, Path("p"), Path("o"), **flags | {"init": str(own)}), None
        )


def test_from_the_layers_of_the_other_kind(tmp_path: Path, target: Path) -> None:
    """A DFlare begins with a DFlash's layers, its own context projections as copies; wrong depth
    and mask token are named."""
    dflash, found = (
        settings(target, Path("p"), Path("o"), layers=3, target_layer_ids=(0, 1, 2)),
        find_target(settings(target, Path("p"), Path("o"))),
    )
    source = make_random_drafter(tmp_path / "drafter", config=plan(dflash, found)[0])
    flags = dict(init_layers=str(source), kind="dflare", layers=3, target_layer_ids=(0, 1, 2, 3))
    chosen = settings(target, Path("p"), Path("o"), **flags)
    model = load_target(found, chosen, "cpu")
    drafter = first_weights(plan(chosen, found)[0], chosen, model)
    tensors = load_file(source / "model.safetensors")
    for name, parameter in drafter.state_dict().items():
        if name.startswith(("layers.", "norm.")):
            assert torch.equal(parameter, tensors[name.replace("_target.", ".")]), name
    for change, words in (
        ({"layers": 2}, "has 3 layers"),
        ({"mask_token_id": 9}, "mask token 511, the drafter to train 3 and 9"),
    ):
        other = settings(target, Path("p"), Path("o"), **flags | change)
        with pytest.raises(TrainingError, match=words):
            first_weights(plan(other, found)[0], other, model)


def test_init_for_another_target_is_refused(tmp_path: Path) -> None:
    source = make_random_drafter(tmp_path / "drafter")
    chosen = settings(
        PAIR / "target", Path("p"), Path("o"), init=str(source), layers=None, mask_token_id=None
    )
    with pytest.raises(TrainingError, match="trained for another target"):
        plan(chosen, find_target(chosen))


def test_an_absent_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        find_target(settings(tmp_path, Path("p"), Path("o")))


def test_a_mask_embedding_where_no_token_is_free(target: Path, tmp_path: Path) -> None:
    """SmolLM2's tokenizer has nothing but tokens of its texts: training for it was refused. It now
    begins as the end token's embedding.

    A drafter that was begun with one goes on with it; it may be asked for beside a free token, and
    not be taken from one that has it.
    """
    chosen = settings(target, Path("p"), Path("o"), mask_token_id=None)
    full = find_target(settings(PAIR / "target", Path("p"), Path("o")))
    bare = replace(find_target(chosen), tokenizer=_renamed(range(512)))
    decided = decide_mask(chosen, bare)
    assert decided.drafter.mask_embedding is True
    assert (
        decide_mask(
            settings(PAIR / "target", Path("p"), Path("o"), mask_token_id=None), full
        ).drafter.mask_embedding
        is False
    )
    config, why = plan(decided, bare)
    assert config.mask_token_id == bare.eos_token_id
    assert why.startswith("the end token, for none is free")
    with pytest.raises(TrainingError, match="no row is free: set mask_embedding"):
        plan(
            decide_mask(
                replace(chosen, drafter=replace(chosen.drafter, mask_embedding=False)), bare
            ),
            bare,
        )
    assert mask_token(full, None, True)[1].endswith(
        "its embedding is the drafter's own (mask_embedding.pt)"
    )

    model = load_target(bare, chosen, "cpu")
    drafter = first_weights(config, decided, model)
    assert torch.equal(
        drafter.mask_embedding, model.get_input_embeddings().weight[config.mask_token_id]
    )
    with torch.no_grad():
        drafter.mask_embedding.normal_()
    copy = with_weights(config, dict(drafter.named_parameters()))
    save_drafter(tmp_path / "d", copy)
    loaded = load_drafter(tmp_path / "d", torch.float32)
    assert torch.equal(loaded.mask_embedding, drafter.mask_embedding)
    ids = torch.tensor([[config.mask_token_id, 5]])
    assert torch.equal(
        loaded.embed(model.get_input_embeddings(), ids)[0, 0], drafter.mask_embedding
    )

    for begun in ("init", "init_layers"):
        flags = dict(layers=None) if begun == "init" else {}
        again = decide_mask(
            settings(
                target,
                Path("p"),
                Path("o"),
                mask_token_id=None,
                **flags | {begun: str(tmp_path / "d")},
            ),
            bare,
        )
        taken = first_weights(plan(again, bare)[0], again, model)
        assert torch.equal(taken.mask_embedding, drafter.mask_embedding)
        with pytest.raises(
            TrainingError, match="was trained with one of its own: leave the setting out"
        ):
            decide_mask(replace(again, drafter=replace(again.drafter, mask_embedding=False)), bare)
