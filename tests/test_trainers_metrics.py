"""What the trainers log, by hand."""

import math

import pytest
import torch
from test_trainers_coefficient import table
from trainer_parts import grpo, prompts, random_lenvm

from lenvm_rl.trainers.metrics import critic_metrics


def test_explained_variance_of_equal_targets_is_not_a_number_but_rounding():
    mask = torch.ones(2, 3, dtype=torch.bool)
    values = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    # All returns are 0, up to the rounding of (0 - V) + V.
    returns = torch.tensor([[3e-9, 0.0, -3e-9], [0.0, 3e-9, 0.0]])
    metrics = critic_metrics(values, returns, mask, lambda sums: sums)
    assert math.isnan(metrics["critic/explained_variance"])
    # Var(error) = Var(target) / 4 for a critic that gets half of it.
    metrics = critic_metrics(values, 2 * values, mask, lambda sums: sums)
    assert metrics["critic/explained_variance"] == pytest.approx(0.75)


def test_the_page_lists_what_guided_rollouts_log(tmp_path):
    lines = []
    for guidance in (None, {"strength": 1.0}):
        trainer = grpo(tmp_path, lenvm=random_lenvm(), max_steps=1, rollout_guidance=guidance)
        trainer.train()
        trainer.evaluate(prompts(4))
        lines.append([set(entry) for entry in trainer.state.log_history])
    (plain, *_, plain_eval), (guided, *_, guided_eval) = lines
    assert guided - plain == table("Guided rollouts") and plain <= guided and plain_eval == guided_eval
