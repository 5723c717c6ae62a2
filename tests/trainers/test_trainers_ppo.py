"""Laws of the PPO trainer: hand-worked advantages, shaping as a critic offset, learning, clipping."""

import math

import pytest
import torch
from peft import LoraConfig
from tiny import EOS, tiny_gpt2, tiny_llama
from trainer_parts import (
    VOCAB,
    batch_of,
    counts_of_w8,
    first_is_w8,
    grpo,
    logged,
    no_reward,
    ppo,
    prompts,
    random_lenvm,
    same_weights,
    scripted,
    scripted_lenvm,
    weights,
)

from lenvm_rl.modeling.critic import TaskCriticOutput
from lenvm_rl.trainers import LenVMGRPOTrainer, LenVMPPOTrainer, TaskCritic
from lenvm_rl.trainers.streams import whiten

COMPLETIONS = [[8, 9, EOS], [8, EOS], [9, 9, 9], [10, EOS]]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
REWARDS = [1.0, 0.0, 1.0, 0.5]
LENVM = {6: -0.6, 8: -0.5, 9: -0.75, 10: -0.25}
# What the task critic says of a state, by the last token read.
CRITIC = {6: 0.25, 8: 0.5, 9: 0.75, 10: -0.5}
VALUES = torch.tensor([[0.25, 0.5, 0.75], [0.25, 0.5, 0.0], [0.25, 0.75, 0.75], [0.25, -0.5, 0.0]])
LENGTH = torch.tensor([[-0.275, -0.25, 0.25], [-0.15, 0, 0], [-0.36875, -0.1875, -0.125], [-0.15, -0.25, 0]])


class ScriptedCritic(TaskCritic):
    """A task critic whose value at a position is looked up by the token that stands there, in a trainable table."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return TaskCriticOutput(logits=self.table[input_ids])


def scripted_critic(value_of_token):
    critic = ScriptedCritic.from_backbone(tiny_llama(VOCAB, hidden=8, layers=1))
    table = torch.zeros(VOCAB)
    for token, value in value_of_token.items():
        table[token] = value
    critic.table = torch.nn.Parameter(table)
    return critic


def scripted_ppo(
    folder, critic=CRITIC, rewards=REWARDS, completions=COMPLETIONS, tool_masks=None, data=None, **changes
):
    def reward(completions, **kwargs):
        return list(rewards)

    defaults = {
        "per_device_train_batch_size": len(completions), "num_generations": len(completions), "whiten": "none",
        "max_completion_length": 3, "scale_rewards": "none",
    }  # fmt: skip
    return ppo(
        folder,
        reward,
        scripted_lenvm(LENVM),
        trainer=scripted(LenVMPPOTrainer, completions, tool_masks),
        critic=scripted_critic(critic) if isinstance(critic, dict) else critic,
        # Every prompt ends in w6, the token that the first value is read at.
        data=data or prompts(1),
        **{**defaults, **changes},
    )


def test_a_new_critic_says_zero_and_computes_in_float32():
    critic = TaskCritic.from_backbone(tiny_llama(VOCAB).bfloat16())
    ids = torch.randint(0, VOCAB, (2, 5))
    assert critic(ids).logits.tolist() == [[0.0] * 5] * 2
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert critic.backbone.config._attn_implementation == "sdpa"


def test_padding_moves_no_position_of_the_critic():
    critic = TaskCritic.from_backbone(tiny_gpt2(VOCAB)).eval()
    torch.nn.init.normal_(critic.head.output.weight)
    ids, mask = torch.randint(3, VOCAB, (1, 5)), torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(critic(ids, attention_mask=mask).logits[:, 2:], critic(ids[:, 2:]).logits)


def test_hand_worked_task_advantages_at_lambda_one(tmp_path):
    # The reward at the last token, cut or not, less the value: A = R - V; the critic's target is R.
    batch = batch_of(scripted_ppo(tmp_path))
    rewards = torch.tensor(REWARDS).unsqueeze(1)
    torch.testing.assert_close(batch["advantages"], (rewards - VALUES) * MASK)
    torch.testing.assert_close(batch["critic_returns"] * MASK, rewards * MASK)
    torch.testing.assert_close(batch["critic_values"] * MASK, VALUES)


def test_hand_worked_task_advantages_discounted(tmp_path):
    # gamma 1/2, lambda 1/2, row one: deltas 0, -.125, .25; A = 0 - .0625/4, -.125 + .25/4, .25.
    batch = batch_of(scripted_ppo(tmp_path, task_gamma=0.5, task_lam=0.5))
    torch.testing.assert_close(batch["advantages"][0], torch.tensor([-0.015625, -0.0625, 0.25]))
    torch.testing.assert_close(batch["critic_returns"][0], torch.tensor([0.234375, 0.4375, 1.0]))


def test_a_cut_completion_goes_on_with_the_critics_value_where_asked(tmp_path):
    # Row three is cut in state 9, of value .75; the others end.
    batch = batch_of(scripted_ppo(tmp_path, truncation="bootstrap"))
    rewards = torch.tensor([1.0, 0.0, 1.75, 0.5]).unsqueeze(1)
    torch.testing.assert_close(batch["advantages"], (rewards - VALUES) * MASK)


def test_the_length_stream_is_added_beside_the_task(tmp_path):
    batch = batch_of(scripted_ppo(tmp_path, length_coef=2.0))
    gate = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    task = torch.tensor(REWARDS).unsqueeze(1) - VALUES
    torch.testing.assert_close(batch["advantages"], (task + 2.0 * LENGTH * gate) * MASK)
    # The critic learns the task alone.
    torch.testing.assert_close(batch["critic_returns"] * MASK, torch.tensor(REWARDS).unsqueeze(1) * MASK)


def test_whitening_acts_on_the_task_alone(tmp_path):
    plain = batch_of(scripted_ppo(tmp_path))["advantages"]
    white = batch_of(scripted_ppo(tmp_path, whiten="task", length_coef=2.0, length_gate="all"))["advantages"]
    actions = MASK.bool()
    task = (white - 2.0 * LENGTH)[actions]
    assert float(task.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(task.std(unbiased=False)) == pytest.approx(1.0, abs=1e-3)
    kept = plain[actions]
    torch.testing.assert_close(task, (kept - kept.mean()) / (kept.std(unbiased=False) + 1e-4))


def test_whitening_does_not_blow_up_equal_advantages():
    mask = torch.tensor([[True, True], [True, False]])
    assert whiten(torch.full((2, 2), 0.3), mask).abs().max() < 1e-3


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_shaping_is_a_critic_offset(tmp_path, truncation, lam):
    common = {"truncation": truncation, "task_lam": lam, "task_gamma": 0.9}
    # V = Phi = -sigmoid, weighted by 2; the critic that starts at V + 2 Phi needs no shaping, but where the task ends.
    offset = {token: CRITIC[token] + 2.0 * LENVM[token] for token in CRITIC}
    shaped = batch_of(scripted_ppo(tmp_path, shaping_coef=2.0, **common))
    plain = batch_of(scripted_ppo(tmp_path, critic=offset, **common))
    torch.testing.assert_close(shaped["advantages"], plain["advantages"])
    # So the critic's target is the shaped return: the plain one less the potential.
    potential = torch.tensor([[LENVM[6], LENVM[8], LENVM[9]]])
    torch.testing.assert_close(shaped["critic_returns"][:1], plain["critic_returns"][:1] - 2.0 * potential)


def test_tool_tokens_are_no_actions_of_the_task(tmp_path):
    completions = [[8, 12, 13, 9, EOS], [8, EOS]]
    trainer = scripted_ppo(
        tmp_path, {**CRITIC, 13: 0.5, 12: 9.0}, [1.0, 0.0], completions, [[1, 0, 0, 1, 1], [1, 1]],
        task_gamma=0.5, task_lam=0.5, max_completion_length=5,
    )  # fmt: skip
    batch = batch_of(trainer)
    torch.testing.assert_close(batch["advantages"][0], torch.tensor([-0.015625, 0.0, 0.0, -0.0625, 0.25]))
    assert batch["critic_mask"].tolist() == [[True, False, False, True, True], [True, True, False, False, False]]


def test_rows_left_out_or_unscored_teach_nobody(tmp_path):
    batch = batch_of(scripted_ppo(tmp_path, rewards=[1.0, None, 1.0, 0.5], mask_truncated_completions=True))
    assert batch["critic_mask"].sum(1).tolist() == [3, 0, 0, 2]
    assert bool((batch["advantages"][1:3] == 0).all()) and bool(torch.isfinite(batch["advantages"]).all())


@pytest.mark.parametrize("rewards", [[1.0, None, 1.0, 0.5], [1.0, 0.0, 1.0, 0.5]])
def test_the_value_loss_is_a_mean_over_scored_tokens(tmp_path, rewards):
    trainer = scripted_ppo(tmp_path, rewards=rewards)
    batch = batch_of(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._value_loss(batch)
    trainer.unread.read()
    assert trainer._metrics["train"]["critic/value_loss"] == [pytest.approx(loss.item())] and loss.item() > 0


def test_whitening_counts_scored_tokens_only(tmp_path):
    advantages = batch_of(scripted_ppo(tmp_path, rewards=[1.0, None, 1.0, 0.5], whiten="task"))["advantages"]
    counted = advantages[[0, 2, 3]][MASK[[0, 2, 3]].bool()]
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(counted.std(unbiased=False)) == pytest.approx(1.0, abs=1e-3)
    assert bool((advantages[1] == 0).all())


def test_without_a_task_critic_the_group_is_the_baseline(tmp_path):
    ours = scripted_ppo(tmp_path, critic="lenvm", length_coef=1.0, shaping_coef=0.5)

    def reward(completions, **kwargs):
        return list(REWARDS)

    theirs = grpo(
        tmp_path, reward, scripted_lenvm(LENVM), trainer=scripted(LenVMGRPOTrainer, COMPLETIONS), data=prompts(1),
        per_device_train_batch_size=4, max_completion_length=3, scale_rewards="none", length_coef=1.0, shaping_coef=0.5,
    )  # fmt: skip
    assert ours.critic is None
    torch.testing.assert_close(batch_of(ours)["advantages"], batch_of(theirs)["advantages"])


def test_without_a_task_critic_the_batch_can_be_the_baseline(tmp_path):
    trainer = scripted_ppo(tmp_path, critic="lenvm", task_baseline="batch", num_generations=2, data=prompts(2))
    task = torch.tensor(REWARDS) - 0.625
    torch.testing.assert_close(batch_of(trainer)["advantages"], task.unsqueeze(1) * MASK)


def test_what_nobody_scored_is_not_in_the_baseline_of_the_batch(tmp_path):
    trainer = scripted_ppo(tmp_path, critic="lenvm", rewards=[1.0, None, 1.0, 0.5], task_baseline="batch")
    task = torch.tensor([1 / 6, 0.0, 1 / 6, -1 / 3])
    torch.testing.assert_close(batch_of(trainer)["advantages"], task.unsqueeze(1) * MASK)


def test_the_value_loss_by_hand(tmp_path):
    trainer = scripted_ppo(tmp_path, cliprange_value=0.2)
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_of(trainer)
    with torch.no_grad():
        trainer.critic.table += 0.5
    # Every value moved by .5 and is clipped to .2; the loss takes the worse of the two errors.
    errors = (torch.tensor(REWARDS).unsqueeze(1) - VALUES)[MASK.bool()]
    expected = 0.5 * torch.maximum((errors - 0.5).square(), (errors - 0.2).square()).mean()
    assert float(trainer._value_loss(batch)) == pytest.approx(float(expected), abs=1e-6)
    trainer.unread.read()
    assert trainer._metrics["train"]["critic/value_loss"] == [pytest.approx(float(expected), abs=1e-6)]
    share = ((errors - 0.2).abs() > (errors - 0.5).abs()).float().mean()
    assert trainer._metrics["train"]["critic/clip_fraction"] == [pytest.approx(float(share))]
    trainer.args.cliprange_value = None
    plain = 0.5 * (errors - 0.5).square().mean()
    assert float(trainer._value_loss(batch)) == pytest.approx(float(plain), abs=1e-6)
    # Of a generation batch that serves four optimizer steps, a step sees a quarter of the tokens.
    trainer.args.steps_per_generation = 4
    assert float(trainer._value_loss(batch)) == pytest.approx(4 * float(plain), abs=1e-6)


def test_the_update_does_not_depend_on_how_the_step_is_split(tmp_path):
    results = []
    for rows, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = ppo(
            tmp_path, counts_of_w8, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
            num_generations=4, max_steps=2, optim="sgd", critic_learning_rate=0.5, learning_rate=0.5, max_grad_norm=0.3,
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer.critic), weights(trainer.model)))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_it_learns_a_preference_for_one_token(tmp_path):
    trainer = ppo(
        tmp_path, first_is_w8, policy=tiny_llama(VOCAB, seed=1, initializer_range=0.05), max_steps=40,
        per_device_train_batch_size=32, learning_rate=1e-2, critic_learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[:3]) / 3 < 0.3 and sum(rewards[-5:]) / 5 > 0.8


def test_the_critic_learns_the_return(tmp_path):
    # The return is in the prompt, and the policy stands still.
    def reward(prompts, **kwargs):
        return [float(prompt.split()[1] in ("w6", "w8", "w10", "w12")) for prompt in prompts]

    trainer = ppo(
        tmp_path, reward, max_steps=40, per_device_train_batch_size=32, learning_rate=0.0, critic_learning_rate=1e-2
    )
    policy = weights(trainer.model)
    trainer.train()
    explained, losses = logged(trainer, "critic/explained_variance"), logged(trainer, "critic/value_loss")
    assert explained[0] == pytest.approx(0.0, abs=1e-6) and sum(explained[-5:]) / 5 > 0.8
    assert losses[-1] < 0.1 * losses[0]
    assert same_weights(weights(trainer.model), policy)


@pytest.mark.parametrize(("coef", "low", "high"), [(1.0, 0.0, 5.0), (-1.0, 14.0, 20.0)])
def test_the_sign_of_the_coefficient_moves_the_length(tmp_path, coef, low, high):
    trainer = ppo(
        tmp_path, no_reward, scripted_lenvm({}, gamma=0.9, default=-0.6), length_coef=coef, length_gate="all",
        policy=tiny_llama(VOCAB, seed=1, initializer_range=0.05), max_completion_length=20, max_steps=25,
        per_device_train_batch_size=32, loss_type="dr_grpo", learning_rate=3e-3,
    )  # fmt: skip
    trainer.train()
    lengths = logged(trainer, "length/mean")
    assert 8.0 < lengths[0] < 13.0 and low < sum(lengths[-5:]) / 5 < high


def test_gradients_of_the_critic_are_clipped_by_themselves_and_do_not_pile_up(tmp_path):
    # One step of gradient descent moves the weights by the clipped norm of the gradient, however often it was taken.
    trainer = ppo(tmp_path, max_steps=1, optim="sgd", critic_learning_rate=1.0, learning_rate=0.0, max_grad_norm=1e-3)
    for _ in range(2):
        before = torch.cat([p.detach().flatten().clone() for p in trainer.critic.parameters()])
        trainer.train()
        moved = torch.cat([p.detach().flatten() for p in trainer.critic.parameters()]) - before
        assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
        assert logged(trainer, "critic/grad_norm")[-1] > 1e-3
        assert all(p.grad is None or not p.grad.any() for p in trainer.critic.parameters())


def test_the_critic_has_no_dropout(tmp_path):
    trainer = ppo(tmp_path, policy=tiny_llama(VOCAB, seed=1, attention_dropout=0.5))
    with torch.no_grad():
        trainer.critic.head.output.weight.normal_()
    ids = torch.randint(0, VOCAB, (2, 6))
    assert trainer.critic.training and torch.equal(trainer.critic(ids).logits, trainer.critic(ids).logits)


def test_the_critic_has_its_own_learning_rate_and_both_models_move(tmp_path):
    lenvm = random_lenvm()
    frozen = weights(lenvm)
    trainer = ppo(tmp_path, lenvm=lenvm, critic_learning_rate=1e-4, weight_decay=0.1, length_coef=1.0, shaping_coef=1.0)
    critic, policy = weights(trainer.critic), weights(trainer.model)
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-2, 0.1), (1e-2, 0.0), (1e-4, 0.1), (1e-4, 0.0)]
    of_critic = {id(p) for group in groups[2:] for p in group["params"]}
    assert of_critic == {id(p) for p in trainer.critic.parameters()}
    assert not same_weights(weights(trainer.critic), critic) and not same_weights(weights(trainer.model), policy)
    assert same_weights(weights(lenvm), frozen) and not lenvm.training
    # A second call trains on, with the same groups.
    trainer.args.max_steps = 5
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 4


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        trainer = ppo(tmp_path, gradient_checkpointing=on, max_steps=2)
        trainer.train()
        results.append((logged(trainer, "loss"), weights(trainer.critic)))
    assert results[0][0] == results[1][0] and same_weights(results[0][1], results[1][1])


def test_the_decoder_of_the_critic_starts_where_asked(tmp_path):
    policy, lenvm = tiny_llama(VOCAB, seed=1), random_lenvm()
    critics = {
        "policy": ppo(tmp_path, policy=policy).critic,
        "lenvm": ppo(tmp_path, lenvm=lenvm, critic_init="lenvm").critic,
        "model": ppo(tmp_path, critic=tiny_llama(VOCAB, seed=7)).critic,
    }
    tiny_llama(VOCAB, seed=7).save_pretrained(tmp_path / "decoder")
    critics["folder"] = ppo(tmp_path, critic_init=str(tmp_path / "decoder")).critic
    expected = {"policy": policy.model, "lenvm": lenvm.backbone, "model": tiny_llama(VOCAB, seed=7).model}
    expected["folder"] = expected["model"]
    for name, critic in critics.items():
        assert same_weights(weights(critic.backbone), weights(expected[name])), name
        assert all(p.requires_grad for p in critic.parameters()), name
    # Copies: training one does not touch the other.
    assert critics["lenvm"].backbone.layers[0].mlp.up_proj.weight is not lenvm.backbone.layers[0].mlp.up_proj.weight
    assert all(not p.requires_grad for p in lenvm.parameters())


def test_a_saved_critic_is_taken_up_again(tmp_path):
    trainer = ppo(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, critic_learning_rate=1e-2)
    trainer.train()
    again = ppo(tmp_path, critic=str(tmp_path / "checkpoint-2" / "critic"))
    assert same_weights(weights(again.critic), weights(trainer.critic))
    assert weights(trainer.critic)["head.output.weight"].abs().max() > 0


def test_a_policy_with_adapters_trains_and_its_critic_is_a_merged_copy(tmp_path):
    policy = tiny_llama(VOCAB, seed=1)
    base = weights(policy.model)
    trainer = LenVMPPOTrainer(
        policy,
        first_is_w8,
        ppo(tmp_path).args,
        train_dataset=prompts(),
        processing_class=ppo(tmp_path).processing_class,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        length_value_model=random_lenvm(),
    )
    assert same_weights(weights(trainer.critic.backbone), base)
    assert all(p.requires_grad for p in trainer.critic.parameters())
    adapters = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = dict(trainer.model.named_parameters())
    assert all("lora" in name for name in adapters) and any(not torch.equal(moved[n], adapters[n]) for n in adapters)


def test_evaluation_and_kl_run(tmp_path):
    tiny_llama(VOCAB, seed=1).save_pretrained(tmp_path / "policy")
    trainer = ppo(
        tmp_path, policy=str(tmp_path / "policy"), lenvm=random_lenvm(), length_coef=0.1, beta=0.1, num_iterations=2,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    assert math.isfinite(trainer.evaluate(prompts(4))["eval_loss"]) and len(logged(trainer, "kl")) == 3
    assert "eval_critic/explained_variance" in trainer.state.log_history[-1]


def test_one_process_may_log_by_itself(tmp_path):
    """What is logged out of turn waits for nobody: metrics of the value loss stay unread until all processes log."""
    trainer = scripted_ppo(tmp_path)
    batch = batch_of(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._value_loss({**batch, "num_items_in_batch": torch.tensor(10.0)})
    trainer.log({"mine": 1.0})
    assert "critic/value_loss" not in trainer._metrics["train"]
    trainer.unread.read()
    assert len(trainer._metrics["train"]["critic/value_loss"]) == 1
