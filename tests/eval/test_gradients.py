"""Gradients of batches; their signal, noise and cosines by hand, and of Gaussian ones whose law is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny import PAD, tiny_gpt2, tiny_llama

from eval.gradient.gradients import GradientStatistics, TokenBatch, batch_gradients, inner_products, select_parameters


def test_gradients_do_not_depend_on_the_forward_size_and_are_linear():
    policy = tiny_llama()
    parameters = select_parameters(policy, r"layers\.1\.mlp")
    assert sum(parameter.requires_grad for parameter in policy.parameters()) == len(parameters) == 3
    batch = TokenBatch.from_rows([[3, 4]] * 3, [[5, 6, 1], [7], [8, 1]], [True, False, True], [1])
    advantages = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    stacked = torch.cat([advantages, advantages.sum(dim=0, keepdim=True)])
    whole = batch_gradients(policy, parameters, batch, stacked, 1.0, 10.0, forward_size=3)
    parts = batch_gradients(policy, parameters, batch, stacked, 1.0, 10.0, forward_size=2)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole[2], whole[0] + whole[1], atol=1e-6, rtol=1e-5)
    assert whole.abs().max() > 1e-3


def test_what_a_whole_completion_gets_is_a_multiple_of_its_score():
    policy = tiny_llama()
    parameters = select_parameters(policy, None)
    batch = TokenBatch.from_rows([[3, 4], [5], [6]], [[5, 6, 1], [7], [8, 1]], [True, False, True], [1])
    # Behind the end there is nothing, whatever stands there.
    whole = torch.tensor([[0.5, 0.5, 0.5], [-1.0, 9.0, 9.0], [2.0, 2.0, 0.0]]).double()
    part = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double() * batch.completion_mask
    rest = whole * batch.completion_mask - part
    together = batch_gradients(policy, parameters, batch, torch.stack([part, whole, rest]), 0.7, 10.0, forward_size=2)
    torch.testing.assert_close(together[1], together[0] + together[2], atol=1e-6, rtol=1e-4)
    alone = batch_gradients(policy, parameters, batch, whole.unsqueeze(0), 0.7, 10.0, forward_size=2)
    torch.testing.assert_close(alone[0], together[1], atol=1e-6, rtol=1e-5)
    assert alone.abs().max() > 1e-3


def test_a_pattern_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError, match="layers_1.*embed_tokens"):
        select_parameters(tiny_llama(), "layers_1")


def test_padding_of_a_batch():
    batch = TokenBatch.from_rows([[3], [4, 5]], [[6, 7, 1], [8]], [True, False], [1])
    assert batch.prompt_ids.tolist() == [[PAD, 3], [4, 5]] and batch.prompt_mask.tolist() == [[0, 1], [1, 1]]
    assert batch.completion_ids.tolist() == [[6, 7, 1], [8, PAD, PAD]]
    assert batch.completions.lengths.tolist() == [2, 1]
    # A part of the batch is as long as its own longest completion.
    assert batch.rows(slice(1, 2), "cpu").completion_ids.tolist() == [[8]]
    assert batch.rows(slice(0, 2), "cpu").completion_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_part_of_the_parameters_has_its_part_of_the_gradient(make):
    """With the output embeddings among the parameters, gradients go back from log-probabilities; without, from the
    hidden states before them."""
    policy = make()
    batch = TokenBatch.from_rows([[3, 4], [5], [6]], [[5, 6, 1], [7], [8, 1]], [True, False, True], [1])
    advantages = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    settings = {"temperature": 0.7, "normaliser": 10.0, "forward_size": 2}
    parameters = select_parameters(policy, None)
    whole = batch_gradients(policy, parameters, batch, advantages, **settings)
    sizes = [parameter.numel() for parameter in parameters]
    head = policy.get_output_embeddings().weight
    part = [(p, g) for p, g in zip(parameters, whole.split(sizes, dim=1), strict=True) if p is not head]
    kept, expected = [p for p, _ in part], torch.cat([g for _, g in part], dim=1)
    assert len(kept) < len(parameters)
    found = batch_gradients(policy, kept, batch, advantages, **settings)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-3


def statistics_of(gradients, **options):
    return GradientStatistics(inner_products(np.asarray(gradients, dtype=np.float64)), **options)


def test_by_hand():
    # Mean (2, 0); the product of the two halves is 3, and the variance over two batches (1 + 1) / 1 = 2.
    found = statistics_of([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert found.signal_and_noise(0) == (3.0, 2.0)
    assert found.snr(0).estimate == 1.5
    assert found.signal_and_noise(1) == (4.0, 0.0) and math.isnan(found.snr(1).estimate)
    assert found.cosine(1, 2).estimate == pytest.approx(math.sqrt(0.5))
    assert found.cosine(0, 1).estimate == 0.0
    assert found.cosines()[1, 2] == found.cosines()[2, 1] == found.cosine(1, 2).estimate


def test_signal_is_the_product_of_the_means_of_halves_over_all_splits():
    gradients = np.random.default_rng(0).normal(size=(2, 6, 3)) + 0.3
    products = []
    for half in itertools.combinations(range(6), 3):
        other = [index for index in range(6) if index not in half]
        products.append(gradients[0, list(half)].mean(0) @ gradients[0, other].mean(0))
    found = statistics_of(gradients)
    assert found.signal_and_noise(0)[0] == pytest.approx(np.mean(products))
    assert found.signal_and_noise(0)[1] == pytest.approx(np.trace(np.cov(gradients[0].T)))


def test_a_resample_is_the_statistic_without_pairs_of_one_batch_with_itself():
    gradients = np.random.default_rng(1).normal(size=(1, 4, 3)) + 0.5
    counts = np.array([[2.0, 0.0, 1.0, 1.0]])
    found = statistics_of(gradients)
    drawn = [0, 0, 2, 3]
    pairs = [(i, j) for i in range(4) for j in range(4) if drawn[i] != drawn[j]]
    signal = np.mean([gradients[0, drawn[i]] @ gradients[0, drawn[j]] for i, j in pairs])
    noise = np.mean([((gradients[0, drawn[i]] - gradients[0, drawn[j]]) ** 2).sum() / 2 for i, j in pairs])
    assert found._signal(0, 0, counts)[0] == pytest.approx(signal)
    assert found._noise(0, counts)[0] == pytest.approx(noise)


def test_gaussian_gradients_are_measured_without_bias_and_intervals_cover():
    # |mu|^2 = 1, tr Cov = 8 * 0.25 = 2: SNR 0.5. The second has mean (0.6, 0.8, 0...), cosine 0.6, SNR 1.
    generator, size = np.random.default_rng(2), 8
    means = np.zeros((2, 1, size))
    means[0, 0, 0], means[1, 0, :2] = 1.0, (0.6, 0.8)
    deviations = np.array([0.5, math.sqrt(0.125)]).reshape(2, 1, 1)
    snr, cosine, inside = [], [], []
    for trial in range(100):
        found = statistics_of(means + deviations * generator.normal(size=(2, 40, size)), num_resamples=200, seed=trial)
        interval = found.snr(0)
        snr.append(interval.estimate)
        cosine.append(found.cosine(0, 1).estimate)
        inside.append(interval.low <= 0.5 <= interval.high)
    assert np.mean(snr) == pytest.approx(0.5, abs=0.03)
    assert np.mean(cosine) == pytest.approx(0.6, abs=0.02)
    assert 0.85 <= np.mean(inside) <= 1.0


def test_without_signal_the_ratio_is_about_zero_and_the_cosine_has_no_interval():
    found = statistics_of(np.random.default_rng(3).normal(size=(2, 60, 50)))
    assert abs(found.snr(0).estimate) < 0.02
    assert math.isnan(found.cosine(0, 1).low)


def test_the_ratio_to_the_best_of_several():
    found = statistics_of([[[1.0], [3.0], [2.0]], [[0.0], [2.0], [1.0]], [[5.0], [9.0], [1.0]]])
    ratios = [found.snr(index).estimate for index in range(3)]
    best = max(ratios[1:])
    assert found.snr_ratio(0, [1, 2]).estimate == pytest.approx(ratios[0] / best)


def test_inner_products_do_not_depend_on_the_chunk(monkeypatch):
    gradients = np.random.default_rng(4).normal(size=(2, 3, 7)).astype(np.float32)
    whole = inner_products(gradients)
    monkeypatch.setattr("eval.gradient.gradients.CHUNK_ENTRIES", 12)
    np.testing.assert_allclose(inner_products(gradients), whole, rtol=1e-6)
    assert whole[0, 1, 2, 0] == pytest.approx(float(gradients[0, 2] @ gradients[1, 0]), rel=1e-5)


def test_one_batch_is_refused():
    with pytest.raises(ValueError, match="products"):
        statistics_of([[[1.0]]])
