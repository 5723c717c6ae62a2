"""Evaluation programs on scripted policies: lengths, truncation, grading, tables, and the run's record."""

import json
import sys

import numpy as np
import pytest
import torch

from eval.graded import read_run
from eval.seeds import collect
from eval.style_frontier import StyleFrontier
from eval.tradeoff.__main__ import main
from eval.tradeoff.arms import TradeoffArguments, truncate
from eval.tradeoff.report import summarise_arm
from eval.tradeoff.sampler import Arm, Sampler, value_scale
from lenvm_rl.decoding.generation import LengthGuidance
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.reward_functions import load_reward
from lenvm_rl.sandbox import PolicySettings, sandbox_tokenizer
from lenvm_rl.sandbox.policy import new_policy
from reward.sandbox import sandbox_reward

TOKENIZER = sandbox_tokenizer()


def ids(text):
    return TOKENIZER.convert_tokens_to_ids(text.split())


def sampler(**changes):
    settings = {
        "tokenizer": TOKENIZER,
        "length_value_model": None,
        "prompts": ["3 a +1 ?", "2 b *2 ?"],
        "columns": {"answer": ["4", "4"]},
        "reward": sandbox_reward,
        "num_samples": 2,
        "max_new_tokens": 6,
        "batch_size": 4,
        "guidance": LengthGuidance(),
        "seed": 0,
    }
    return Sampler(**{**settings, **changes})


def base_arm():
    # Lengths without end-of-sequence: 2, 4, 6 (never ended), 5; the last is wrong.
    texts = ["A 4 <eos>", "a 4 A 4 <eos>", "wait wait wait wait wait wait", "b 4 wait A 3 <eos>"]
    completions = [ids(text) for text in texts]
    finished = np.array([True, True, False, True])
    lengths = np.array([2, 4, 6, 5])
    rows = [0, 0, 1, 1]
    correct, _ = sampler().grade(completions, rows)
    return Arm("base", "base", float("nan"), completions, lengths, finished, correct, np.array(rows))


def test_grading_uses_each_completions_own_prompt():
    assert base_arm().correct.tolist() == [True, True, False, False]
    correct, graded = sampler(columns={"answer": ["4", "3"]}).grade(base_arm().completions, [0, 1, 1, 1])
    assert correct.tolist() == [True, False, False, True] and graded.all()


@pytest.mark.parametrize(
    "budget, lengths, finished, correct",
    [
        (2, [2, 2, 2, 2], [True, False, False, False], [True, False, False, False]),
        (4, [2, 4, 4, 4], [True, True, False, False], [True, True, False, False]),
        (6, [2, 4, 6, 5], [True, True, False, True], [True, True, False, False]),
    ],
)
def test_truncation_cuts_to_the_budget_in_the_same_length(budget, lengths, finished, correct):
    arm = truncate(sampler(), base_arm(), "cut", budget)
    assert arm.lengths.tolist() == lengths
    assert arm.finished.tolist() == finished
    assert arm.correct.tolist() == correct
    assert all(len(row) - end == length for row, end, length in zip(arm.completions, finished, lengths, strict=True))


def test_summary_by_hand():
    row = summarise_arm(base_arm(), None, None, seed=0)
    assert row["tokens"]["estimate"] == pytest.approx(17 / 4)
    assert row["accuracy"]["estimate"] == pytest.approx(0.5)
    assert row["tokens_correct"]["estimate"] == pytest.approx(3.0)
    assert row["unfinished"] == pytest.approx(0.25)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of an untrained policy: everything that `eval.tradeoff` reads."""
    folder = tmp_path_factory.mktemp("run")
    policy = new_policy(PolicySettings(hidden_size=16, num_layers=1), TOKENIZER).eval()
    policy.save_pretrained(folder / "policy")
    TOKENIZER.save_pretrained(folder / "policy")
    LengthValueModel.from_backbone(policy, gamma=0.9, tokenizer=TOKENIZER).save_pretrained(folder / "lenvm")
    paths = {"policy": str(folder / "policy"), "length_value_model": str(folder / "lenvm")}
    (folder / "run.json").write_text(json.dumps({**paths, "trained": {"same": paths["policy"]}, "data": {}}))
    return folder


def test_sampled_arms_obey_strength_zero_and_the_limit(run_dir):
    policy = new_policy(PolicySettings(hidden_size=16, num_layers=1), TOKENIZER).eval()
    model = LengthValueModel.from_pretrained(run_dir / "lenvm").freeze()
    made = sampler(length_value_model=model, num_samples=8)
    base, again = made.sample("base", "base", policy), made.sample("again", "trained", policy)
    assert base.completions == again.completions
    assert len(base.completions) == 16 and sorted(set(base.prompt.tolist())) == [0, 1]
    assert base.lengths.max() <= 6 and (base.lengths[~base.finished] == 6).all()
    tilted = made.sample("tilt", "tilt", policy, strength=1e6)
    # With all the weight on V, the end (value 0) is chosen at once.
    assert tilted.lengths.tolist() == [0] * 16 and tilted.finished.all()


def test_value_scale_is_the_standard_deviation_over_states(run_dir):
    model = LengthValueModel.from_pretrained(run_dir / "lenvm").freeze()
    prompt, completion = ids("3 a +1 ?"), ids("A 4 <eos>")
    with torch.no_grad():
        values = model(input_ids=torch.tensor([prompt + completion])).values[0]
    states = values[len(prompt) - 1 : -1]
    assert value_scale(model, [prompt], [completion]) == pytest.approx(float(states.std()), rel=1e-4)


def test_tradeoff_writes_table_json_and_figure(run_dir, capsys):
    # An untrained policy writes no clean style, so there is no frontier: a dataset of one's own has none either.
    prompts = run_dir / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "3 a +1 ?", "answer": "4", "n": n}) + "\n" for n in range(8)))
    args = TradeoffArguments(
        run_dir=str(run_dir),
        dataset_name=str(prompts),
        num_prompts=8,
        num_samples=2,
        max_new_tokens=8,
        strengths=[1.0],
        budget_quantiles=[0.5],
        tilt=["base", "same"],
    )
    rows = main(args)
    assert [row["kind"] for row in rows] == ["base", "truncation", "tilt", "trained", "tilt of same"]
    report = json.loads((run_dir / "tradeoff" / "tradeoff.json").read_text())
    assert report["arms"][0]["tokens"] == rows[0]["tokens"] == rows[3]["tokens"]
    assert (run_dir / "tradeoff" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens if correct" in capsys.readouterr().out
    assert rows[2]["tokens"] == rows[4]["tokens"]
    arms = {arm["name"]: arm for arm in collect([str(run_dir), str(run_dir)])}
    assert arms["base"]["tokens"] == dict.fromkeys(("estimate", "low", "high"), rows[0]["tokens"]["estimate"])


def test_a_missing_run_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="run.json.*--run_dir"):
        read_run(TradeoffArguments(run_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="eval.tradeoff"):
        collect([str(tmp_path)])


@pytest.mark.parametrize(
    "path", ["sandbox_reward", "reward.nowhere.sandbox_reward", "reward.sandbox.nothing", "reward.sandbox"]
)
def test_a_wrong_reward_path_is_named(path):
    with pytest.raises(ValueError, match=path):
        load_reward(path)


def test_rewards_are_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text(
        "def always(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward("my_own_rewards.always")(completions=[1, 2]) == [1.0, 1.0]


def test_a_models_own_repetition_penalty_acts_in_no_arm(run_dir):
    model = LengthValueModel.from_pretrained(run_dir / "lenvm").freeze()
    made = sampler(length_value_model=model, num_samples=8)
    policy = new_policy(PolicySettings(hidden_size=16, num_layers=1), TOKENIZER).eval()
    plain = made.sample("plain", "base", policy)
    policy.generation_config.repetition_penalty = 5.0
    assert made.sample("penalised", "base", policy).completions == plain.completions


def test_excess_is_what_lies_above_the_floor():
    frontier = StyleFrontier.from_points({1: {"direct": (3.0, 1.0)}})
    row = summarise_arm(base_arm(), frontier, [1, 1], seed=0)
    # Lengths 2, 4, 6, 5 over a floor of 3: 0 + 1 + 3 + 2. Too short does not make up for too long.
    assert row["excess_tokens"]["estimate"] == pytest.approx(6 / 4)


def test_a_run_on_ones_own_data_is_never_put_to_sandbox_prompts(run_dir, tmp_path):
    run = json.loads((run_dir / "run.json").read_text())
    run["data"] = {"dataset_name": "questions.jsonl", "prompt_column": "question", "chat": True}
    (tmp_path / "run.json").write_text(json.dumps({**run, "temperature": 0.5, "max_new_tokens": 9}))
    with pytest.raises(ValueError, match="questions.jsonl.*--dataset_name"):
        read_run(TradeoffArguments(run_dir=str(tmp_path)))
    prompts = tmp_path / "test.jsonl"
    prompts.write_text('{"question": "q", "answer": "4"}\n')
    args, _ = read_run(TradeoffArguments(run_dir=str(tmp_path), dataset_name=str(prompts)))
    data = args.load_prompts(5)
    assert data.prompts == [[{"role": "user", "content": "q"}]] and data.columns == {"answer": ["4"]}
    assert (args.temperature, args.max_new_tokens) == (0.5, 9)
