"""The adapter to TRL's own PPO trainer, as far as it needs no such trainer: values, ends, and what is refused."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from tiny import EOS, PAD, tiny_llama, tiny_tokenizer
from trainer_parts import VOCAB, random_lenvm, same_weights, weights
from transformers import LlamaForSequenceClassification

from lenvm_rl.advantages import gae
from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.returns import remaining_from_logits
from lenvm_rl.shaping import potential_shaping
from lenvm_rl.trainers.legacy import ShapedValueModel, check_legacy_ppo, ends, legacy_ppo

IDS = torch.tensor([[PAD, 6, EOS, 7, 8, 9, EOS], [7, 6, 9, 8, 8, 9, 7], [6, 7, 8, EOS, EOS, PAD, PAD]])
MASK = IDS != PAD


def make_critic(seed=4):
    """A critic as TRL's trainer takes it."""
    torch.manual_seed(seed)
    base = tiny_llama(VOCAB, seed=seed)
    config = base.config
    config.num_labels = 1
    critic = LlamaForSequenceClassification(config)
    critic.model.load_state_dict(base.model.state_dict())
    return critic.eval()


def shaped(critic, lenvm=None, **changes):
    settings = {"shaping_coef": 2.0, **changes}
    return ShapedValueModel(critic, lenvm or random_lenvm(), tiny_tokenizer(VOCAB), **settings)


def values_of(model, ids=IDS, mask=MASK):
    """As TRL's trainer reads them."""
    decoder = getattr(model, model.base_model_prefix)
    positions = mask.cumsum(1) - mask.long()
    output = decoder(
        input_ids=ids, attention_mask=mask, position_ids=positions, return_dict=True, output_hidden_states=True,
        use_cache=False,
    )  # fmt: skip
    return model.score(output.hidden_states[-1]).squeeze(-1)


def test_a_row_ends_at_the_end_of_sequence_that_closes_it():
    """An end of sequence inside, as between the turns of a chat, ends nothing; copies behind the first are ends too."""
    expected = [[0, 0, 0, 0, 0, 0, 1], [0] * 7, [0, 0, 0, 1, 1, 0, 0]]
    assert ends(IDS, MASK, EOS).long().tolist() == expected


@pytest.mark.parametrize("potential", ["value", "length"])
def test_values_are_the_critics_plus_the_potential(potential):
    critic, lenvm = make_critic(), random_lenvm()
    with torch.no_grad():
        plain = values_of(critic)
        model = shaped(critic, lenvm, shaping_potential=potential, max_completion_length=5)
        logits = lenvm(IDS, attention_mask=MASK).logits
        phi = -torch.sigmoid(logits) if potential == "value" else -remaining_from_logits(logits, 0.9) / 5
        phi = torch.where(ends(IDS, MASK, EOS), 0.0, phi)
        torch.testing.assert_close(values_of(model)[MASK], (plain + 2.0 * phi)[MASK])
    assert float(phi[MASK].abs().max()) > 0.1


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_as_trl_lays_it_out_the_offset_is_shaping_in_the_rewards(lam):
    """A prompt of 2 tokens, responses `8 9 EOS` and one of 4 that was cut. TRL pays the score one step after the end,
    from the state behind it; there Phi is 0, so that GAE(r, v + Phi) is GAE(r + F, v) on every token."""
    ids = torch.tensor([[6, 7, 8, 9, EOS, PAD], [6, 7, 8, 9, 8, 9]])
    mask = ids != PAD
    critic, lenvm = make_critic(), random_lenvm()
    with torch.no_grad():
        model = shaped(critic, lenvm)
        value, plain = (values_of(each, ids, mask)[:, 1:-1] for each in (model, critic))
        # Row 1: three actions, and the step behind the end in which the score is paid; row 2: four actions.
        exists = torch.ones(2, 4, dtype=torch.bool)
        rewards = torch.tensor([[0.1, 0.2, 0.3, 1.0], [0.1, 0.2, 0.3, 1.4]])
        logits = completion_logits(lenvm, ids[:, :2], torch.ones(2, 2), ids[:, 2:], mask[:, 2:])
        potential = -2.0 * torch.sigmoid(logits)[:, :-1]
        potential[0, 3] = 0.0
        shaping = potential_shaping(potential, exists, 0.99)
        ours, theirs = gae(rewards, value, exists, 0.99, lam), gae(rewards + shaping, plain, exists, 0.99, lam)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert (ours - gae(rewards, plain, exists, 0.99, lam)).abs().max() > 0.1


def test_the_length_value_model_is_frozen_and_the_critic_learns():
    critic, lenvm = make_critic(), random_lenvm()
    model = shaped(critic, lenvm).train()
    start, own = weights(critic), weights(lenvm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    values_of(model)[MASK].square().mean().backward()
    optimizer.step()
    assert same_weights(own, weights(lenvm)) and not lenvm.training
    assert not same_weights(start, weights(critic))


def arguments(**changes):
    values = {
        "stop_token": "eos", "stop_token_id": None, "num_mini_batches": 1, "gradient_accumulation_steps": 1,
        "max_grad_norm": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_token": None}, "set stop_token='eos'"),
        ({"stop_token": None, "stop_token_id": 5}, "set stop_token='eos'"),
        ({"num_mini_batches": 2, "gradient_accumulation_steps": 2}, "set one of them to 1"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_legacy_ppo(arguments(**changes), tiny_llama(VOCAB), tiny_tokenizer(VOCAB))


def test_what_leaks_into_the_rollout_is_refused():
    policy, tokenizer = tiny_llama(VOCAB), tiny_tokenizer(VOCAB)
    check_legacy_ppo(arguments(), policy, tokenizer)
    check_legacy_ppo(arguments(stop_token=None, stop_token_id=EOS), policy, tokenizer)
    policy.generation_config.repetition_penalty = 1.1
    with pytest.raises(ValueError, match="repetition_penalty = None"):
        check_legacy_ppo(arguments(), policy, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pad"):
        check_legacy_ppo(arguments(), tiny_llama(VOCAB), tokenizer)


@pytest.mark.parametrize("filler", [None, PAD, EOS, 5])
def test_a_policy_that_pads_with_a_word_is_refused(filler):
    """Without a pad token of its own, or with the end of sequence, `generate` fills up with copies of the end."""
    policy = tiny_llama(VOCAB)
    policy.generation_config.pad_token_id = filler
    if filler != 5:
        check_legacy_ppo(arguments(), policy, tiny_tokenizer(VOCAB))
        return
    with pytest.raises(ValueError, match="generation_config.pad_token_id"):
        check_legacy_ppo(arguments(), policy, tiny_tokenizer(VOCAB))


def test_a_bound_that_is_not_read_is_told(caplog):
    check_legacy_ppo(arguments(max_grad_norm=1.0), tiny_llama(VOCAB), tiny_tokenizer(VOCAB))
    assert "max_grad_norm=1 is not read" in caplog.text


def test_a_critic_that_trl_cannot_read_is_refused():
    with pytest.raises(ValueError, match="no layer `score`"):
        shaped(tiny_llama(VOCAB))
    config = make_critic().config
    config.num_labels = 2
    with pytest.raises(ValueError, match="2 outputs.*num_labels=1"):
        shaped(LlamaForSequenceClassification(config))
    with pytest.raises(ValueError, match="give max_completion_length"):
        shaped(make_critic(), shaping_potential="length")
    with pytest.raises(ValueError, match="shaping_potential='tokens'"):
        shaped(make_critic(), shaping_potential="tokens")


@pytest.mark.skipif(Version(version("trl")) < Version("1.13"), reason="this TRL has a PPO trainer")
def test_a_trl_without_the_trainer_says_so():
    from eval.speed.__main__ import main

    for run in (legacy_ppo, lambda: main(["ppo"])):
        with pytest.raises(ImportError, match="LenVMPPOTrainer"):
            run()
