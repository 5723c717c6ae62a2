"""TRL's own PPO trainer (trl 1.12) with a shaped value model; run by `make test-legacy`."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_trainers_legacy import make_critic, shaped
from tiny import EOS, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, random_lenvm, same_weights, weights

from lenvm_rl.trainers.legacy import check_legacy_ppo, legacy_ppo

pytestmark = pytest.mark.skipif(
    Version(version("trl")) >= Version("1.13"), reason="TRL has no PPO trainer since 1.13: run `make test-legacy`"
)


def run_ppo(tmp_path, value_model, **changes):
    """Three updates of a tiny policy; returns the trainer, trained, and every value it read."""
    trainer_class, config_class = legacy_ppo()
    tokenizer = tiny_tokenizer(VOCAB)
    policy = tiny_llama(VOCAB, seed=1)
    args = config_class(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, num_ppo_epochs=2, total_episodes=24,
        response_length=5, stop_token="eos", num_sample_generations=0, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", disable_tqdm=True, seed=3, temperature=1.0, max_grad_norm=None, **changes,
    )  # fmt: skip
    check_legacy_ppo(args, policy, tokenizer)
    data = Dataset.from_dict({"input_ids": [[6, 6 + i % 10] for i in range(16)]})
    trainer = trainer_class(
        args=args, processing_class=tokenizer, model=policy, ref_model=tiny_llama(VOCAB, seed=1),
        reward_model=make_critic(seed=9), train_dataset=data, value_model=value_model, eval_dataset=data,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_without_weight_it_is_the_trainer_with_its_own_critic(tmp_path):
    plain, ours = make_critic(), make_critic()
    first = run_ppo(tmp_path / "plain", plain)
    second = run_ppo(tmp_path / "shaped", shaped(ours, shaping_coef=0.0))
    # Not bit for bit: the critic's hidden states are a part of a wider array here, and are summed in another order.
    for one, other in ((first.policy_model, second.policy_model), (plain, ours)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    moved = [float((w - weights(make_critic())[name]).abs().max()) for name, w in weights(plain).items()]
    assert max(moved) > 1e-3


def test_shaping_changes_what_is_learnt_and_the_potential_stays_frozen(tmp_path):
    lenvm, ours = random_lenvm(), make_critic()
    start = weights(lenvm)
    first = run_ppo(tmp_path / "plain", make_critic())
    second = run_ppo(tmp_path / "shaped", shaped(ours, lenvm))
    assert same_weights(start, weights(lenvm))
    pairs = zip(first.policy_model.parameters(), second.policy_model.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3
    assert all(torch.isfinite(weight).all() for weight in second.policy_model.parameters())


def test_what_the_trainer_reads_behind_an_end_is_the_critic_alone(tmp_path):
    """`get_reward` is how it reads values: at the end of sequence, where the score is paid from, Phi is 0."""
    from trl.experimental.utils import get_reward

    critic = make_critic()
    model = shaped(critic, shaping_coef=3.0)
    ids = torch.tensor([[6, 7, 8, EOS, 0], [6, 7, 8, 9, 9]])
    with torch.no_grad():
        ours, _, _ = get_reward(model, ids, 0, 2)
        theirs, _, _ = get_reward(critic, ids, 0, 2)
    difference = (ours - theirs).squeeze(-1)
    assert difference[0, 3] == 0.0 and bool((difference[0, :3] < -0.01).all())
    assert bool((difference[1] < -0.01).all())


def test_speeds_are_measured_and_told(capsys):
    from eval.speed import main

    sizes = "--hidden 32 --layers 1 --vocab 64 --prompt_tokens 4 --completion_tokens 4 --batch 4 --updates 2"
    main(["ppo", *sizes.split()])
    told = capsys.readouterr().out
    assert "LenVMPPOTrainer, learned critic:" in told and "times TRL's tokens/s (asked >= 1.4" in told
