"""Log-probabilities and gradients of a batch: independent of padding, of the forward size, and linear."""

import pytest
import torch
from tiny import PAD, tiny_gpt2, tiny_llama

from eval.gradient.batches import TokenBatch, batch_gradients, select_parameters


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


def test_a_pattern_that_no_parameter_has_is_refused():
    with pytest.raises(ValueError, match="layers_1.*embed_tokens"):
        select_parameters(tiny_llama(), "layers_1")


def test_padding_of_a_batch():
    batch = TokenBatch.from_rows([[3], [4, 5]], [[6, 7, 1], [8]], [True, False], [1])
    assert batch.prompt_ids.tolist() == [[PAD, 3], [4, 5]] and batch.prompt_mask.tolist() == [[0, 1], [1, 1]]
    assert batch.completion_ids.tolist() == [[6, 7, 1], [8, PAD, PAD]]
    assert batch.completions.lengths.tolist() == [2, 1]


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
