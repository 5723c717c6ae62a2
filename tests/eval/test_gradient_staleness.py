"""How far a policy has moved, and what that does to lambda below 1: by hand, and a run that goes on."""

import json
import math

import pytest
from test_gradient import GO, bandit

from eval.gradient import staleness
from eval.gradient.gradients import TokenBatch
from eval.gradient.staleness import FROM_RUN, REFITTED, StalenessArguments, divergence
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.sandbox import PolicySettings, fit_policy, sandbox_tokenizer
from lenvm_rl.sandbox.scripted import EOS, START, ScriptedPolicy


def test_divergence_by_hand():
    # One completion of four takes the short arm, as often as its chance says: the batches are the expectation.
    rows = [[EOS], [GO, EOS], [GO, EOS], [GO, EOS]]
    batches = [TokenBatch.from_rows([[START]] * 2, part, [True] * 2, [EOS]) for part in (rows[:2], rows[2:])]
    policy, base = (ScriptedPolicy.from_chain(bandit(chance)) for chance in (0.25, 0.5))
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert divergence(policy, base, batches, 1.0) == pytest.approx(expected, abs=1e-6)
    assert divergence(base, base, batches, 1.0) == 0.0
    # Twice as hot: logits are halved, chances go with their roots: 1 / (1 + sqrt(3)) of the short arm.
    hot = 1 / (1 + math.sqrt(3))
    expected = 0.25 * math.log(hot / 0.5) + 0.75 * math.log((1 - hot) / 0.5)
    assert divergence(policy, base, batches, 2.0) == pytest.approx(expected, abs=1e-3)


def test_policies_are_measured_with_both_models_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    small = {"hidden_size": 16, "num_heads": 2, "train_tokens": 3000}
    quiet = {"use_cpu": True, "disable_tqdm": True}
    base = fit_policy(str(tmp_path / "policy"), PolicySettings(**small), **quiet)
    model = LengthValueModel.from_backbone(base, gamma=0.9, tokenizer=sandbox_tokenizer())
    model.save_pretrained(tmp_path / "length_value_model")
    fit_policy(str(tmp_path / "drift" / "checkpoint-1"), PolicySettings(**small, seed=1), **quiet)
    record = {"policy": "policy", "length_value_model": "length_value_model", "trained": {}, "max_new_tokens": 8}
    (tmp_path / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(staleness, "REFIT_PROMPTS", 8)
    policies = [str(tmp_path / "policy"), str(tmp_path / "drift" / "checkpoint-1")]
    args = StalenessArguments(policies=policies, run_dir=str(tmp_path), num_batches=3, batch_size=4)
    rows = staleness.main(args)
    assert [row["policy"] for row in rows] == [policies[0]] * 2 + [policies[1]] * 2
    assert [row["model"] for row in rows] == [FROM_RUN, REFITTED] * 2
    # The discount is that of the run's model, so that all estimate one gradient.
    assert {row["gamma"] for row in rows} == {0.9}
    assert rows[0]["divergence"] == pytest.approx(0.0, abs=1e-5) and rows[2]["divergence"] > 0.1
    assert "checkpoint-1" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "staleness").glob("*.*")} == {
        f"staleness.{suffix}" for suffix in ("json", "csv", "png")
    }
    monkeypatch.setattr(staleness, "measure_policy", None)
    assert staleness.main(args) == rows
