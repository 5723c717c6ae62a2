"""Laws of the GRPO trainer: stock at zero, hand-worked advantages, gates, shaping, truncation, tools, frozen."""

import json

import pytest
import torch
from tiny import EOS, tiny_llama, tiny_tokenizer
from trainer_parts import (
    GAMMA,
    VOCAB,
    batch_of,
    counts_of_w8,
    first_is_w8,
    grpo,
    logged,
    no_reward,
    prompts,
    random_lenvm,
    same_weights,
    scripted,
    scripted_lenvm,
    settings,
    weights,
)
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.advantages import length_advantage
from lenvm_rl.trainers import LenVMGRPOTrainer
from lenvm_rl.trainers.streams import Completions, Outcomes, Processes, centered_gated_advantage

# One group: two that finish, one that is cut at three tokens, one more that finishes. Values by the last token read.
COMPLETIONS = [[8, 9, EOS], [8, EOS], [9, 9, 9], [10, EOS]]
VALUES = {6: -0.6, 8: -0.5, 9: -0.75, 10: -0.25}
REWARDS = [1.0, 0.0, 1.0, 0.0]
TASK = torch.tensor([0.5, -0.5, 0.5, -0.5]).unsqueeze(1)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
# gamma 1/2: the returns are -.875, -.75, -.5; of the cut row -1 + 1/8 * 1/4, -1 + 1/4 * 1/4, -1 + 1/2 * 1/4.
LENGTH = torch.tensor([[-0.275, -0.25, 0.25], [-0.15, 0, 0], [-0.36875, -0.1875, -0.125], [-0.15, -0.25, 0]])


def scripted_grpo(folder, completions=COMPLETIONS, rewards=REWARDS, tool_masks=None, lenvm=None, **changes):
    def reward(completions, **kwargs):
        return list(rewards)

    changes = {"per_device_train_batch_size": len(completions), "num_generations": len(completions), **changes}
    return grpo(
        folder,
        reward,
        lenvm or scripted_lenvm(VALUES),
        trainer=scripted(LenVMGRPOTrainer, completions, tool_masks),
        # Every prompt ends in w6, the token that the first value is read at.
        data=prompts(1),
        **{"max_completion_length": 3, "scale_rewards": "none", **changes},
    )


@pytest.fixture(autouse=True)
def _prompts_end_in_w6(request):
    assert tiny_tokenizer(VOCAB)(prompts(1)[0]["prompt"])["input_ids"] == [6, 6]


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "grpo"])
def test_zero_coefficients_are_stock_grpo_bit_for_bit(tmp_path, loss_type):
    changes = {"loss_type": loss_type, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    stock = GRPOTrainer(
        tiny_llama(VOCAB, seed=1),
        counts_of_w8,
        GRPOConfig(**settings(tmp_path / "stock", **changes)),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(VOCAB),
    )
    before = weights(stock.model)
    stock.train()
    ours = grpo(tmp_path / "ours", lenvm=random_lenvm(), **changes)
    ours.train()
    # The gate never opens: advantages per token whose second stream is exactly 0.
    closed = grpo(tmp_path / "closed", lenvm=random_lenvm(), length_coef=3.0, gate_threshold=9.0, **changes)
    closed.train()
    for trainer in (ours, closed):
        for key in ("loss", "grad_norm", "reward", "entropy"):
            assert logged(trainer, key) == logged(stock, key)
        assert same_weights(weights(trainer.model), weights(stock.model))
    assert not same_weights(weights(stock.model), before)


def test_hand_worked_advantages(tmp_path):
    trainer = scripted_grpo(tmp_path, length_coef=2.0, length_gate="all")
    torch.testing.assert_close(batch_of(trainer)["advantages"], (TASK + 2.0 * LENGTH) * MASK)


def test_hand_worked_advantages_at_lambda_one_half(tmp_path):
    # Residuals: -.15 -.375 .25 | -.15 0 | -.275 -.125 -.125 | -.025 -.25, plus a quarter of the advantage after each.
    expected = torch.tensor(
        [[-0.228125, -0.3125, 0.25], [-0.15, 0, 0], [-0.3140625, -0.15625, -0.125], [-0.0875, -0.25, 0]]
    )
    trainer = scripted_grpo(tmp_path, length_coef=2.0, length_gate="all", length_lam=0.5)
    torch.testing.assert_close(batch_of(trainer)["advantages"], (TASK + 2.0 * expected) * MASK)


def test_the_gate_opens_for_correct_completions_only(tmp_path):
    trainer = scripted_grpo(tmp_path, length_coef=2.0, length_gate="correct")
    expected = TASK + 2.0 * LENGTH * torch.tensor(REWARDS).unsqueeze(1)
    torch.testing.assert_close(batch_of(trainer)["advantages"], expected * MASK)


def test_the_gate_reads_the_raw_reward_of_the_function_it_names(tmp_path):
    def correct(completions, **kwargs):
        return [0.0, 1.0, None, 0.4]

    def pleasant(completions, **kwargs):
        return [5.0, 0.0, 5.0, 5.0]

    rewards = [pleasant, correct]
    trainer = grpo(
        tmp_path, rewards, scripted_lenvm(VALUES), trainer=scripted(LenVMGRPOTrainer, COMPLETIONS), data=prompts(1),
        max_completion_length=3, per_device_train_batch_size=4, scale_rewards="none", reward_weights=[1.0, 0.1],
        length_coef=2.0, gate_reward="correct",
    )  # fmt: skip
    weighted = torch.tensor([5.0, 0.1, 5.0, 5.04])
    task = (weighted - weighted.mean()).unsqueeze(1)
    gate = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    torch.testing.assert_close(batch_of(trainer)["advantages"], (task + 2.0 * LENGTH * gate) * MASK)


def test_centred_gate_by_hand(tmp_path):
    # Correct: the first two. D_L is -.275 and -.15, each centred on the other; p is 1/3 for them and 2/3 for the rest.
    # D_t of the tokens before: 0 -.15 -.3375 | 0 -.15 | 0 -.275 -.3375 | 0 -.025.
    trainer = scripted_grpo(tmp_path, rewards=[1, 1, 0, 0], length_coef=1.0, length_gate_center=True)
    expected = torch.tensor(
        [
            [-0.125, -0.125 + 0.05, -0.125 + 0.1125],
            [0.125, 0.125 + 0.05, 0.0],
            [0.0, 0.55 / 3, 0.225],
            [0.0, 0.05 / 3, 0.0],
        ]
    )
    task = torch.tensor([0.5, 0.5, -0.5, -0.5]).unsqueeze(1)
    torch.testing.assert_close(batch_of(trainer)["advantages"], (task + expected) * MASK)


def test_centred_gate_with_a_single_correct_completion_has_only_the_baseline(tmp_path):
    trainer = scripted_grpo(tmp_path, rewards=[1, 0, 0, 0], length_coef=1.0, length_gate_center=True)
    task = torch.tensor([0.75, -0.25, -0.25, -0.25]).unsqueeze(1)
    stream = batch_of(trainer)["advantages"] - task * MASK
    torch.testing.assert_close(stream[0], torch.zeros(3))
    torch.testing.assert_close(stream[1], torch.tensor([0.0, 0.05, 0.0]))


@pytest.mark.parametrize("value", [-0.2, -0.8])
@pytest.mark.parametrize("cut_is_correct", [1.0, 0.0])
def test_a_centred_gate_knows_nothing_of_completions_that_are_left_out(tmp_path, value, cut_is_correct):
    """Three correct completions of one length are paid the same, whatever a constant V says: nothing, with or without a
    fourth that was cut and masked."""
    kept = [[8, 9, EOS]] * 3
    trainer = grpo(
        tmp_path, lambda completion_ids, **kwargs: [1.0] * 3 + [cut_is_correct], scripted_lenvm({}, default=value),
        trainer=scripted(LenVMGRPOTrainer, [*kept, [8, 9, 9]]), data=prompts(1), max_completion_length=3,
        per_device_train_batch_size=4, scale_rewards="none", length_coef=1.0, length_gate_center=True,
        mask_truncated_completions=True,
    )  # fmt: skip
    batch = batch_of(trainer)
    task = torch.tensor([1.0, 1.0, 1.0, cut_is_correct])
    task = (task - task.mean()).unsqueeze(1)
    stream = (batch["advantages"] - task)[:3]
    # D_0 is the same for all three, so centred it is 0; what follows is less its mean, 1 times D_t.
    assert torch.equal(stream, stream[:1].expand(3, -1)) and stream[0, 0].abs() < 1e-7
    assert not batch["completion_mask"][3].any()


# A policy over three tokens (one ends), at most three tokens, all completions enumerated.
def enumerated():
    rows, open_rows = [], [()]
    while open_rows:
        prefix = open_rows.pop()
        rows.append((*prefix, 2))
        if len(prefix) < 2:
            open_rows += [(*prefix, 0), (*prefix, 1)]
    states = sorted({row[:t] for row in rows for t in range(len(row))})
    mask = torch.tensor([[t < len(row) for t in range(3)] for row in rows])
    state = torch.tensor([[states.index(row[:t]) if t < len(row) else 0 for t in range(3)] for row in rows])
    token = torch.tensor([[row[t] if t < len(row) else 0 for t in range(3)] for row in rows])
    forced = torch.tensor([len(state) == 2 for state in states])
    return mask, state, token, len(states), forced


def test_centred_gate_is_the_gradient_of_the_length_return_of_correct_completions_for_any_values():
    mask, state, token, states, forced = enumerated()
    rows = len(mask)
    logits = torch.randn(states, 3, dtype=torch.float64, requires_grad=True)
    # Who is correct depends on the tokens and goes with length, as where a gate does harm.
    correct = torch.tensor([float(mask[i].sum() + (token[i, 0] == 1) >= 3) for i in range(rows)], dtype=torch.float64)
    assert 0 < correct.sum() < rows

    def log_probabilities():
        allowed = logits.masked_fill(forced.unsqueeze(1) & torch.tensor([True, True, False]), -1e9)
        return torch.where(mask, allowed.log_softmax(-1)[state, token], 0.0)

    chance = log_probabilities().sum(1).exp()
    assert float(chance.sum()) == pytest.approx(1.0)
    returns = -(1 - GAMMA ** mask.sum(1).double())
    conditional = (chance * correct * returns).sum() / (chance * correct).sum()
    # Every pair of completions is a group, as often as it is probable; two give it the factor P(correct)^2.
    pairs = torch.cartesian_prod(torch.arange(rows), torch.arange(rows))
    flat, chance_of_pair = pairs.flatten(), chance.detach()[pairs].prod(1).repeat_interleave(2)
    completions = Completions(
        mask=mask[flat], actions=mask[flat], finished=torch.ones(len(flat), dtype=torch.bool), lengths=mask[flat].sum(1)
    )
    expected = torch.autograd.grad(conditional, logits, retain_graph=True)[0]
    expected = expected * float((chance * correct).sum()) ** 2
    nothing = torch.zeros(len(flat), dtype=torch.float64)
    gradients = {"plain": [], "centred": []}
    for _ in range(2):
        values = -torch.rand(states, dtype=torch.float64)[state][flat]
        known = torch.ones(len(flat), dtype=torch.bool)
        outcomes = Outcomes(nothing, known, correct[flat], known)
        centred = centered_gated_advantage(values, completions, GAMMA, nothing, outcomes, Processes(2))
        plain = correct[flat].unsqueeze(1) * length_advantage(values, completions.mask, GAMMA)
        for name, advantages in (("centred", centred), ("plain", plain)):
            surrogate = (chance_of_pair.unsqueeze(1) * advantages * log_probabilities()[flat]).sum() / 2
            gradients[name].append(torch.autograd.grad(surrogate, logits)[0])
    torch.testing.assert_close(gradients["centred"][0], expected)
    torch.testing.assert_close(gradients["centred"][1], expected)
    assert float((gradients["plain"][0] - gradients["plain"][1]).abs().max()) > 1e-2


@pytest.mark.parametrize(("lam", "second_row"), [(1.0, [0.6, 0.5, 0.0]), (0.5, [0.35, 0.5, 0.0])])
def test_shaping_by_hand(tmp_path, lam, second_row):
    # Phi = V; of row two F = -.5 + .6, 0 + .5. At lambda 1 the stream is -Phi(s_t), of the cut row as well.
    trainer = scripted_grpo(tmp_path, shaping_coef=3.0, task_lam=lam)
    stream = (batch_of(trainer)["advantages"] - TASK * MASK) / 3.0
    torch.testing.assert_close(stream[1], torch.tensor(second_row))
    if lam == 1.0:
        torch.testing.assert_close(stream[2], torch.tensor([0.6, 0.75, 0.75]))


def test_shaping_in_tokens_by_hand(tmp_path):
    # gamma 1/2: V = -3/4 is two tokens to come, -1/2 one; the longest completion here has four.
    trainer = scripted_grpo(
        tmp_path, lenvm=scripted_lenvm({6: -0.75, 8: -0.5, 9: -0.75, 10: -0.5}), shaping_coef=1.0,
        shaping_potential="length", max_completion_length=4,
    )  # fmt: skip
    stream = batch_of(trainer)["advantages"] - TASK * MASK
    torch.testing.assert_close(stream[0], torch.tensor([0.5, 0.25, 0.5]))


def test_a_mismatched_shaping_gamma_pays_for_length(tmp_path):
    # A perfect V as potential with its own gamma: F = 1 - gamma for every token, under an undiscounted task return.
    trainer = scripted_grpo(
        tmp_path, [[8, 9, 10, EOS]] * 4, lenvm=scripted_lenvm({6: -0.9375, 8: -0.875, 9: -0.75, 10: -0.5}),
        shaping_coef=1.0, shaping_gamma=GAMMA, allow_gamma_mismatch=True, rewards=[0.0] * 4, max_completion_length=4,
    )  # fmt: skip
    torch.testing.assert_close(batch_of(trainer)["advantages"][0], torch.tensor([2.0, 1.5, 1.0, 0.5]))


def test_tool_tokens_are_no_actions(tmp_path):
    # Row one is the first of the plain batch with two tool tokens inside; the value before token 9 is read at 13.
    completions = [[8, 12, 13, 9, EOS], [8, EOS]]
    trainer = scripted_grpo(
        tmp_path, completions, [1.0, 0.0], tool_masks=[[1, 0, 0, 1, 1], [1, 1]],
        lenvm=scripted_lenvm({**VALUES, 13: -0.5, 12: -0.99}), length_coef=1.0, length_gate="all",
        max_completion_length=5,
    )  # fmt: skip
    advantages = batch_of(trainer)["advantages"]
    torch.testing.assert_close(advantages[0], torch.tensor([0.225, 0.0, 0.0, 0.25, 0.75]))
    assert trainer._metrics["train"]["length/mean"] == [pytest.approx(1.5)]
    assert trainer._metrics["train"]["lenvm/realised_length"] == [pytest.approx(1.5)]


@pytest.mark.parametrize("changes", [{}, {"length_lam": 0.5}, {"length_gate_center": True}, {"shaping_coef": 1.0}])
def test_rows_left_out_of_the_loss_are_zero_and_finite(tmp_path, changes):
    trainer = scripted_grpo(tmp_path, mask_truncated_completions=True, length_coef=1.0, **changes)
    batch = batch_of(trainer)
    assert batch["completion_mask"].sum(1).tolist() == [3, 2, 0, 2]
    assert bool(torch.isfinite(batch["advantages"]).all()) and bool((batch["advantages"][2] == 0).all())
    # It was written all the same: lengths 2, 1, 3 and 1, the end of sequence not counted.
    assert trainer._metrics["train"]["length/mean"] == [pytest.approx(7 / 4)]
    assert trainer._metrics["train"]["length/truncated"] == [pytest.approx(1 / 4)]


def test_completions_that_nobody_scored_do_not_move_the_policy(tmp_path):
    trainer = scripted_grpo(
        tmp_path, rewards=[1.0, None, 0.0, 0.0], length_coef=1.0, length_gate="all", shaping_coef=1.0
    )
    advantages = batch_of(trainer)["advantages"]
    assert bool((advantages[1] == 0).all()) and bool((advantages[3, :2] != 0).all())


def test_metrics_by_hand(tmp_path):
    trainer = scripted_grpo(tmp_path, length_coef=1.0, length_gate="all")
    batch_of(trainer)
    got = {key: values[0] for key, values in trainer._metrics["train"].items()}
    # Values over the ten tokens, residuals -(1/2) + V'/2 - V; finished rows: one, two and four.
    assert got["lenvm/value_mean"] == pytest.approx((-0.6 * 4 - 0.5 * 2 - 0.75 * 3 - 0.25) / 10)
    residuals = [-0.15, -0.375, 0.25, -0.15, 0.0, -0.275, -0.125, -0.125, -0.025, -0.25]
    assert got["lenvm/td_residual_mean"] == pytest.approx(sum(residuals) / 10, abs=1e-6)
    returns = torch.tensor([-0.875, -0.75, -0.5, -0.75, -0.5, -0.75, -0.5])
    errors = torch.tensor([-0.275, -0.25, 0.25, -0.15, 0.0, -0.15, -0.25])
    explained = 1 - errors.var(unbiased=False) / returns.var(unbiased=False)
    assert got["lenvm/explained_variance"] == pytest.approx(float(explained), abs=1e-5)
    # ln(1 - .6) / ln(1/2) = 1.3219 tokens with the end of sequence.
    assert got["lenvm/predicted_length"] == pytest.approx(0.32193, abs=1e-4)
    assert got["lenvm/realised_length"] == pytest.approx((2 + 1 + 1) / 3)
    assert (got["length/mean"], got["length/mean_correct"]) == (pytest.approx(7 / 4), pytest.approx(5 / 2))
    assert (got["length/correct"], got["length/truncated"]) == (0.5, 0.25)
    actions = MASK.bool()
    task, length = (TASK * MASK)[actions], LENGTH[actions]
    assert got["advantage/task_std"] == pytest.approx(float(task.std(unbiased=False)), abs=1e-6)
    assert got["advantage/length_std"] == pytest.approx(float(length.std(unbiased=False)), abs=1e-6)
    assert got["advantage/length_mean"] == pytest.approx(float(length.mean()), abs=1e-6)
    cosine = float((task * length).sum() / (task.norm() * length.norm()))
    assert got["advantage/cosine"] == pytest.approx(cosine, abs=1e-6)


def test_everything_logged_is_in_the_metrics_file(tmp_path):
    trainer = grpo(tmp_path, first_is_w8, random_lenvm(), length_coef=0.1, max_steps=2)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"event": "train_begin", "step": 0}
    assert [line["step"] for line in lines[1:]] == [1, 2, 2]
    for line, entry in zip(lines[1:], trainer.state.log_history, strict=True):
        assert set(entry) == set(line)
        assert line.get("lenvm/value_mean") == entry.get("lenvm/value_mean")


def test_the_length_value_model_stays_frozen_bit_for_bit(tmp_path):
    lenvm = random_lenvm()
    before = weights(lenvm)
    trainer = grpo(tmp_path, lenvm=lenvm, length_coef=1.0, length_gate="all", shaping_coef=1.0, weight_decay=0.1)
    policy = weights(trainer.model)
    trainer.train()
    assert same_weights(weights(lenvm), before) and not same_weights(weights(trainer.model), policy)
    assert not lenvm.training and all(p.grad is None and not p.requires_grad for p in lenvm.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint({id(p) for p in lenvm.parameters()})


def mean_lengths(folder, **changes):
    """Mean lengths before and after 25 steps without a task reward, with a value that is the same everywhere."""
    trainer = grpo(
        folder, no_reward, scripted_lenvm({}, gamma=0.9, default=-0.6),
        policy=tiny_llama(VOCAB, seed=1, initializer_range=0.05), max_completion_length=20,
        per_device_train_batch_size=32, max_steps=25, loss_type="dr_grpo", learning_rate=3e-3, **changes,
    )  # fmt: skip
    trainer.train()
    lengths = logged(trainer, "length/mean")
    return sum(lengths[:2]) / 2, sum(lengths[-5:]) / 5


def test_a_positive_coefficient_shortens_and_a_negative_one_lengthens(tmp_path):
    before, after = mean_lengths(tmp_path, length_coef=1.0, length_gate="all")
    assert before > 8 and after < 4
    before, after = mean_lengths(tmp_path, length_coef=-1.0, length_gate="all")
    assert before < 12.5 and after > 15


def test_shaping_alone_does_not_change_the_length(tmp_path):
    before, after = mean_lengths(tmp_path, shaping_coef=1.0)
    # (With the potential carried on past the cut it would end near 3.)
    assert after == pytest.approx(before, abs=4.0)


def test_groups_without_a_task_signal_still_learn_length(tmp_path):
    trainer = scripted_grpo(tmp_path, rewards=[1.0] * 4, length_coef=1.0)
    torch.testing.assert_close(batch_of(trainer)["advantages"], LENGTH * MASK)


def test_iterations_accumulation_and_evaluation_run_together(tmp_path):
    trainer = grpo(
        tmp_path, lenvm=random_lenvm(), length_coef=0.5, length_gate="all", shaping_coef=0.5, num_iterations=2,
        gradient_accumulation_steps=2, steps_per_generation=4, max_steps=6, per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    assert len(logged(trainer, "loss")) == 6 and all(abs(loss) < 100 for loss in logged(trainer, "loss"))
    trained = set(logged(trainer, "lenvm/value_mean"))
    metrics = trainer.evaluate(prompts(4))
    entry = trainer.state.log_history[-1]
    assert "eval_loss" in metrics and {"eval_lenvm/value_mean", "eval_length/mean"} <= entry.keys() and trained


def test_the_forward_of_the_length_value_model_is_chunked_by_the_batch_of_a_device(tmp_path):
    lenvm, rows = random_lenvm(), []
    lenvm.register_forward_pre_hook(lambda m, a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    grpo(tmp_path, lenvm=lenvm, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=1).train()
    assert rows == [4, 4, 4]


def test_weights_and_biases_runs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    trainer = grpo(tmp_path, lenvm=random_lenvm(), length_coef=0.1, max_steps=2, report_to="wandb", run_name="tiny")
    trainer.train()
    assert wandb.run.settings.mode == "offline" and wandb.run.summary.get("train/lenvm/value_mean") < 0
    wandb.finish()
