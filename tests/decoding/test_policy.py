"""Policies decoded in slots: what a reader says of rows that come, grow and go is what whole rows say."""

import pytest
import torch
from tiny import tiny_gpt2, tiny_length_value_model, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from lenvm_rl.decoding.policy import SingleRowReader, policy_reader
from lenvm_rl.decoding.scoring import SlotScorer
from lenvm_rl.prediction import boundary_logits

PROMPTS = [[7], [8, 9, 10, 11, 12], [20, 21, 22], list(range(6, 46))]


def whole(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


def windowed():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "kind"), [(tiny_llama, SlotScorer), (tiny_gpt2, SlotScorer), (windowed, SingleRowReader)]
)
@torch.no_grad()
def test_rows_that_come_and_go(make, kind):
    model = make()
    reader, rows = policy_reader(model, 128), {}
    assert type(reader) is kind
    for step in range(14):
        if step in (0, 1, 4, 7):
            prompt = PROMPTS[len(rows) % 4]
            rows[reader.add(prompt)] = list(prompt)
        if step == 9:
            reader.remove(gone := next(iter(rows)))
            del rows[gone]
        scores = reader.last(list(rows))
        expected = torch.stack([whole(model, ids) for ids in rows.values()])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
        for slot, token in zip(rows, scores.argmax(dim=1).tolist(), strict=True):
            # One of them takes two tokens at a time.
            new = [token, 9] if slot == 1 else [token]
            reader.append(slot, new)
            rows[slot] += new


@pytest.mark.parametrize("make", [tiny_llama, windowed])
def test_asked_twice_it_says_the_same(make):
    reader = policy_reader(make(), 64)
    slots = [reader.add(prompt) for prompt in PROMPTS]
    first = reader.last(slots)
    torch.testing.assert_close(reader.last(slots[1:3]), first[1:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reader.last(slots), first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 3, 50])
def test_what_does_not_fit_into_a_forward_is_read_in_several(max_tokens):
    model = tiny_llama()
    reader = SlotScorer(model, max_tokens=max_tokens)
    scores = reader.last([reader.add(prompt) for prompt in PROMPTS])
    torch.testing.assert_close(scores, torch.stack([whole(model, ids) for ids in PROMPTS]), atol=1e-4, rtol=1e-4)
    assert reader.cached_tokens == sum(map(len, PROMPTS))


def test_a_length_value_model_says_what_it_predicts_at_a_prompt_and_scores_on():
    model = tiny_length_value_model().freeze()
    scorer, other = SlotScorer(model), SlotScorer(model)
    slots = [scorer.add(prompt) for prompt in PROMPTS]
    torch.testing.assert_close(scorer.last(slots), boundary_logits(model, PROMPTS), atol=1e-5, rtol=1e-5)
    candidates = torch.tensor([[6, 7, 8]] * 4)
    expected = other.score([other.add(prompt) for prompt in PROMPTS], candidates, torch.ones(4, 3))
    torch.testing.assert_close(scorer.score(slots, candidates, torch.ones(4, 3)), expected, atol=1e-5, rtol=1e-5)


def test_candidates_of_a_policy_have_scores_of_the_token_after_them():
    model = tiny_llama()
    reader = SlotScorer(model)
    found = reader.score([reader.add([6, 7])], torch.tensor([[8, 9]]), torch.tensor([[1, 1]]))
    assert found.shape == (1, 2, 64)
    torch.testing.assert_close(found[0, 1], whole(model, [6, 7, 9]), atol=1e-4, rtol=1e-4)
