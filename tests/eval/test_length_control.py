"""Length control on scripted policies: prompts, cells, resumption, and the report."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import DATA
from tiny import tiny_length_value_model, tiny_llama, tiny_tokenizer

from eval.length_control.__main__ import LengthControlArguments, main
from eval.length_control.prompts import read_tasks, split_off_length, with_length
from eval.length_control.report import length_deviation, length_score, repetition_rate, summarise_cell
from eval.length_control.sampler import ARMS, Completion, LengthSampler, cell_completions, completion_nll
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.sandbox import PolicySettings, sandbox_tokenizer
from lenvm_rl.sandbox.policy import new_policy
from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    countdown_chain,
    geometric_chain,
)

LIFEBENCH = DATA / "lifebench"
MODES = ["equal_to", "at_most", "at_least"]


# Prompts


@pytest.mark.parametrize(
    ("template", "instruction"),
    [
        ("[Instruction] Go on.\n\n[Requirement] The piece must be {word_count_type} {word_count} words long.",
         "[Instruction] Go on."),
        ("Summary: a. b.\n\n[Requirement] Write an article. It must be {word_count_type} {word_count} words long.",
         "Summary: a. b.\n\n[Requirement] Write an article."),
        ("[Requirement] Expand on this story, The version must be {word_count_type} {word_count} words long.",
         "[Requirement] Expand on this story."),
        ("[指令]如何提臀 \n\n[要求]你的回答字数必须{word_count_type} {word_count}字。", "[指令]如何提臀"),
        ("[要求]请你写主体内容，字数必须{word_count_type} {word_count}字。", "[要求]请你写主体内容。"),
    ],
)  # fmt: skip
def test_the_length_requirement_goes_and_the_rest_stays(template, instruction):
    assert split_off_length(template) == instruction


def test_lengths_are_asked_for_in_tokens():
    assert with_length("Go.", "en", "equal_to", 64) == "Go.\nYour answer must be equal to 64 tokens."
    assert with_length("Go.", "en", "at_most", 8).endswith("must be at most 8 tokens.")
    assert with_length("Go.", "en", "at_least", 8).endswith("must be at least 8 tokens.")
    chinese = [with_length("去。", "zh", mode, 32).split("\n")[1] for mode in MODES]
    assert chinese == [
        "你的回答必须等于 32 个 token。",
        "你的回答必须至多有 32 个 token。",
        "你的回答必须至少有 32 个 token。",
    ]


@pytest.mark.parametrize(
    "template",
    ["Translate it. It must be equal to 16 words.", "{word_count_type} {word_count} words.", "Go. {word_count}"],
)
def test_a_task_without_blanks_or_without_anything_else_is_refused(template):
    with pytest.raises(ValueError, match="task"):
        split_off_length(template)


def write_tasks(path):
    rows = [
        ("1", "create", "en", "w6 w7. It must be {word_count_type} {word_count} words long."),
        ("2", "create", "en", "w8 w9. It must be {word_count_type} {word_count} words long."),
        ("3", "qa", "en", "w10 w11 w12. It must be {word_count_type} {word_count} words long."),
        ("4", "qa", "cn", "w13 \u2028 w14\n\n[要求]字数必须{word_count_type} {word_count}字。"),
    ]
    lines = [
        json.dumps(dict(zip(("id", "category", "lang", "task"), row, strict=True)), ensure_ascii=False) for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_tasks_are_taken_by_turns(tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl")
    assert [task.name for task in read_tasks(path, ["en", "zh"])] == ["1", "3", "4", "2"]
    assert [task.name for task in read_tasks(path, ["en"], 2)] == ["1", "3"]
    assert read_tasks(path, ["en"], max_characters=10_000) == read_tasks(path, ["en"])
    with pytest.raises(ValueError, match="has no tasks"):
        read_tasks(path, ["en"], max_characters=3)
    assert read_tasks(path, ["zh"])[0].instruction == "w13 \u2028 w14"
    with pytest.raises(ValueError, match="num_prompts=5"):
        read_tasks(path, ["en", "zh"], 5)
    with pytest.raises(ValueError, match="languages"):
        read_tasks(path, ["de"])


@pytest.mark.skipif(
    not LIFEBENCH.is_dir(), reason=f"LIFEBench is not at {LIFEBENCH}: set LENVM_RL_DATA to a folder with it"
)
@pytest.mark.parametrize(("name", "rows"), [("data_lite_no_summary", 55), ("data_no_summary", 320), ("data_label", 60)])
def test_every_published_task_gives_an_instruction_without_a_length(name, rows):
    tasks = read_tasks(str(LIFEBENCH / f"{name}.jsonl"), ["en", "zh"])
    assert len(tasks) == rows
    assert not any(re.search(r"\[(Requirement|要求)\]\s*$|[,，]$", task.instruction) for task in tasks)
    assert not any("word_count" in task.instruction or "words long" in task.instruction[-60:] for task in tasks)


# Cells


def sampler(chain, targets=(5, 12), prompts=6, **changes):
    settings = {
        "policy": ScriptedPolicy.from_chain(chain),
        "length_value_model": ScriptedLengthValue.from_chain(chain, 0.97),
        "prompt_ids": [[START]] * prompts,
        "asked_ids": {(mode, target): [[START, START]] * prompts for mode in MODES for target in targets},
        "caps": {target: target + 40 for target in targets},
        # What the chain never chooses is no candidate: its probability is not exactly 0 in the model that plays it.
        "candidates": LengthGuidance(min_p=1e-6),
        "rule": "feasible",
        "tolerance": None,
        "eos_token_ids": [EOS],
        "pad_token_id": PAD,
        "num_samples": 1,
        "batch_size": 7,
        "seed": 0,
    }
    return LengthSampler(**{**settings, **changes})


def lengths(completions, mode, target, arm="guided"):
    return [one.length for one in cell_completions(completions, arm, mode, target, target + 40)]


@pytest.mark.parametrize("rule", ["paper", "feasible"])
def test_where_the_rest_is_certain_every_mode_is_met_in_one_batch(tmp_path, rule):
    made = sampler(countdown_chain([1 / 30] * 30), rule=rule, tolerance=0.0 if rule == "feasible" else None)
    plan = made.plan(["guided"], MODES)
    assert [[request.mode for request in batch] for batch in plan][0] == ["equal_to"] * 6 + ["at_most"]
    found = made.run(["guided"], MODES, tmp_path / "journal", "test")
    assert len(found) == 2 * 3 * 6
    for target in (5, 12):
        assert lengths(found, "equal_to", target) == [target] * 6
        below, above = lengths(found, "at_most", target), lengths(found, "at_least", target)
        assert all(length <= target for length in below) and all(length >= target for length in above)
        # The paper's rule takes the shortest and the longest there is; the other leaves the choice to the policy.
        assert (set(below) == {1} and set(above) == {30}) == (rule == "paper")
    assert all(one.natural and one.forced == 0 for one in found)


def test_enforcement_is_seen_and_its_ends_are_not_natural(tmp_path):
    made = sampler(geometric_chain(0.05), rule="paper")
    found = made.run(["guided", "enforced"], ["equal_to", "at_least"], tmp_path / "journal", "test")
    for target in (5, 12):
        assert lengths(found, "equal_to", target, "enforced") == [target] * 6
        assert all(length >= target for length in lengths(found, "at_least", target, "enforced"))
        # With one value everywhere the unforced rule cannot see how far the end is.
        assert lengths(found, "equal_to", target) != [target] * 6
    ends = [one for one in found if one.arm == "enforced" and one.mode == "equal_to"]
    assert all(one.forced > 0 and not one.natural and one.finished for one in ends)
    assert all(one.forced == 0 and one.natural == one.finished for one in found if one.arm == "guided")


def test_a_completion_that_reaches_the_cap_is_kept_at_its_cut_length(tmp_path):
    made = sampler(countdown_chain([0.0] * 29 + [1.0]), caps={5: 9, 12: 30})
    found = made.run(["base", "prompt"], MODES, tmp_path / "journal", "test")
    # Always 30 tokens and the end: one too many for either cap.
    for arm in ("base", "prompt"):
        for target, cap in ((5, 9), (12, 30)):
            cell = cell_completions(found, arm, "equal_to", target, cap)
            assert [(one.length, one.finished, one.natural) for one in cell] == [(cap, False, False)] * 6
    # The base arm is sampled once, with the largest cap.
    assert sum(one.arm == "base" for one in found) == 6 and sum(one.arm == "prompt" for one in found) == 36


def test_a_cut_counts_the_end():
    whole = Completion("base", 0, 0, None, None, [7, 8, EOS], True, 0, [1.0, 2.0, 3.0])
    assert whole.cut(3) == whole and (whole.length, whole.text_ids) == (2, [7, 8])
    assert whole.cut(2) == replace(whole, ids=[7, 8], nll=[1.0, 2.0], finished=False)
    empty = replace(whole, ids=[EOS], nll=[3.0])
    assert (empty.length, empty.text_ids, empty.natural) == (0, [], True)


def test_the_cost_of_a_text_is_the_base_policys_without_the_instruction(tmp_path):
    chain = geometric_chain(0.25)
    found = sampler(chain, candidates=LengthGuidance(top_k=2, min_p=1e-6, temperature=2.0)).run(
        ["guided+prompt"], ["at_most"], tmp_path / "journal", "test"
    )
    word, end = -math.log(0.75 / 4), -math.log(0.25)
    for one in found:
        assert one.nll == pytest.approx([word] * one.length + [end] * one.finished, abs=1e-4)

    policy = tiny_llama()
    prompts, completions = [[7, 8, 9], [10, 11]], [[20, 21, 22, EOS], [30]]
    batched = completion_nll(policy, prompts, completions)
    for prompt, completion, costs in zip(prompts, completions, batched, strict=True):
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = -logits.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        assert costs == pytest.approx(expected.tolist(), abs=2e-4)


def test_a_run_that_was_killed_ends_as_an_unbroken_one(tmp_path):
    chain = geometric_chain(0.1)
    whole = sampler(chain).run(list(ARMS), MODES, tmp_path / "whole", "test")
    path = tmp_path / "broken"
    lines = (tmp_path / "whole").read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:40])
    resumed = sampler(chain)
    sampled = []
    original = resumed.sample
    resumed.sample = lambda batch, seed: sampled.append(batch) or original(batch, seed)
    assert resumed.run(list(ARMS), MODES, path, "test") == whole
    assert len(sampled) == len(lines) - 2 - 4
    for changed, identity in ((sampler(chain, seed=1), "test"), (sampler(chain), "other weights")):
        with pytest.raises(ValueError, match="other prompts or settings"):
            changed.run(list(ARMS), MODES, path, identity)


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Prompt 0"):
        sampler(geometric_chain(0.1), policy=tiny_llama(), prompt_ids=[[7] * 500]).plan(["base"], MODES)


# The report


def test_deviation_by_hand():
    assert length_deviation([0, 16, 32, 48, 96], 32).tolist() == [-1.0, -0.5, 0.0, 0.5, 2.0]
    assert length_deviation([10, 10], [20, 5]).tolist() == [-0.5, 1.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Lengths 0, 24, 30, 32, 40, 64 for a target of 32: LD is -1, -1/4, -1/16, 0, 1/4, 1.
        ("equal_to", [0.6738, 28.6505, 73.1616, 100.0, 60.6531, 13.5335]),
        ("at_most", [100.0, 100.0, 100.0, 100.0, 60.6531, 13.5335]),
        ("at_least", [0.6738, 28.6505, 73.1616, 100.0, 100.0, 100.0]),
    ],
)
def test_scores_by_hand(mode, expected):
    np.testing.assert_allclose(length_score([0, 24, 30, 32, 40, 64], 32, mode), expected, atol=1e-4)


def test_too_short_costs_more_than_too_long():
    short, long = length_score([90, 110], 100, "equal_to")
    assert short == pytest.approx(100 * math.exp(-0.5)) and long == pytest.approx(100 * math.exp(-0.2))


@pytest.mark.parametrize(("lengths", "target"), [([3], 0), ([-1], 5)])
def test_impossible_lengths_are_refused(lengths, target):
    with pytest.raises(ValueError, match="target"):
        length_deviation(lengths, target)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode"):
        length_score([3], 3, "tilt")


def test_repetition_by_hand():
    # 4-grams of abcabcab: abca bcab cabc abca bcab; two of five stood there before.
    assert repetition_rate([1, 2, 3, 1, 2, 3, 1, 2]) == pytest.approx(2 / 5)
    assert repetition_rate([7] * 10, n=1) == pytest.approx(0.9)
    assert repetition_rate([1, 2, 3, 4]) == 0.0
    assert repetition_rate([1, 1, 1]) == repetition_rate([]) == 0.0


def test_summary_by_hand():
    def one(prompt, ids, finished, nll, forced=0):
        return Completion("enforced", prompt, 0, "equal_to", 4, ids, finished, forced, nll)

    cell = [
        one(0, [5, 6, 7, 8, EOS], True, [1.0, 1.0, 1.0, 1.0, 2.0]),
        one(1, [5, 5, 5, 5, EOS], True, [3.0, 3.0, 3.0, 3.0, 4.0], forced=1),
        one(2, [EOS], True, [6.0]),
        one(3, [5, 5, 5, 5, 5, 5, 5, 5], False, [0.5] * 8),
    ]
    row = summarise_cell(cell, [4] * 4, "equal_to", [True, False, False, False])
    assert (row["completions"], row["empty"], row["unfinished"], row["forced_steps"]) == (4, 1, 0.25, 0.25)
    estimates = {name: value["estimate"] for name, value in row.items() if isinstance(value, dict)}
    # LD is 0, 0, -1, 1.
    assert estimates["length_score"] == pytest.approx((200 + 100 * math.exp(-5) + 100 * math.exp(-2)) / 4)
    assert estimates["deviation_percent"] == 50 and estimates["tokens"] == 4 and estimates["accuracy"] == 0.25
    # One end was put, one completion was cut.
    assert estimates["natural"] == 0.5
    assert estimates["perplexity"] == pytest.approx(math.exp((4 * 1 + 4 * 3 + 8 * 0.5) / 16))
    assert estimates["nll"] == pytest.approx((1 + 3 + 0.5) / 3) and estimates["end_nll"] == pytest.approx(4)
    # 5555 has one 4-gram, 55555555 five alike.
    assert estimates["repetition"] == pytest.approx(0.8 / 4)
    nothing = summarise_cell([cell[2]], [4], "at_most")
    assert (nothing["perplexity"], nothing["nll"], nothing["accuracy"]) == (None, None, None)
    assert nothing["length_score"]["estimate"] == 100


def save_models(folder, policy, tokenizer):
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    model = tiny_length_value_model(policy, 0.9, tokenizer=tokenizer)
    model.save_pretrained(folder / "lenvm")
    return {"policy": str(folder / "policy"), "length_value_model": str(folder / "lenvm")}


def test_a_dataset_is_compared_and_everything_written(tmp_path, capsys):
    paths = save_models(tmp_path, tiny_llama(), tiny_tokenizer(chat=True))
    args = LengthControlArguments(
        **paths,
        dataset_name=write_tasks(tmp_path / "tasks.jsonl"),
        arms=["base", "prompt", "guided", "enforced+prompt"],
        modes=["equal_to", "at_least"],
        targets=[4, 8],
        cap_extra=6,
        output_dir=str(tmp_path / "out"),
    )
    report = main(args)
    # Modes x (targets and all of them) x arms x (two languages and both).
    assert len(report["cells"]) == 2 * 3 * 4 * 3
    by_key = {(row["arm"], row["mode"], row["target"], row["language"]): row for row in report["cells"]}
    assert by_key["base", "at_least", "all", "all"]["completions"] == 8
    assert by_key["base", "at_least", 4, "en"]["completions"] == 3
    assert by_key["enforced+prompt", "equal_to", 8, "zh"]["length_score"]["estimate"] == 100
    assert report["caps"] == {4: 10, 8: 16}
    written = json.loads((tmp_path / "out" / "length_control.json").read_text())
    assert written["cells"] == report["cells"]
    table = list(csv.DictReader((tmp_path / "out" / "length_control.csv").open()))
    assert float(table[0]["length_score"]) == report["cells"][0]["length_score"]["estimate"]
    assert (tmp_path / "out" / "length_control.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out" / "completions.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
    assert len(lines) == 4 + 3 * 2 * 2 * 4
    assert "deviation" in capsys.readouterr().out
    # Once more: nothing is sampled again, and a model that was trained on is not taken for the old one.
    assert main(args)["cells"] == report["cells"]
    LengthValueModel.from_backbone(tiny_llama(), gamma=0.9, tokenizer=tiny_tokenizer()).save_pretrained(
        tmp_path / "lenvm"
    )
    with pytest.raises(ValueError, match="other prompts or settings"):
        main(args)


def test_the_sandbox_is_the_default_and_answers_are_graded(tmp_path):
    tokenizer = sandbox_tokenizer()
    policy = new_policy(PolicySettings(hidden_size=16, num_layers=1), tokenizer).eval()
    paths = save_models(tmp_path, policy, tokenizer)
    (tmp_path / "run.json").write_text(
        json.dumps({"policy": "policy", "length_value_model": paths["length_value_model"]})
    )
    report = main(
        LengthControlArguments(run_dir=str(tmp_path), num_prompts=8, targets=[4], cap_extra=4, rule="paper", seed=1)
    )
    assert [row["arm"] for row in report["cells"][:2]] == ["base", "guided"]
    assert all(row["accuracy"] is not None and row["language"] == "all" for row in report["cells"])
    assert (tmp_path / "length_control" / "length_control.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": [0]}, "targets"),
        ({"targets": [8, 8]}, "targets"),
        ({"modes": ["tilt"]}, "modes"),
        ({"rule": "soft"}, "rule"),
        ({"arms": ["guided+prompt"]}, "arms"),
        ({"arms": ["best"]}, "arms"),
        ({"cap_extra": 0}, "cap_extra"),
    ],
)
def test_arguments_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        LengthControlArguments(**fields)


def test_a_missing_run_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="run_dir"):
        main(LengthControlArguments(run_dir=str(tmp_path)))
