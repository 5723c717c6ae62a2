"""TRL's own PPO trainer (trl 1.12) with a shaped value model; run by `make test-legacy`."""

from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from test_trainers_legacy import make_critic, shaped
from tiny import EOS, PAD, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, random_lenvm, same_weights, weights

from lenvm_rl.trainers.legacy import check_legacy_ppo, legacy_ppo

pytestmark = pytest.mark.skipif(
    Version(version("trl")) >= Version("1.13"), reason="TRL has no PPO trainer since 1.13: run `make test-legacy`"
)

PROMPT, SHAPING_COEF, TASK_GAMMA, KL_COEF = 2, 2.0, 0.9, 0.05


def arguments(folder, **changes):
    """Of three updates, two passes over each."""
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "gradient_checkpointing": False, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "num_ppo_epochs": 2, "total_episodes": 24, "response_length": 5, "stop_token": "eos", "temperature": 1.0,
        "num_sample_generations": 0, "learning_rate": 1e-3, "disable_tqdm": True, "seed": 3, "max_grad_norm": None,
        "gamma": TASK_GAMMA, "kl_coef": KL_COEF,
    }  # fmt: skip
    return legacy_ppo()[1](**{**settings, **changes})


def make_policy(filler=PAD):
    """In float64, in which sums of another order are as good as equal. It never samples the pad token, at which TRL's
    trainer would cut; where it has ended it fills up with `filler`."""
    policy = tiny_llama(VOCAB, seed=1).double()
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB).index_fill_(0, torch.tensor(PAD), -100.0).double())
    policy.generation_config.pad_token_id = filler
    return policy


def run_ppo(folder, value_model, reference=None, filler=PAD):
    """Trains a tiny policy and the value model; returns the policy."""
    tokenizer = tiny_tokenizer(VOCAB)
    policy = make_policy(filler)
    args = arguments(folder)
    check_legacy_ppo(args, policy, tokenizer)
    data = Dataset.from_dict({"input_ids": [[6, 6 + i % 10] for i in range(16)]})
    legacy_ppo()[0](
        args=args, processing_class=tokenizer, model=policy, ref_model=reference or make_policy(),
        reward_model=make_critic(seed=9).double(), train_dataset=data, value_model=value_model, eval_dataset=data,
    ).train()  # fmt: skip
    return policy


def furthest(one, other):
    """The largest difference of two models' weights."""
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def pay_shaping(monkeypatch, lenvm):
    """Lets TRL's trainer pay ``F_t`` in its rewards, row by row; returns the reference model to train with, and a list
    that fills with the lengths of the responses.

    Its reward for a token is ``kl_coef * (ref_logprob - logprob)``, so ``F_t / kl_coef`` is added to the former.
    """
    from trl.experimental.ppo import ppo_trainer

    reference, seen, lengths = make_policy(), [], []
    reference.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    original = ppo_trainer.selective_log_softmax

    def paid(logits, response):
        logps = original(logits, response)
        if not seen:  # the policy's
            return logps
        rows = seen.pop()
        values = lenvm(rows["input_ids"], attention_mask=rows["attention_mask"]).values.double()
        for row, tokens in enumerate(response.tolist()):
            length = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
            potential = [SHAPING_COEF * float(values[row, PROMPT - 1 + t]) for t in range(length)] + [0.0]
            for t in range(length):
                logps[row, t] += (TASK_GAMMA * potential[t + 1] - potential[t]) / KL_COEF
            lengths.append(length)
        return logps

    monkeypatch.setattr(ppo_trainer, "selective_log_softmax", paid)
    return reference, lengths


def test_without_weight_it_is_the_trainer_with_its_own_critic(tmp_path):
    plain, ours = make_critic().double(), make_critic().double()
    first = run_ppo(tmp_path / "plain", plain)
    second = run_ppo(tmp_path / "shaped", shaped(ours, shaping_coef=0.0))
    # Not bit for bit: the critic's hidden states are a part of a wider array here, and are summed in another order.
    assert furthest(first, second) < 1e-9 and furthest(plain, ours) < 1e-9
    assert furthest(plain, make_critic()) > 1e-3


@pytest.mark.parametrize("filler", [PAD, None])
def test_the_offset_is_shaping_in_the_rewards(tmp_path, monkeypatch, filler):
    """Policy and critic end with the same weights, whether the critic is offset by Phi or the rewards are paid F.
    Without a pad token, the policy fills up with copies of the end of sequence."""
    lenvm, plain, offset, paid = random_lenvm(), *(make_critic().double() for _ in range(3))
    start = weights(lenvm)
    unshaped = run_ppo(tmp_path / "plain", plain, filler=filler)
    by_offset = run_ppo(tmp_path / "offset", shaped(offset, lenvm, shaping_coef=SHAPING_COEF), filler=filler)
    reference, lengths = pay_shaping(monkeypatch, lenvm)
    by_rewards = run_ppo(tmp_path / "paid", paid, reference, filler)
    assert len(lengths) == 24 and min(lengths) < max(lengths) == 5
    assert furthest(by_offset, by_rewards) < 1e-7 and furthest(offset, paid) < 1e-7
    assert furthest(by_offset, unshaped) > 1e-3 and furthest(offset, plain) > 1e-3
    assert same_weights(start, weights(lenvm))


def test_what_the_trainer_reads_behind_an_end_is_the_critic_alone():
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_token": None}, "set stop_token='eos'"),
        ({"num_mini_batches": 2, "gradient_accumulation_steps": 2}, "set one of them to 1"),
    ],
)
def test_its_own_config_is_refused_where_it_would_do_something_else(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_legacy_ppo(arguments(tmp_path, **changes), tiny_llama(VOCAB), tiny_tokenizer(VOCAB))


def test_speeds_are_measured_and_told(capsys):
    from eval.speed.__main__ import main

    sizes = "--hidden 32 --layers 1 --vocab 64 --prompt_tokens 4 --completion_tokens 4 --batch 4 --updates 2"
    sizes += " --repetitions 1"
    main(["ppo", *sizes.split()])
    told = capsys.readouterr().out
    assert "critic: full; LenVM: none" in told and "time over TRL's" in told
