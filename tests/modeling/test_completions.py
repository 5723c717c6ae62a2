"""Reading a value model along completions: the right position, every row by itself, nothing from masked slots."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt2, tiny_length_value_model, tiny_llama, tiny_qwen2, tokens

from lenvm_rl.modeling.completions import (
    bootstrap_values,
    completion_logits,
    pad_left,
    pad_right,
    position_ids_from_mask,
    state_logits,
    token_log_probs,
)

# Two rows: a prompt of 3 with a completion of 2, and a prompt of 2 with a completion of 4.
PROMPT_MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
COMPLETION_MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
PROMPTS = torch.tensor([[1, 2, 3], [63, 4, 5]])
COMPLETIONS = torch.tensor([[6, 7, 63, 63], [8, 9, 10, 11]])


class RunningSum:
    """A value model whose logit is the sum of the unmasked ids so far; it remembers how many rows each forward had."""

    def __init__(self):
        self.rows = []

    def __call__(self, input_ids, attention_mask):
        self.rows.append(len(input_ids))
        return SimpleNamespace(logits=(input_ids * attention_mask).cumsum(dim=1).double())


def test_positions_start_at_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
    for given in (mask, mask.bool(), mask.float()):
        positions = position_ids_from_mask(given)
        assert positions.tolist() == expected and positions.dtype == torch.int64
    with pytest.raises(ValueError, match="position_ids"):
        position_ids_from_mask(mask[None])


@pytest.mark.parametrize("chunk_size, rows", [(None, [2]), (1, [1, 1]), (2, [2]), (5, [2])])
def test_logits_stand_before_each_token_and_after_the_last(chunk_size, rows):
    model = RunningSum()
    logits = completion_logits(model, PROMPTS, PROMPT_MASK, COMPLETIONS, COMPLETION_MASK, chunk_size)
    # Prompts sum to 6 and 9. Row 0: 6, 6+6, 6+6+7, then nothing. Row 1: 9, +8, +9, +10, +11.
    assert logits.tolist() == [[6, 12, 19, 0, 0], [9, 17, 26, 36, 47]]
    assert logits.dtype == torch.float32 and model.rows == rows


def test_no_completion_at_all_leaves_the_value_of_the_prompt():
    none = torch.zeros(2, 0, dtype=torch.long)
    assert completion_logits(RunningSum(), PROMPTS, PROMPT_MASK, none, none).tolist() == [[6], [9]]
    masked = completion_logits(RunningSum(), PROMPTS, PROMPT_MASK, COMPLETIONS, torch.zeros(2, 4))
    assert masked.tolist() == [[6, 0, 0, 0, 0], [9, 0, 0, 0, 0]]


@pytest.mark.parametrize("backbone", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_row_in_a_batch_has_the_logits_it_has_alone(backbone, chunk_size):
    model = tiny_length_value_model(backbone())
    logits = completion_logits(model, PROMPTS, PROMPT_MASK, COMPLETIONS, COMPLETION_MASK, chunk_size)
    for row, (prompt, completion) in enumerate([([1, 2, 3], [6, 7]), ([4, 5], [8, 9, 10, 11])]):
        alone = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(logits[row, : len(completion) + 1], alone, rtol=0, atol=1e-5)
    assert (logits[0, 3:] == 0).all()


@pytest.mark.parametrize("poison", [-100, 0, 17, 10**9])
def test_poison_in_masked_slots_changes_neither_logits_nor_gradients(poison):
    results = []
    for filler in (63, poison):
        model = tiny_length_value_model()
        prompts = torch.where(PROMPT_MASK.bool(), PROMPTS, filler)
        completions = torch.where(COMPLETION_MASK.bool(), COMPLETIONS, filler)
        logits = completion_logits(model, prompts, PROMPT_MASK, completions, COMPLETION_MASK)
        logits.square().sum().backward()
        results.append((logits, [weight.grad for weight in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(first, second) for first, second in zip(results[0][1], results[1][1], strict=True))


def test_gradients_flow_for_a_critic_that_learns_and_not_for_a_frozen_one():
    model = tiny_length_value_model()
    arguments = (PROMPTS, PROMPT_MASK, COMPLETIONS, COMPLETION_MASK)
    logits = completion_logits(model, *arguments)
    logits[0, 3:].sum().backward(retain_graph=True)
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)
    logits[0, 2].backward()
    gradient = model.backbone.embed_tokens.weight.grad
    assert sorted(gradient.abs().sum(dim=1).nonzero().flatten().tolist()) == [1, 2, 3, 6, 7]
    assert not completion_logits(model.freeze(), *arguments).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "prompt_mask"),
        ({"prompt_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "prompt_mask"),
        ({"prompt_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "prompt_mask"),
        ({"prompt_ids": PROMPTS[:, :0], "prompt_mask": PROMPT_MASK[:, :0]}, "prompt_mask"),
        ({"completion_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "mask"),
        ({"completion_mask": COMPLETION_MASK[:, :3]}, "completion ids"),
        ({"prompt_mask": PROMPT_MASK[0]}, "Prompt ids"),
        ({"prompt_ids": PROMPTS[:1], "prompt_mask": PROMPT_MASK[:1]}, "1 prompts"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"model": tiny_llama()}, "this model gives"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(change, message):
    arguments = {
        "model": RunningSum(),
        "prompt_ids": PROMPTS,
        "prompt_mask": PROMPT_MASK,
        "completion_ids": COMPLETIONS,
        "completion_mask": COMPLETION_MASK,
    }
    with pytest.raises(ValueError, match=message):
        completion_logits(**(arguments | change))


def test_a_cut_completion_bootstraps_and_a_finished_one_does_not():
    nan = float("nan")
    values = torch.tensor([[-0.5, -0.4, -0.3, nan], [-0.9] * 3 + [-0.6], [-0.2, 9, nan, nan], [-0.1, nan, nan, nan]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    finished = torch.tensor([False, True, True, False])
    for given in (mask, mask.bool(), mask.float()):
        after = bootstrap_values(values, given, finished)
        torch.testing.assert_close(after, torch.tensor([-0.3, 0.0, 0.0, -0.1]), rtol=0, atol=0)
    assert bootstrap_values(values.double(), mask, finished).dtype == torch.float64


def test_not_even_a_nan_after_the_end_reaches_value_or_gradient():
    values = torch.tensor([[-0.5, float("nan")], [-0.5, -0.25]], requires_grad=True)
    after = bootstrap_values(values, torch.ones(2, 1), torch.tensor([True, False]))
    after.sum().backward()
    assert after.tolist() == [0.0, -0.25] and values.grad.tolist() == [[0, 0], [0, 1]]


def test_bootstrapping_needs_one_value_more_than_tokens_and_one_flag_per_row():
    mask, finished = torch.ones(2, 3), torch.zeros(2, dtype=torch.bool)
    for values, ended in ((torch.zeros(2, 3), finished), (torch.zeros(2, 4), finished[:1])):
        with pytest.raises(ValueError, match="finished"):
            bootstrap_values(values, mask, ended)
    with pytest.raises(ValueError, match="mask"):
        bootstrap_values(torch.zeros(1, 3), torch.tensor([[0, 1]]), torch.tensor([False]))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_log_probs_are_those_of_each_completion_alone(make):
    policy = make()
    prompts = [tokens(1, size, seed=size)[0].tolist() for size in (2, 5)]
    completions = [tokens(1, size, seed=10 + size)[0].tolist() for size in (4, 1)]
    together = token_log_probs(policy, *pad_left(prompts), *pad_right(completions), temperature=0.7)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        alone = (logits / 0.7).log_softmax(dim=-1).gather(1, torch.tensor(completion).unsqueeze(1))[:, 0]
        torch.testing.assert_close(together[row, : len(completion)], alone, atol=1e-5, rtol=1e-5)
        assert not together[row, len(completion) :].any()


def test_rows_of_any_length_have_the_logits_of_the_batch_and_nothing_is_read_after_an_end():
    model = tiny_length_value_model().freeze()
    prompts, completions = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]]
    whole = completion_logits(model, *pad_left(prompts), *pad_right(completions))
    read = list(state_logits(model, prompts, completions, finished=[True, False], max_tokens=6))
    assert [batch for batch, _ in read] == [[1], [0]]
    torch.testing.assert_close(read[0][1][0], whole[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(read[1][1][0], whole[0, :2], rtol=0, atol=1e-5)
