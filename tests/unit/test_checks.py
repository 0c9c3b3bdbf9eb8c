"""What a user of ``LLM`` or ``vllm serve`` reads when the drafter does not fit: through vLLM's own
configuration, no process started."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pairs import make_random_drafter, make_random_target, random_drafter_config
from vllm_dflash import checks
from vllm_dflash.checks import _ADVISED, check_logits_processors, method_of, read_early
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import is_ours, published_format
from vllm_dflash.patching import PatchSet

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 256


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_target(tmp_path_factory.mktemp("pair") / "target")


def configure(
    target: Path,
    drafter: Path,
    k: int | None = 7,
    max_model_len: int = MAX_MODEL_LEN,
    method: str | None = "dflash",
    **args: Any,
) -> Any:
    """vLLM's configuration of the pair, as ``LLM`` and ``vllm serve`` make it, with the plug-in
    loaded by its entry point."""
    from vllm.engine.arg_utils import EngineArgs

    speculative: dict[str, Any] = {"model": str(drafter)}
    speculative |= {} if method is None else {"method": method}
    speculative |= {} if k is None else {"num_speculative_tokens": k}
    return EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        speculative_config=speculative,
        max_model_len=max_model_len,
        **args,
    ).create_engine_config()


def test_a_pair_that_fits_is_accepted(target, tmp_path):
    config = configure(target, make_random_drafter(tmp_path / "dflash"))
    assert config.speculative_config.draft_model_config.architectures == ["DFlashDraftModel"]
    from vllm_dflash.plugin import patch_set

    assert isinstance(patch_set(), PatchSet)
    assert patch_set().report()[0].state == "applied"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            (
                "the target's hidden_size is 64, the drafter's is 32: this drafter was trained for"
                " another target"
            ),
        ),
        (
            {"vocab_size": 500},
            (
                "the target's vocab_size is 512, the drafter's is 500: this drafter was trained for"
                " another target"
            ),
        ),
        (
            {"num_target_layers": 6},
            (
                "num_target_layers.* is 5, the drafter's is 6: this drafter was trained for another"
                " target"
            ),
        ),
        ({"target_layer_ids": (1, 7)}, r"target_layer_ids \[7\] are outside the target's 5 layers"),
        ({"mask_token_id": 512}, "mask_token_id 512 is outside the vocabulary of 512 tokens"),
        (
            {"max_position_embeddings": 128},
            (
                "max_model_len is 256, .* end at max_position_embeddings = 128: start vLLM with"
                " --max-model-len 128"
            ),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_drafter_for_another_target_is_refused(target, tmp_path, changes, message):
    drafter = make_random_drafter(tmp_path / "dflash", config=random_drafter_config(**changes))
    with pytest.raises(ValueError, match=message):
        configure(target, drafter)


@pytest.mark.parametrize("kind", ["dflash", "dflare"])
@pytest.mark.parametrize("form", ["published", "speculators"])
@pytest.mark.parametrize("k", [None, 5])
def test_without_a_method_a_drafter_of_ours_is_known_by_its_config(target, tmp_path, kind, form, k):
    """vLLM told it by the word in the path alone: another drafter of ours was served as a whole
    model, past every check, and without K no drafter was."""
    config = random_drafter_config(kind=kind)
    form = published_format(config) if form == "published" else form
    drafter = make_random_drafter(tmp_path / "eagle3", config=config, format=form)
    speculative = configure(target, drafter, k=k, method=None).speculative_config
    assert (speculative.method, speculative.num_speculative_tokens) == ("dflash", k or 7)
    assert is_ours(speculative)


@pytest.mark.parametrize(
    "method", ["draft_model", "eagle", "eagle3", "medusa", "mtp", "dspark", "ngram"]
)
def test_another_method_is_refused_for_a_drafter_of_ours(target, tmp_path, method):
    """``draft_model`` was accepted, and others ended in what vLLM says of an architecture."""
    drafter = make_random_drafter(tmp_path / "d")
    message = rf'method is \'{method}\' .* is a DFlash drafter: set "method": "dflash"'
    with pytest.raises(ValueError, match=message):
        configure(target, drafter, method=method)


def test_what_vllm_has_a_method_of_its_own_for_stays_its_own(tmp_path):
    def method_for(raw: dict[str, Any], method: str | None) -> str | None:
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return method_of(str(tmp_path), None, method)

    dspark = {"architectures": ["Qwen3DSparkModel"]}
    assert method_for(dspark, None) is None
    assert method_for(dspark, "dspark") == "dspark"
    for raw in (7, {}, {"architectures": ["LlamaForCausalLM"]}, {"speculators_model_type": "e"}):
        for method in (None, "eagle3"):
            assert method_for(raw, method) == method
    (tmp_path / "config.json").write_text("{")
    assert method_of(str(tmp_path), None, "eagle3") == "eagle3"
    assert method_of("no/such", None, None) is None
    assert method_of("x" * 5000, None, None) is None


def test_a_drafter_that_vllm_fetches_is_not_served_as_a_whole_model(target, tmp_path, monkeypatch):
    """Before vLLM has fetched it, there is no config.json to know it by."""
    drafter = make_random_drafter(tmp_path / "d")
    monkeypatch.setattr(checks, "drafter_folder", lambda model, revision: None)
    with pytest.raises(ValueError, match=r"method is 'draft_model' .* is a DFlash drafter"):
        configure(target, drafter, method=None)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (8, "num_speculative_tokens is 8: .* Set num_speculative_tokens to 7 or less"),
        (0, "greater than 0"),
    ],
)
def test_a_number_of_tokens_that_no_block_holds_is_refused(target, tmp_path, k, message):
    """Zero never reaches us: vLLM refuses it, naming the field."""
    with pytest.raises(ValueError, match=message) as raised:
        configure(target, make_random_drafter(tmp_path / "dflash"), k=k)
    assert "num_speculative_tokens" in str(raised.value)


@pytest.mark.parametrize(
    ("room", "least"), [({"max_num_batched_tokens": 8}, 9), ({"max_num_scheduled_tokens": 1}, 2)]
)
def test_steps_without_room_to_verify_a_draft_are_refused(target, tmp_path, room, least):
    """Each step scheduled one token of a request, and drafted a block that nobody verified: right
    text, drafting for nothing, and not a word."""
    drafter, (name,) = make_random_drafter(tmp_path / "dflash"), room
    with pytest.raises(ValueError, match=f"{name} is .*no room to verify") as raised:
        configure(target, drafter, max_num_seqs=1, enable_chunked_prefill=True, **room)
    assert f"set {name} to" in str(raised.value)
    configure(target, drafter, max_num_seqs=1, enable_chunked_prefill=True, **{name: least})


def test_eager_is_advised_once_on_a_cpu(target, tmp_path, monkeypatch):
    """Compiled, an engine on a CPU is slower to start and to decode, and nothing said so."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv(_ADVISED, "")
    said: list[str] = []
    monkeypatch.setattr(checks.logger, "warning", lambda message, *_: said.append(message))
    speculative = {"method": "dflash", "model": str(make_random_drafter(tmp_path / "dflash"))}

    def advice(speculative_config: Any, **more: Any) -> int:
        said.clear()
        args = EngineArgs(
            model=str(target),
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            speculative_config=speculative_config,
        )
        for name, value in more.items():
            setattr(args, name, value)
        args.create_engine_config()
        return sum("--enforce-eager" in line for line in said)

    assert advice(None) == 0
    assert advice(speculative, enforce_eager=True) == 0
    assert [advice(speculative), advice(speculative)] == [1, 0]


def test_weights_are_looked_at_before_any_process_starts(target, tmp_path):
    drafter = make_random_drafter(tmp_path / "dflash")
    weights = drafter / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="fetch the checkpoint again"):
        configure(target, drafter)
    weights.unlink()
    with pytest.raises(ValueError, match="holds neither"):
        configure(target, drafter)


def test_a_whole_block_is_the_default(target, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    speculative = {"method": "dflash", "model": str(make_random_drafter(tmp_path / "dflash"))}
    config = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        speculative_config=speculative,
        max_model_len=MAX_MODEL_LEN,
    )
    assert config.create_engine_config().speculative_config.num_speculative_tokens == 7


def test_a_wrong_type_is_refused_with_a_remedy(target, tmp_path):
    """transformers refuses such a value too, later and without a remedy."""
    folder = make_random_drafter(tmp_path / "dflash")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"attention_bias": [1]}))
    with pytest.raises(ValueError, match=r"attention_bias is \[1\]: true or false.* came with"):
        configure(target, folder)


def test_installed_logits_processors_are_refused(tmp_path, monkeypatch):
    """vLLM applies logits processors of its entry point group to every request, and on the V1
    runner to none beside a drafter: the output was another than without one, and nothing said
    so."""
    check_logits_processors()
    folder = tmp_path / "banner-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: banner\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[vllm.logits_processors]\nbanner = banner:Processor\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        DrafterConfigError,
        match=r"banner \(banner:Processor\).*Uninstall them, serve without a drafter",
    ):
        check_logits_processors()


@pytest.mark.parametrize(
    ("v2", "on_cpu", "refused"),
    [
        (False, False, ("thinking_token_budget", "logprob_token_ids")),
        (True, False, ("logprob_token_ids",)),
        (False, True, ()),
    ],
)
def test_requests_that_vllms_own_verification_gets_wrong_are_refused(
    target, tmp_path, monkeypatch, v2, on_cpu, refused
):
    """On a GPU, where vLLM's rejection samplers verify: with the V1 runner a thinking budget is
    overshot, and with both log probabilities of chosen tokens are lost."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform
    from vllm_dflash.patches.request_params import PATCH

    config = SimpleNamespace(
        speculative_config=configure(
            target, make_random_drafter(tmp_path / "dflash")
        ).speculative_config,
        use_v2_model_runner=v2,
    )
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: on_cpu)
    validate = PATCH.replace(lambda self, params: "vLLM's")
    assert validate(SimpleNamespace(vllm_config=config), SamplingParams(temperature=0)) == "vLLM's"
    for field in ({"thinking_token_budget": 3}, {"logprob_token_ids": [5]}):
        (name,) = field
        remedy = "the server with VLLM_USE_V2_MODEL_RUNNER=1, or without a drafter"
        if name == "logprob_token_ids":
            remedy = "the server without a drafter, or leave the field out"
        for engine, expected in (
            (config, name in refused),
            (SimpleNamespace(speculative_config=None, use_v2_model_runner=v2), False),
        ):
            if expected:
                with pytest.raises(VLLMValidationError, match=remedy):
                    validate(SimpleNamespace(vllm_config=engine), SamplingParams(**field))
            else:
                assert (
                    validate(SimpleNamespace(vllm_config=engine), SamplingParams(**field))
                    == "vLLM's"
                )


def test_a_malformed_limit_of_drafts_is_refused_with_the_request(target, tmp_path, monkeypatch):
    """In the front end: in the engine core such an error would end the engine. So is a good one
    where nobody would keep to it."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm_dflash.patches.request_params import PATCH

    from vllm_dflash.plugin import patch_set

    drafter = make_random_drafter(tmp_path / "dflash")
    ours = SimpleNamespace(
        speculative_config=configure(target, drafter).speculative_config, use_v2_model_runner=False
    )
    none = SimpleNamespace(speculative_config=None, use_v2_model_runner=False)
    validate = PATCH.replace(lambda self, params: "vLLM's")

    def ask(said: Any, config: Any = ours) -> str:
        params = SamplingParams(extra_args={"dflash": said})
        return validate(SimpleNamespace(vllm_config=config), params)

    for said in ({"draft": False}, {"max_draft": 7}, '{"max_draft": 7}'):
        assert ask(said) == "vLLM's"
    for said in ({"max_draft": 8}, {"max_draft": True}, {"draft": 1}, "off", 3):
        with pytest.raises(VLLMValidationError, match=r"extra_args \(over HTTP.*\): dflash.*give"):
            ask(said)
        assert ask(said, none) == "vLLM's"
    monkeypatch.setattr(patch_set(), "fits", lambda patch: False)
    with pytest.raises(VLLMValidationError, match="leave dflash out"):
        ask({"draft": False})
    assert ask({"draft": True}) == "vLLM's"


@pytest.mark.vllm
def test_another_kind_of_speculators_is_named_where_k_is_missing(
    random_target: Path, tmp_path: Path
) -> None:
    """vLLM asked for num_speculative_tokens, as if the drafter were one of ours."""
    folder = make_random_drafter(tmp_path / "d")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"speculators_model_type": "eagle3"}))
    with pytest.raises(ValueError, match=r"speculators_model_type is 'eagle3', not one of dflash"):
        configure(random_target, folder, k=None)
    assert read_early(str(folder), None, 3) is None


def test_a_foreign_drafters_repeated_key_is_not_ours_to_judge(tmp_path: Path) -> None:
    """vLLM serves it by the last value, and did not any more beside this package."""
    for kind, key in (("speculators_model_type", '"eagle3"'), ("architectures", '["OtherModel"]')):
        (tmp_path / "config.json").write_text(f'{{"{kind}": {key}, "x": 1, "x": 2}}')
        assert read_early(str(tmp_path), None, 3) is None
    (tmp_path / "config.json").write_text('{"architectures": ["DFlashDraftModel"], "x": 1, "x": 2}')
    with pytest.raises(DrafterConfigError, match="gives the key 'x' twice"):
        read_early(str(tmp_path), None, 3)
