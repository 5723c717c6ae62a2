"""Scripted policies: closed forms against hand-worked numbers, enumeration, and the models that play them."""

import math

import pytest
import torch

from lenvm_rl.sandbox.scripted import (
    EOS,
    PAD,
    START,
    ScriptedLengthValue,
    ScriptedPolicy,
    TokenChain,
    countdown_chain,
    geometric_chain,
    random_chain,
)


@pytest.mark.parametrize("hazard", [1.0, 0.25, 1 / 46])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.997])
def test_a_geometric_policy_has_the_closed_form_value_everywhere(hazard, gamma):
    value = geometric_chain(hazard).value(gamma)
    expected = -(1 - gamma) / (1 - gamma * (1 - hazard))
    torch.testing.assert_close(value[START:], torch.full_like(value[START:], expected))
    assert value[EOS] == 0.0


def test_geometric_lengths():
    chain = geometric_chain(0.2)
    torch.testing.assert_close(chain.mean_length()[START:], torch.full((4,), 5.0, dtype=torch.float64))
    law = chain.length_distribution(START, 3)
    torch.testing.assert_close(law, torch.tensor([0.0, 0.2, 0.16, 0.128], dtype=torch.float64))


def test_a_countdown_has_deterministic_lengths_and_exact_returns():
    chain = countdown_chain([0.5, 0.0, 0.25, 0.25])
    gamma = 0.9
    counted = torch.arange(1, 5, dtype=torch.float64)
    torch.testing.assert_close(chain.mean_length()[START + 1 :], counted)
    torch.testing.assert_close(chain.value(gamma)[START + 1 :], -(1 - gamma**counted))
    # From START one token more is written: 0.5 of 2 tokens, 0.25 of 4, 0.25 of 5.
    assert chain.mean_length()[START] == pytest.approx(3.25)
    assert 1 + chain.value(gamma)[START] == pytest.approx(0.5 * gamma**2 + 0.25 * gamma**4 + 0.25 * gamma**5)


@pytest.mark.parametrize("seed", range(3))
def test_value_and_mean_agree_with_the_enumerated_law(seed):
    chain = random_chain(7, seed, min_hazard=0.1)
    gamma = 0.95
    length = torch.arange(1001, dtype=torch.float64)
    for state in range(START, 7):
        law = chain.length_distribution(state, 1000)
        assert law.sum() == pytest.approx(1.0)
        assert chain.value(gamma)[state] == pytest.approx(-float((law * (1 - gamma**length)).sum()))
        assert chain.mean_length()[state] == pytest.approx(float((law * length).sum()))


def test_a_chain_that_never_ends_is_worth_minus_one():
    stuck = torch.zeros(3, 3, dtype=torch.float64)
    stuck[START, START] = 1.0
    chain = TokenChain(stuck)
    assert chain.value(0.9)[START] == pytest.approx(-1.0)
    assert float(ScriptedLengthValue.from_chain(chain, 0.9)(torch.tensor([[START]])).values) == -1.0


def test_the_value_model_gives_the_value_at_each_token_and_exactly_zero_after_the_end():
    chain, gamma = random_chain(9, seed=3), 0.97
    model = ScriptedLengthValue.from_chain(chain, gamma)
    assert model.config.gamma == gamma
    ids = torch.tensor([[START, 4, 8, EOS], [5, 5, 3, 7]])
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(output.values, chain.value(gamma)[ids].float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(output.values, -output.logits.sigmoid())
    assert output.values[0, 3] == 0.0
    assert output.logits.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_the_logit_of_a_countdown_reads_as_its_length():
    chain, gamma = countdown_chain([1 / 30] * 30), 0.99
    ids = torch.arange(START + 1, START + 31).unsqueeze(0)
    logits = ScriptedLengthValue.from_chain(chain, gamma)(ids).logits
    length = -torch.nn.functional.softplus(logits) / math.log(gamma)
    torch.testing.assert_close(length[0], torch.arange(1.0, 31.0), rtol=1e-4, atol=0)


def test_the_policy_plays_its_chain():
    chain = random_chain(6, seed=1)
    policy = ScriptedPolicy.from_chain(chain)
    ids = torch.tensor([[2, 5, 3]])
    torch.testing.assert_close(policy(ids).logits.softmax(-1)[0].double(), chain.transition[ids[0]], rtol=0, atol=1e-6)
    assert policy(ids, logits_to_keep=1).logits.shape == (1, 1, 6)
    torch.testing.assert_close(policy.chain().transition, chain.transition, rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_follows_the_chain_with_and_without_a_cache(use_cache):
    chain = random_chain(6, seed=2, min_hazard=0.2)
    policy = ScriptedPolicy.from_chain(chain)
    prompts = torch.tensor([[PAD, START], [3, 4]]).repeat_interleave(2000, dim=0)
    ids = policy.generate(
        prompts, attention_mask=(prompts != PAD).long(), do_sample=True, top_k=0, max_new_tokens=60, use_cache=use_cache
    )
    lengths = (ids[:, 2:] != PAD).sum(dim=1).double().view(2, 2000)
    expected = chain.mean_length()[[START, 4]]
    error = lengths.std(dim=1) / math.sqrt(2000)
    assert bool(((lengths.mean(dim=1) - expected).abs() < 4 * error).all())


def test_a_policy_survives_saving_and_takes_gradients(tmp_path):
    policy = ScriptedPolicy.from_chain(geometric_chain(0.3))
    policy.save_pretrained(tmp_path)
    again = ScriptedPolicy.from_pretrained(tmp_path)
    assert torch.equal(again.table.weight, policy.table.weight)
    ids = torch.tensor([[START, 3, EOS]])
    again(ids).logits.log_softmax(-1)[0, 1, EOS].backward()
    assert torch.isfinite(again.table.weight.grad).all() and again.table.weight.grad[3, EOS] > 0


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        (torch.ones(2, 3), "shape"),
        (torch.full((4, 4), 0.3), "sum to 1"),
        (torch.full((4, 4), 0.25), "padding"),
        (torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 1.5, -0.5]]), "sum to 1"),
    ],
)
def test_what_is_no_chain_is_refused(transition, message):
    with pytest.raises(ValueError, match=message):
        TokenChain(transition)
