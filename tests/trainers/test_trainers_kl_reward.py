"""The divergence from the reference policy in PPO's rewards: by hand on scripted log-probabilities, and in a run."""

import json
import shutil

import pytest
import torch
from test_trainers_coefficient import table
from test_trainers_ppo import COMPLETIONS, MASK, REWARDS, VALUES, scripted_ppo
from tiny import EOS, tiny_llama
from trainer_parts import VOCAB, batch_of, logged, ppo, prompts, random_lenvm, same_weights, settings, weights

from lenvm_rl.trainers import LenVMPPOConfig

POLICY = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.25, 9.0], [-1.0, -1.0, -1.0], [-2.0, -3.0, 9.0]])
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-2.5, -0.25, -9.0], [-1.0, -2.0, -4.0], [-1.0, -1.0, -9.0]])
RATIO = torch.tensor([[0.5, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 3.0], [-1.0, -2.0, 0.0]])


@pytest.fixture
def policy(tmp_path):
    """A policy on disk, where TRL loads the reference from."""
    tiny_llama(VOCAB, seed=1).save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


def kl_ppo(folder, policy, completions=COMPLETIONS, **changes):
    """A scripted trainer that reads the log-probabilities above."""
    changes = {"beta": 0.1, "kl_reward_coef": 0.1, **changes}
    trainer = scripted_ppo(folder, completions=completions, policy=policy, **changes)
    asked = []

    def log_probabilities(model, input_ids, attention_mask, logits_to_keep, *arguments, **options):
        table = REFERENCE if model is trainer.ref_model else POLICY
        asked.append(table is POLICY)
        assert (input_ids.shape[0], logits_to_keep) == (len(table), table.shape[1])
        return table.clone(), torch.zeros_like(table), None

    trainer._get_per_token_logps_and_entropies = log_probabilities
    trainer.asked = asked
    return trainer


def to_come(ratio):
    return (ratio * MASK).flip(1).cumsum(dim=1).flip(1)


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "gradient_accumulation_steps": 1}])
def test_by_hand(tmp_path, policy, changes):
    """At lambda 1 a token is paid what comes: the reward, less a tenth of the log ratios from it on."""
    trainer = kl_ppo(tmp_path, policy, **changes)
    batch = batch_of(trainer)
    returns = torch.tensor(REWARDS).unsqueeze(1) - 0.1 * to_come(RATIO)
    torch.testing.assert_close(batch["critic_returns"] * MASK, returns * MASK)
    torch.testing.assert_close(batch["advantages"], (returns - VALUES) * MASK)
    metrics = trainer._metrics["train"]
    # Ten tokens, whose log ratios sum to -1/2, 1, 4 and -3.
    assert metrics["kl_reward/per_token"] == [pytest.approx(0.15)]
    assert metrics["kl_reward/per_completion"] == [pytest.approx(-0.1 * 1.5 / 4)]
    # TRL has the policy's own log-probabilities already where a batch is used twice.
    assert trainer.asked.count(True) == 1


def test_by_hand_discounted(tmp_path, policy):
    # gamma 1/2, lambda 1/2, row one. Rewards -.05, .1, 1; deltas -.05 + .25 - .25, .1 + .375 - .5, 1 - .75.
    batch = batch_of(kl_ppo(tmp_path, policy, task_gamma=0.5, task_lam=0.5))
    last, second = 0.25, -0.025 + 0.25 / 4
    torch.testing.assert_close(batch["advantages"][0], torch.tensor([-0.05 + second / 4, second, last]))


def test_it_is_added_to_shaping(tmp_path, policy):
    shaped = batch_of(kl_ppo(tmp_path, policy, shaping_coef=2.0))
    plain = batch_of(scripted_ppo(tmp_path, shaping_coef=2.0))
    difference = (shaped["critic_returns"] - plain["critic_returns"]) * MASK
    torch.testing.assert_close(difference, -0.1 * to_come(RATIO) * MASK)


def test_tokens_that_nobody_chose_cost_nothing(tmp_path, policy):
    completions = [[8, 12, EOS], [8, EOS], [9, 9, 9], [10, EOS]]
    trainer = kl_ppo(tmp_path, policy, completions, tool_masks=[[1, 0, 1], [1, 1], [1, 1, 1], [1, 1]])
    returns = batch_of(trainer)["critic_returns"][0]
    torch.testing.assert_close(returns[[0, 2]], torch.tensor([1.0 - 0.05, 1.0]))


def test_without_it_the_rewards_know_nothing_of_the_reference(tmp_path, policy):
    batch = batch_of(scripted_ppo(tmp_path, policy=policy, beta=0.1))
    torch.testing.assert_close(batch["critic_returns"] * MASK, torch.tensor(REWARDS).unsqueeze(1) * MASK)


def test_a_run_logs_what_the_page_says_and_starts_at_the_reference(tmp_path, policy):
    lines = []
    for more in ({}, {"kl_reward_coef": 0.05}):
        trainer = ppo(tmp_path, lenvm=random_lenvm(), policy=policy, beta=1e-6, max_steps=2, **more)
        trainer.train()
        trainer.evaluate(prompts(4))
        lines.append([set(entry) for entry in trainer.state.log_history])
    names = table("Divergence in the reward")
    (plain, *_, plain_eval), (ours, *_, ours_eval) = lines
    assert ours - plain == names and ours_eval - plain_eval == {f"eval_{name}" for name in names} and len(names) == 3
    assert logged(trainer, "kl_reward/coef") == [0.05] * 2
    first, second = logged(trainer, "kl_reward/per_token")
    assert first == pytest.approx(0.0, abs=1e-6) and second != 0.0


def test_a_steered_coefficient_by_hand(tmp_path, policy):
    """Per token 0.15 against a target of 0.125, an error of 1/5, and four completions of a horizon of 8: times 1.1."""
    trainer = kl_ppo(tmp_path, policy, kl_reward_target=0.125, kl_reward_horizon=8.0)
    for coef in (0.1, 0.11):
        returns = torch.tensor(REWARDS).unsqueeze(1) - coef * to_come(RATIO)
        torch.testing.assert_close(batch_of(trainer)["critic_returns"] * MASK, returns * MASK)
    batch_of(trainer, "eval")
    batch_of(trainer)
    assert trainer._metrics["train"]["kl_reward/coef"] == pytest.approx([0.1, 0.11, 0.121])
    assert trainer._metrics["train"]["kl_reward/per_completion"][2] == pytest.approx(-0.121 * 1.5 / 4)
    # What an evaluation measures moves nothing.
    assert trainer._metrics["eval"]["kl_reward/coef"] == pytest.approx([0.121])


def test_it_waits_for_the_policy_and_is_resumed(tmp_path, policy):
    changes = {
        "policy": policy, "kl_reward_coef": 0.05, "kl_reward_target": 0.5, "kl_reward_horizon": 8.0, "max_steps": 4,
        "critic_warmup_steps": 1, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = ppo(tmp_path / "whole", **changes)
    whole.train()
    # It stands still in the first batch, and is far below its target in the others: an error of -0.2.
    coefficients = logged(whole, "kl_reward/coef")
    assert coefficients == pytest.approx([0.05, 0.05, 0.04, 0.032])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    part = ppo(tmp_path / "part", **changes)
    part.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "part/metrics.jsonl").read_text().splitlines()[0])["step"] == 2
    assert logged(part, "kl_reward/coef") == coefficients and same_weights(weights(part.model), weights(whole.model))
    whole = ppo(tmp_path / "constant", **{**changes, "kl_reward_target": None, "kl_reward_horizon": 1e4})
    whole.train()
    with pytest.raises(ValueError, match="kl_reward_target"):
        ppo(tmp_path / "constant", **changes).train(resume_from_checkpoint=str(tmp_path / "constant/checkpoint-2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_reward_coef": -0.1, "beta": 0.1}, "kl_reward_coef=-0.1"),
        ({"kl_reward_target": 0.1}, "kl_reward_target=0.1.*kl_reward_coef"),
        ({"kl_reward_coef": 0.1, "kl_reward_target": -0.1}, "kl_reward_target=-0.1"),
        ({"kl_reward_coef": 0.1, "kl_reward_horizon": 9.0}, "kl_reward_horizon=9.0.*kl_reward_target"),
        ({"kl_reward_coef": 0.1, "kl_reward_target": 0.1, "kl_reward_horizon": 1.0}, "kl_reward_horizon=1.0"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        LenVMPPOConfig(**settings(tmp_path, **changes))


def test_without_beta_the_reference_is_loaded_and_the_loss_has_no_term_of_it(tmp_path, policy):
    """Every weight as with a beta that float32 does not see."""
    trained = []
    for beta in (0.0, 1e-30):
        trainer = ppo(tmp_path, lenvm=random_lenvm(), policy=policy, beta=beta, kl_reward_coef=0.05, max_steps=3)
        trainer.train()
        assert trainer.ref_model is not None
        trained.append([weight.detach().clone() for weight in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_without_a_critic_it_is_refused(tmp_path, policy):
    with pytest.raises(ValueError, match="kl_reward_coef"):
        ppo(tmp_path, lenvm=random_lenvm(), policy=policy, critic="lenvm", kl_reward_coef=0.1, beta=0.1)
